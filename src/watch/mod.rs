//! Following a live log: what is new, whether it is a spike, and keeping the evidence.
//!
//! Reads the trainer's files and never writes to its folder. What counts as a spike is `diagnosis::detect`'s.

mod gpu;
mod keeper;
pub mod screen;
mod tail;

use std::collections::HashSet;

use serde::Serialize;

pub use gpu::{Gpus, changes};
pub use keeper::Keeper;
pub use tail::Tail;

use crate::diagnosis::SpikeKind;
use crate::diagnosis::detect::{Context, Found, spikes};
use crate::run::LogRow;
use crate::run::state_file::{FileRow, TrainerLog, TrainerState};

/// Rows of the recent past that detection looks at: bounds the work of one new line.
const RECENT: usize = 512;

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "event")]
pub enum Event {
    /// A spike began; `kind` in diagnosis' words.
    Spike { step: u64, kind: String, before: Option<f64>, at: String },
    /// The log was truncated or replaced: another process writes now.
    Restarted,
    /// A line that cannot be read.
    Unreadable { line: String },
    /// A checkpoint was copied.
    Kept { checkpoint: String },
    /// A GPU reported a fault, or is held down by heat or power.
    Gpu { gpu: u32, what: String },
}

/// The state of one watched log.
#[derive(Debug, Default)]
pub struct Watch {
    rows: Vec<LogRow>,
    told: HashSet<u64>,
    attempt: usize,
    /// A checkpoint holds a scaler.pt: fp16 with loss scaling.
    loss_scaling: bool,
    /// Latest checkpoint whose gradient norms were taken over.
    normed: u64,
}

impl Watch {
    /// Takes the lines that were appended and returns what they mean, oldest first.
    pub fn lines(&mut self, lines: &[String]) -> Vec<Event> {
        let mut events = Vec::new();
        for line in lines {
            let mut log = TrainerLog::default();
            log.push(line, "the log".to_owned());
            if let Some((_, reason)) = log.unreadable.first() {
                events.push(Event::Unreadable { line: reason.clone() });
            }
            for row in &log.rows {
                self.push(row);
                events.extend(self.new_spikes());
            }
        }
        events
    }

    /// Takes the gradient norms over from a checkpoint's trainer_state.json: trainer_log.jsonl has none.
    /// `loss_scaling`: the checkpoint holds a scaler.pt.
    pub fn norms(&mut self, state: &TrainerState, loss_scaling: bool) -> Vec<Event> {
        self.loss_scaling |= loss_scaling;
        self.normed = state.global_step;
        for row in &mut self.rows {
            // log_history ascends.
            if let Ok(at) = state.rows.binary_search_by_key(&row.step, |known| known.step) {
                row.grad_norm = row.grad_norm.or(state.rows[at].grad_norm);
            }
        }
        let found = spikes(self.recent(), &self.context());
        let of_norms = |f: &Found| matches!(f.kind, SpikeKind::GradientExplosion | SpikeKind::SkippedStep);
        self.tell(found.into_iter().filter(of_norms).collect())
    }

    /// Step of the latest checkpoint given to [`Watch::norms`].
    pub fn normed(&self) -> u64 {
        self.normed
    }

    /// The log starts over.
    pub fn restart(&mut self) -> Event {
        self.rows.clear();
        self.told.clear();
        Event::Restarted
    }

    /// Rows so far, ascending by step.
    pub fn rows(&self) -> &[LogRow] {
        &self.rows
    }

    fn push(&mut self, row: &FileRow) {
        // A resume repeats steps: what it repeats is history of another attempt.
        if self.rows.last().is_some_and(|last| row.step <= last.step) {
            self.attempt += 1;
            self.rows.retain(|r| r.step < row.step);
            self.told.retain(|&step| step < row.step);
        }
        let before = self.rows.last().map_or(0, |r| r.step);
        self.rows.push(LogRow {
            attempt: self.attempt,
            step: row.step,
            window: row.step.saturating_sub(before).max(1),
            epoch: row.epoch,
            loss: row.loss,
            grad_norm: row.grad_norm,
            learning_rate: row.learning_rate,
            total_steps: row.total_steps,
            source: row.source.clone(),
        });
    }

    fn recent(&self) -> &[LogRow] {
        &self.rows[self.rows.len().saturating_sub(RECENT)..]
    }

    fn context(&self) -> Context {
        // transformers 4.x rounds to four decimals, 5.x does not (contract 5.3): twelve digits show which it is.
        let rounded = |loss: f64| (loss * 1e4 - (loss * 1e4).round()).abs() < 1e-6;
        let rounds_loss = self.recent().iter().filter_map(|r| r.loss).all(rounded);
        Context { loss_scaling: self.loss_scaling, rounds_loss, ..Context::default() }
    }

    fn new_spikes(&mut self) -> Vec<Event> {
        let Some(last) = self.rows.last().map(|r| r.step) else { return Vec::new() };
        // Only an episode that reaches the newest row is news; where its onset moves, it is still the same one.
        let mut found = spikes(self.recent(), &self.context());
        found.retain(|f| f.until >= last || f.step == last);
        self.tell(found)
    }

    /// Those of the spikes that were not told yet.
    fn tell(&mut self, found: Vec<Found>) -> Vec<Event> {
        let mut events = Vec::new();
        for spike in found {
            let known = self.told.iter().any(|&told| told >= spike.step && told <= spike.until);
            if !known && self.told.insert(spike.step) {
                let kind = serde_json::to_value(spike.kind).ok().and_then(|v| v.as_str().map(str::to_owned));
                events.push(Event::Spike {
                    step: spike.step,
                    kind: kind.unwrap_or_default(),
                    before: spike.before,
                    at: format!("{}", spike.at),
                });
            }
        }
        events
    }
}
