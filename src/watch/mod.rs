//! Following a live log: what is new, whether it is a spike, and keeping the evidence.
//!
//! Reads the trainer's files and never writes to its folder. What counts as a spike is `diagnosis::detect`'s.

mod keeper;
mod tail;

use std::collections::HashSet;

use serde::Serialize;

pub use keeper::Keeper;
pub use tail::Tail;

use crate::diagnosis::detect::{Context, spikes};
use crate::run::LogRow;
use crate::run::state_file::{FileRow, TrainerLog};

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
}

/// The state of one watched log.
#[derive(Debug, Default)]
pub struct Watch {
    rows: Vec<LogRow>,
    told: HashSet<u64>,
    attempt: usize,
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

    /// The log starts over.
    pub fn restart(&mut self) -> Event {
        self.rows.clear();
        self.told.clear();
        Event::Restarted
    }

    /// Losses so far, for a curve.
    pub fn losses(&self) -> impl Iterator<Item = (u64, f64)> {
        self.rows.iter().filter_map(|r| Some((r.step, r.loss?)))
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

    fn new_spikes(&mut self) -> Vec<Event> {
        let recent = &self.rows[self.rows.len().saturating_sub(RECENT)..];
        let Some(last) = recent.last().map(|r| r.step) else { return Vec::new() };
        // Only an episode that reaches the newest row is news; where its onset moves, it is still the same one.
        let found = spikes(recent, &Context::default());
        let fresh = found.into_iter().filter(|f| f.until >= last || f.step == last);
        let mut events = Vec::new();
        for spike in fresh {
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
