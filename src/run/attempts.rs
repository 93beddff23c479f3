//! Fresh starts and resumes, reconstructed from the log, training_args.bin of the checkpoints and the configuration.

use std::path::Path;

use serde_json::Value;

use super::Checkpoint;
use super::log::Span;

/// One process, before its configuration is built.
#[derive(Debug, Clone)]
pub struct Process {
    pub resumed_from: Option<u64>,
    pub span: Span,
    /// training_args.bin that this process wrote.
    pub arguments: Option<Value>,
}

/// `…/checkpoint-48` → 48.
pub fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("checkpoint-")?.parse().ok()
}

/// The step a training_args.bin says its process resumed from.
pub fn resumed_step(arguments: &Value) -> Option<u64> {
    step_of(Path::new(arguments.get("resume_from_checkpoint")?.as_str()?))
}

/// Assigns checkpoints to the processes that wrote them and finds what each process resumed from.
///
/// `spans` and `arguments` (per checkpoint, `None` where unreadable) as read; `final_arguments`: training_args.bin of
/// the output folder, which the last process wrote when it ended; `last_resume`: what the configuration says;
/// `spacing`: logging_steps.
pub fn reconstruct(
    spans: Vec<Span>,
    checkpoints: &mut [Checkpoint],
    arguments: &[Option<Value>],
    final_arguments: Option<&Value>,
    last_resume: Option<u64>,
    spacing: u64,
) -> Vec<Process> {
    let spans = if spans.is_empty() { vec![Span::default()] } else { spans };
    let count = spans.len();
    let steps: Vec<u64> = checkpoints.iter().map(|c| c.step).collect();
    let mut processes: Vec<Process> = spans
        .into_iter()
        .enumerate()
        .map(|(index, span)| {
            // The first process of a folder is fresh unless its first row comes too late.
            let resumed_from = resume_before(&span, &steps, spacing, index > 0);
            Process { resumed_from, span, arguments: None }
        })
        .collect();
    for (checkpoint, arguments) in checkpoints.iter_mut().zip(arguments) {
        checkpoint.attempt = writer(&processes, checkpoint.step, spacing);
        if let (Some(process), Some(arguments)) = (processes.get_mut(checkpoint.attempt), arguments) {
            process.arguments = Some(arguments.clone());
        }
    }
    if let Some(last) = processes.last_mut()
        && (checkpoints.is_empty() || last.arguments.is_none() && count == 1)
    {
        last.arguments = final_arguments.cloned();
    }
    for (index, process) in processes.iter_mut().enumerate() {
        let said = process.arguments.as_ref().and_then(resumed_step);
        let said = said.or(last_resume.filter(|_| index + 1 == count));
        let first = process.span.first_step();
        // Believed only where the log agrees: its first row is the first one after that checkpoint.
        if let Some(step) = said.filter(|&step| step < first && first <= step + spacing) {
            process.resumed_from = Some(step);
        }
    }
    processes
}

/// The checkpoint just before a span's first row; `later`: earlier processes exist, so a resume is likely.
fn resume_before(span: &Span, checkpoints: &[u64], spacing: u64, later: bool) -> Option<u64> {
    let first = span.first_step();
    if span.rows.is_empty() || first <= 1 {
        return None;
    }
    let oldest = first.saturating_sub(spacing);
    let fits = |&&step: &&u64| step < first && step >= oldest && step > 0;
    if first <= spacing && !later {
        // The first row of a fresh start, at the end of the first logging window.
        return None;
    }
    checkpoints
        .iter()
        .rev()
        .find(fits)
        .copied()
        .or((oldest > 0).then_some(first - 1).filter(|_| spacing == 1))
        .or((oldest > 0).then_some(oldest))
}

/// The last process that passed this step. A row may lag behind a checkpoint by a logging window.
fn writer(processes: &[Process], step: u64, spacing: u64) -> usize {
    let wrote = |p: &Process| {
        let start = p.resumed_from.unwrap_or(0);
        start < step && step < p.span.last_step() + spacing
    };
    processes.iter().rposition(wrote).unwrap_or(processes.len().saturating_sub(1))
}
