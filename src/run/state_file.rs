//! trainer_state.json and trainer_log.jsonl, each as it lies on disk (contract 8).
//!
//! One file → its rows. Merging them and cutting them into attempts is in `log.rs` and `attempts.rs`.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::EvalRow;
use super::json::float;
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
        let value = super::json::parse(&text).map_err(|e| {
            Error::input(format!("invalid JSON: {e}"))
                .at_path(path)
                .next("the trainer was stopped while it wrote this file; take the copy in the last checkpoint")
        })?;
        let whole = |key: &str| value.get(key).and_then(Value::as_u64);
        let mut state = Self {
            global_step: whole("global_step").unwrap_or(0),
            max_steps: whole("max_steps"),
            num_train_epochs: value.get("num_train_epochs").and_then(float),
            epoch: value.get("epoch").and_then(float),
            train_batch_size: whole("train_batch_size"),
            has_best_global_step: value.get("best_global_step").is_some(),
            ..Self::default()
        };
        let history = value.get("log_history").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        for (index, entry) in history.iter().enumerate() {
            let source = format!("{}: log_history[{index}]", path.display());
            match entry.get("step").and_then(Value::as_u64) {
                Some(step) => state.add(step, entry, source),
                None => state.unreadable.push((source, "an entry without a step".to_owned())),
            }
        }
        Ok(state)
    }

    fn add(&mut self, step: u64, entry: &Value, source: String) {
        let number = |key: &str| entry.get(key).and_then(float);
        if let Some(metrics) = eval_metrics(entry) {
            self.eval_rows.push(EvalRow { step, epoch: number("epoch"), metrics });
        }
        // The last row (train_runtime, train_loss) is a summary, no step.
        if entry.get("loss").is_some() {
            self.rows.push(FileRow {
                step,
                epoch: number("epoch"),
                loss: number("loss"),
                grad_norm: number("grad_norm"),
                learning_rate: number("learning_rate"),
                total_steps: self.max_steps,
                elapsed: None,
                source,
            });
        }
    }
}

/// Every `eval_*` number of a row; `None` when it has none.
fn eval_metrics(entry: &Value) -> Option<BTreeMap<String, f64>> {
    let metrics: BTreeMap<String, f64> = entry
        .as_object()?
        .iter()
        .filter(|(key, _)| key.starts_with("eval_"))
        .filter_map(|(key, value)| Some((key.clone(), float(value)?)))
        .collect();
    (!metrics.is_empty()).then_some(metrics)
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
        let bytes = std::fs::read(path).map_err(|e| Error::input(e.to_string()).at_path(path))?;
        let name = path.display().to_string();
        let mut log = Self::default();
        for (index, line) in bytes.split(|&b| b == b'\n').enumerate() {
            let line = String::from_utf8_lossy(line);
            if !line.trim().is_empty() {
                log.push(line.trim(), format!("{name}:{}", index + 1));
            }
        }
        Ok(log)
    }

    /// Takes one line of the file; `source` is its place.
    pub fn push(&mut self, line: &str, source: String) {
        let entry = match super::json::parse(line) {
            Ok(entry) => entry,
            Err(e) => return self.unreadable.push((source, format!("no JSON: {e}"))),
        };
        let Some(step) = entry.get("current_steps").and_then(Value::as_u64) else {
            return self.unreadable.push((source, "no current_steps".to_owned()));
        };
        let number = |key: &str| entry.get(key).and_then(float);
        if let Some(metrics) = eval_metrics(&entry) {
            self.eval_rows.push(EvalRow { step, epoch: number("epoch"), metrics });
        }
        if entry.get("loss").is_some() {
            self.rows.push(FileRow {
                step,
                epoch: number("epoch"),
                loss: number("loss"),
                grad_norm: None,
                learning_rate: number("lr"),
                total_steps: entry.get("total_steps").and_then(Value::as_u64),
                elapsed: entry.get("elapsed_time").and_then(Value::as_str).and_then(seconds),
                source,
            });
        }
    }
}

/// Python's `str(timedelta)`: `H:MM:SS` or `D days, H:MM:SS`.
fn seconds(text: &str) -> Option<u64> {
    let (days, clock) = match text.split_once(", ") {
        Some((days, clock)) => (days.split(' ').next()?.parse::<u64>().ok()?, clock),
        None => (0, text),
    };
    let mut parts = clock.split(':').map(|p| p.parse::<u64>().ok());
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    days.checked_mul(86_400)?.checked_add(h.checked_mul(3600)?)?.checked_add(m.checked_mul(60)?)?.checked_add(s)
}
