//! What went wrong at a resume (contract 7.3, 7.4, 15.3).

use super::{Code, Finding, Severity};
use crate::run::{Attempt, LogRow, ResumeOrder, Run};

pub fn findings(run: &Run) -> Vec<Finding> {
    let mut found = Vec::new();
    if run.attempts.len() > 1 {
        let list: Vec<String> = run.attempts.iter().map(describe).collect();
        found.push(Finding::new(
            Code::AppendedAttempts,
            Severity::Note,
            run.path(&run.config.output_dir).join("trainer_log.jsonl").display().to_string(),
            format!("the log holds {} processes one after the other: {}", run.attempts.len(), list.join("; ")),
        ));
    }
    for (index, attempt) in run.attempts.iter().enumerate() {
        let Some(from) = attempt.resumed_from else { continue };
        let first = run.log.rows.iter().find(|r| r.attempt == index);
        let place = first.map_or_else(|| run.place("resume_from_checkpoint"), |r| r.source.clone());
        found.extend(lost_state(run, index, from, &place));
        found.extend(other_total(run, index, &place));
        found.extend(wrong_rows(run, index, from, &place));
    }
    found
}

fn describe(attempt: &Attempt) -> String {
    let steps = format!("steps {}–{}", attempt.first_step, attempt.last_step);
    match attempt.resumed_from {
        Some(step) => format!("{steps} from checkpoint-{step}"),
        None => format!("{steps} from the start"),
    }
}

/// The proofs that a resume began with fresh optimizer moments; empty where there is none.
pub fn proofs_of_lost_state(run: &Run, index: usize) -> Vec<String> {
    let Some(from) = run.attempts.get(index).and_then(|a| a.resumed_from) else { return Vec::new() };
    let mut proofs = Vec::new();
    if let Some(start) = run.checkpoints.iter().find(|c| c.step == from) {
        match (start.has_optimizer, start.has_scheduler) {
            (false, false) => proofs.push(format!("checkpoint-{from} holds neither optimizer.pt nor scheduler.pt")),
            (false, true) => proofs.push(format!("checkpoint-{from} holds no optimizer.pt")),
            (true, false) => proofs
                .push(format!("checkpoint-{from} holds no scheduler.pt, and without it optimizer.pt is ignored, too")),
            (true, true) => {}
        }
    }
    // Adam counts its updates: a later checkpoint of this attempt that counts from the resume started afresh.
    let later = run.checkpoints.iter().find(|c| c.attempt == index && c.step > from && c.has_optimizer);
    if let Some(later) = later
        && let Ok(Some(count)) = later.update_count()
        && count <= (later.step - from) as f64
    {
        proofs.push(format!("Adam has counted {count} updates at checkpoint-{}", later.step));
    }
    if let Some((before, first)) = around(&run.log.rows, index)
        && first.learning_rate == Some(0.0)
        && before.learning_rate.is_some_and(|lr| lr > 0.0)
        && before.step + 1 == first.step
        && !last_of_schedule(before)
    {
        proofs.push(format!("the learning rate starts over from 0 at step {}", first.step));
    }
    proofs
}

/// The schedule's own end: a learning rate of 0 afterwards is no restart.
fn last_of_schedule(row: &LogRow) -> bool {
    row.total_steps.is_some_and(|total| row.step >= total)
}

fn around(rows: &[LogRow], attempt: usize) -> Option<(&LogRow, &LogRow)> {
    let at = rows.iter().position(|r| r.attempt == attempt)?;
    Some((rows.get(at.checked_sub(1)?)?, &rows[at]))
}

fn lost_state(run: &Run, index: usize, from: u64, place: &str) -> Option<Finding> {
    let proofs = proofs_of_lost_state(run, index);
    if proofs.is_empty() {
        return None;
    }
    Some(Finding::new(
        Code::ResumeWithoutOptimizer,
        Severity::Error,
        place,
        format!(
            "the resume from checkpoint-{from} started with empty Adam moments and a fresh schedule, and the trainer \
             said nothing: {}; its first updates are far too large in directions that Adam had damped; keep optimizer.pt \
             and scheduler.pt together (save_only_model: false)",
            proofs.join("; ")
        ),
    ))
}

fn other_total(run: &Run, index: usize, place: &str) -> Option<Finding> {
    let (now, before) = (run.attempts.get(index)?, run.attempts.get(index.checked_sub(1)?)?);
    let (new, old) = (now.total_steps?, before.total_steps?);
    if new == old {
        return None;
    }
    let jump = around(&run.log.rows, index).and_then(|_| {
        let rates: Vec<&LogRow> = run.log.rows.iter().filter(|r| r.attempt == index).take(3).collect();
        let (low, high) = (rates.first()?.learning_rate?, rates.get(1)?.learning_rate?);
        (high > low * 2.0).then(|| format!("; here it jumps from {low:e} to {high:e} at step {}", rates[1].step))
    });
    Some(Finding::new(
        Code::ResumeOtherTotal,
        Severity::Warning,
        place,
        format!(
            "resumed with total_steps {new} instead of {old}: the schedule is stretched, so that the learning rate does \
             not go on where it was{}; start a new schedule with a lower learning_rate instead",
            jump.unwrap_or_default()
        ),
    ))
}

/// A resume inside an epoch ≥ 1 with a pair of versions that gets the order wrong, or with a partial last window.
fn wrong_rows(run: &Run, index: usize, from: u64, place: &str) -> Vec<Finding> {
    let epoch = run.log.rows.iter().rev().find(|r| r.attempt < index && r.step == from).and_then(|r| r.epoch);
    let Some(epoch) = epoch.or_else(|| run.checkpoint(from).ok()?.trainer_state().ok()?.epoch) else {
        return Vec::new();
    };
    let inside = (epoch - epoch.round()).abs() > 1e-6;
    let mut found = Vec::new();
    if inside && epoch > 1.0 && run.semantics.resume_order == ResumeOrder::EpochZero && !run.config.disable_shuffling {
        found.push(Finding::new(
            Code::ResumeOrder,
            Severity::Error,
            place,
            format!(
                "resumed at epoch {epoch:.3} with transformers {} and accelerate {}: this pair goes through the rest of \
                 the epoch in the order of epoch 0, so rows are seen twice or never; resume at an epoch boundary, or use \
                 accelerate {}",
                version(run.versions.transformers.as_ref()),
                version(run.versions.accelerate.as_ref()),
                if run.versions.transformers_at_least(5, 0) { "≥ 1.7" } else { "≤ 1.5.2" }
            ),
        ));
    }
    let batches = super::bookkeeping::batches_per_epoch(&run.log.rows, run.config.gradient_accumulation_steps);
    let rest = batches.is_some_and(|b| b % run.config.gradient_accumulation_steps as f64 != 0.0);
    if inside && rest && run.semantics.resume_restarts_count {
        found.push(Finding::new(
            Code::ResumePosition,
            Severity::Warning,
            place,
            format!(
                "resumed at epoch {epoch:.3}, and an epoch's batches are no multiple of gradient_accumulation_steps: this \
                 transformers version counts micro-batches from 0 after a resume, so that the epoch's last window never \
                 closes and leaks into the next epoch"
            ),
        ));
    }
    found
}

fn version(known: Option<&(crate::run::Version, String)>) -> String {
    known.map_or_else(|| "(unknown)".into(), |(v, _)| v.to_string())
}
