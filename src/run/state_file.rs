//! trainer_state.json and trainer_log.jsonl, each as it lies on disk (contract 8).
//!
//! One file → its rows. Merging them and cutting them into attempts is in `log.rs` and `attempts.rs`.

use std::path::Path;

use rayon::prelude::*;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny};

use super::EvalRow;
use super::entry::{Entry, Scalar};
use crate::{Error, Result};

/// One training row of either file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FileRow {
    pub step: u64,
    pub epoch: Option<f64>,
    pub loss: Option<f64>,
    pub grad_norm: Option<f64>,
    pub learning_rate: Option<f64>,
    pub total_steps: Option<u64>,
    /// Seconds since this process began to train.
    pub elapsed: Option<u64>,
    pub source: String,
}

/// trainer_state.json.
#[derive(Debug, Clone, Default)]
pub struct TrainerState {
    pub global_step: u64,
    pub max_steps: Option<u64>,
    pub num_train_epochs: Option<f64>,
    pub epoch: Option<f64>,
    pub train_batch_size: Option<u64>,
    pub rows: Vec<FileRow>,
    pub eval_rows: Vec<EvalRow>,
    /// A field that came with transformers 4.49.
    pub has_best_global_step: bool,
    /// Entries that are no objects: place and reason.
    pub unreadable: Vec<(String, String)>,
}

impl TrainerState {
    /// Reads trainer_state.json.
    ///
    /// # Errors
    /// Unreadable file or broken JSON.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::input(e.to_string()).at_path(path))?;
        let members: Members = super::json::parse(&text).map_err(|e| {
            Error::input(format!("invalid JSON: {e}"))
                .at_path(path)
                .next("the trainer was stopped while it wrote this file; take the copy in the last checkpoint")
        })?;
        let whole = |member: &Option<Scalar>| member.as_ref().and_then(Scalar::whole);
        let float = |member: &Option<Scalar>| member.as_ref().and_then(Scalar::float);
        let mut state = Self {
            global_step: whole(&members.global_step).unwrap_or(0),
            max_steps: whole(&members.max_steps),
            num_train_epochs: float(&members.num_train_epochs),
            epoch: float(&members.epoch),
            train_batch_size: whole(&members.train_batch_size),
            has_best_global_step: members.best_global_step.is_some(),
            ..Self::default()
        };
        for (index, entry) in members.log_history.into_iter().enumerate() {
            let source = format!("{}: log_history[{index}]", path.display());
            match entry.step {
                Some(step) => state.add(step, entry, source),
                None => state.unreadable.push((source, "an entry without a step".to_owned())),
            }
        }
        Ok(state)
    }

    fn add(&mut self, step: u64, entry: Entry, source: String) {
        // The last row (train_runtime, train_loss) is a summary, no step.
        if entry.is_training {
            self.rows.push(FileRow {
                step,
                epoch: entry.epoch,
                loss: entry.loss,
                grad_norm: entry.grad_norm,
                learning_rate: entry.learning_rate,
                total_steps: self.max_steps,
                elapsed: None,
                source,
            });
        }
        if !entry.metrics.is_empty() {
            self.eval_rows.push(EvalRow { step, epoch: entry.epoch, metrics: entry.metrics });
        }
    }
}

/// The members of trainer_state.json that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Members {
    global_step: Option<Scalar>,
    max_steps: Option<Scalar>,
    num_train_epochs: Option<Scalar>,
    epoch: Option<Scalar>,
    train_batch_size: Option<Scalar>,
    /// Present though null counts.
    #[serde(deserialize_with = "present")]
    best_global_step: Option<IgnoredAny>,
    log_history: Vec<Entry>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<IgnoredAny>, D::Error> {
    IgnoredAny::deserialize(deserializer).map(Some)
}

/// trainer_log.jsonl, in file order.
#[derive(Debug, Clone, Default)]
pub struct TrainerLog {
    pub rows: Vec<FileRow>,
    pub eval_rows: Vec<EvalRow>,
    /// `file:line` and reason.
    pub unreadable: Vec<(String, String)>,
}

impl TrainerLog {
    /// Reads trainer_log.jsonl. Lines that cannot be read (the last one of a stopped trainer) are listed, not fatal.
    ///
    /// # Errors
    /// Unreadable file.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|e| {
            Error::input(format!("the log cannot be read: {e}"))
                .at_path(path)
                .next("check that it is a file that you may read")
        })?;
        let name = path.display().to_string();
        let lines: Vec<(usize, &[u8])> = bytes.split(|&b| b == b'\n').enumerate().collect();
        // A long log's lines on all threads, put together in their order.
        let read = |lines: &[(usize, &[u8])]| {
            let mut log = Self::default();
            for (index, line) in lines {
                let line = String::from_utf8_lossy(line);
                if !line.trim().is_empty() {
                    log.push(line.trim(), format!("{name}:{}", index + 1));
                }
            }
            log
        };
        let parts: Vec<Self> = lines.par_chunks(4096).map(read).collect();
        Ok(parts.into_iter().reduce(Self::followed_by).unwrap_or_default())
    }

    fn followed_by(mut self, next: Self) -> Self {
        self.rows.extend(next.rows);
        self.eval_rows.extend(next.eval_rows);
        self.unreadable.extend(next.unreadable);
        self
    }

    /// Takes one line of the file; `source` is its place.
    pub fn push(&mut self, line: &str, source: String) {
        let entry: Entry = match super::json::parse(line) {
            Ok(entry) => entry,
            Err(e) => return self.unreadable.push((source, format!("no JSON: {e}"))),
        };
        let Some(step) = entry.current_steps else {
            return self.unreadable.push((source, "no current_steps".to_owned()));
        };
        if entry.is_training {
            self.rows.push(FileRow {
                step,
                epoch: entry.epoch,
                loss: entry.loss,
                grad_norm: None,
                learning_rate: entry.learning_rate,
                total_steps: entry.total_steps,
                elapsed: entry.elapsed,
                source,
            });
        }
        if !entry.metrics.is_empty() {
            self.eval_rows.push(EvalRow { step, epoch: entry.epoch, metrics: entry.metrics });
        }
    }
}
