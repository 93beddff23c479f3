//! trainer_log.jsonl and trainer_state.json merged into one [`Log`], and cut where a new process began.
//!
//! trainer_log.jsonl is appended by every process, so earlier attempts live only there; grad_norm lives only in
//! trainer_state.json (contract 7.3, 8). Who resumed from what is decided in `attempts.rs`.

use std::collections::HashMap;

use super::state_file::{FileRow, TrainerLog, TrainerState};
use super::{EvalRow, Log, LogRow};

/// Rows of one process, in file order.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Span {
    pub rows: Vec<FileRow>,
}

impl Span {
    pub fn first_step(&self) -> u64 {
        self.rows.first().map_or(1, |r| r.step)
    }
    pub fn last_step(&self) -> u64 {
        self.rows.last().map_or(0, |r| r.step)
    }
    pub fn total_steps(&self) -> Option<u64> {
        self.rows.iter().rev().find_map(|r| r.total_steps)
    }
}

/// Rows of both files, process by process, with grad_norm wherever a state file knows it.
///
/// `states`: the output folder's own first, then the checkpoints', newest first.
pub fn spans(log: Option<&TrainerLog>, states: &[&TrainerState]) -> Vec<Span> {
    let newest = states.first().map(|s| s.rows.as_slice()).unwrap_or_default();
    let logged = log.map(|l| l.rows.as_slice()).unwrap_or_default();
    if logged.is_empty() {
        return split(newest);
    }
    let mut spans = split(logged);
    fill_grad_norm(&mut spans, states);
    // A run that went on from another folder's checkpoint: its past is only in the state file.
    let first = spans.iter().map(Span::first_step).min().unwrap_or(1);
    let past: Vec<FileRow> = newest.iter().filter(|r| r.step < first).cloned().collect();
    if !past.is_empty() {
        spans.insert(0, Span { rows: past });
    }
    let last = spans.iter().map(Span::last_step).max().unwrap_or(0);
    if let Some(span) = spans.last_mut() {
        span.rows.extend(newest.iter().filter(|r| r.step > last).cloned());
    }
    spans
}

/// A new process began where the step does not advance, total_steps changes, or the clock goes back.
fn split(rows: &[FileRow]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for row in rows {
        let before = spans.last().and_then(|s| s.rows.last());
        let begins = before.is_none_or(|before| {
            row.step <= before.step
                || matches!((before.total_steps, row.total_steps), (Some(a), Some(b)) if a != b)
                || matches!((before.elapsed, row.elapsed), (Some(a), Some(b)) if b < a)
        });
        if begins {
            spans.push(Span::default());
        }
        if let Some(span) = spans.last_mut() {
            span.rows.push(row.clone());
        }
    }
    spans
}

/// Cuts the span that a resume from `step` lies in the middle of.
pub fn split_at_resume(spans: &mut Vec<Span>, step: u64) {
    let Some(last) = spans.last_mut() else { return };
    let at = last.rows.partition_point(|r| r.step <= step);
    if at > 0 && at < last.rows.len() {
        let rows = last.rows.split_off(at);
        spans.push(Span { rows });
    }
}

/// A row belongs to a state file's history if step, loss and learning rate are the same: a state file of another
/// attempt has other losses.
fn fill_grad_norm(spans: &mut [Span], states: &[&TrainerState]) {
    let key = |r: &FileRow| (r.step, r.loss.map(f64::to_bits), r.learning_rate.map(f64::to_bits));
    let mut known: HashMap<_, (Option<f64>, Option<f64>)> = HashMap::new();
    for row in states.iter().flat_map(|s| &s.rows) {
        known.entry(key(row)).or_insert((row.grad_norm, row.epoch));
    }
    for row in spans.iter_mut().flat_map(|s| &mut s.rows) {
        if let Some((grad_norm, epoch)) = known.get(&key(row)) {
            row.grad_norm = *grad_norm;
            row.epoch = row.epoch.or(*epoch);
        }
    }
}

/// The log of a run. `starts`: per span, the step its process began at (0, or the checkpoint it resumed from).
pub fn assemble(spans: &[Span], starts: &[u64], log: Option<&TrainerLog>, state: Option<&TrainerState>) -> Log {
    let mut rows = Vec::new();
    for (attempt, (span, &start)) in spans.iter().zip(starts).enumerate() {
        let mut before = start;
        for row in &span.rows {
            rows.push(LogRow {
                attempt,
                step: row.step,
                window: row.step.saturating_sub(before).max(1),
                epoch: row.epoch,
                loss: row.loss,
                grad_norm: row.grad_norm,
                learning_rate: row.learning_rate,
                total_steps: row.total_steps,
                source: row.source.clone(),
            });
            before = row.step;
        }
    }
    let mut unreadable: Vec<_> = log.map(|l| l.unreadable.clone()).unwrap_or_default();
    unreadable.extend(state.into_iter().flat_map(|s| s.unreadable.clone()));
    Log {
        total_steps: spans.last().and_then(Span::total_steps).or(state.and_then(|s| s.max_steps)),
        eval_rows: eval_rows(log, state),
        eval_rows_of_trainer_log: log.map_or(0, |l| l.eval_rows.len()),
        has_trainer_log: log.is_some(),
        has_trainer_state: state.is_some(),
        rows,
        unreadable,
    }
}

/// The state file knows every metric; steps that only trainer_log.jsonl has come from there.
fn eval_rows(log: Option<&TrainerLog>, state: Option<&TrainerState>) -> Vec<EvalRow> {
    let mut rows: Vec<EvalRow> = state.map(|s| s.eval_rows.clone()).unwrap_or_default();
    for row in log.into_iter().flat_map(|l| &l.eval_rows) {
        if !rows.iter().any(|r| r.step == row.step) {
            rows.push(row.clone());
        }
    }
    rows.sort_by_key(|r| r.step);
    rows
}
