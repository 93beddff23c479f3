//! Traces and certificates as other programs read them (design.md section 4, schema `spikeprobe.replay/1`).

use serde_json::{Map, Value, json};

use super::{Band, Certificate, MicroRecord, Reproduction, Start, StepRecord, Trace};
use crate::batches::{Corpus, RowId};
use crate::report::json::{number, optional};
use crate::run::LogRow;

/// Version of the layout below; additions are free, changes bump the number.
pub const SCHEMA: &str = "spikeprobe.replay/1";

/// The whole result of `spikeprobe replay`. `complete`: false when Ctrl-C or a failure cut it short.
pub fn trace_json(trace: &Trace, certificate: &Certificate, rows: &[LogRow], corpus: &Corpus, complete: bool) -> Value {
    let steps: Vec<Value> = trace
        .steps
        .iter()
        .map(|s| {
            let logged = rows.iter().find(|r| r.attempt == s.attempt && r.step == s.step);
            let mut step = step_json(s, logged, corpus);
            let comparison = certificate.comparisons.iter().find(|c| c.step == s.step && logged.is_some());
            if let Some(Band { loss, grad_norm }) = comparison.and_then(|c| c.band) {
                let pair = |(low, high)| json!([number(low), number(high)]);
                step["band"] = json!({"loss": pair(loss), "grad_norm": pair(grad_norm)});
            }
            step
        })
        .collect();
    let mut all = json!({
        "schema": SCHEMA,
        "start": start_json(&trace.start),
        "steps": steps,
        "certificate": certificate_json(certificate),
    });
    if !complete {
        all["interrupted"] = Value::Bool(true);
    }
    all
}

fn start_json(start: &Start) -> Value {
    match start {
        Start::Initial => json!({"kind": "initial", "step": 0}),
        Start::Checkpoint(step) => json!({"kind": "checkpoint", "step": step}),
    }
}

/// One step; `logged`: the log's own line of it.
pub fn step_json(step: &StepRecord, logged: Option<&LogRow>, corpus: &Corpus) -> Value {
    let micro_batches: Vec<Value> = step.micro_batches.iter().map(|m| micro_json(m, corpus)).collect();
    json!({
        "step": step.step,
        "attempt": step.attempt,
        "epoch": number(step.epoch),
        "learning_rate": number(step.learning_rate),
        "learning_rate_logged": number(step.learning_rate_logged),
        "loss": number(step.loss),
        "loss_raw": number(step.loss_raw),
        "loss_logged": optional(step.loss_logged),
        "grad_norm": number(step.grad_norm),
        "clip_coefficient": number(step.clip_coefficient),
        "update_norm": number(step.update_norm),
        "loss_scale": optional(step.loss_scale),
        "skipped": step.skipped,
        "nonfinite": step.nonfinite,
        "micro_batches": micro_batches,
        "logged": logged.map_or(Value::Null, logged_json),
    })
}

fn micro_json(micro: &MicroRecord, corpus: &Corpus) -> Value {
    let rows: Vec<Value> = micro.rows.iter().map(|row| row_json(*row, corpus)).collect();
    let mut all = json!({
        "rows": rows,
        "tokens": micro.tokens,
        "label_tokens": micro.label_tokens,
        "loss": number(micro.loss),
        "mean_loss": number(micro.mean_loss),
        "grad_norm": number(micro.grad_norm),
        "nonfinite": micro.nonfinite,
    });
    if micro.leaked {
        all["leaked"] = Value::Bool(true);
    }
    all
}

/// A dataset's name and the row in its file, from 0.
fn row_json(row: RowId, corpus: &Corpus) -> Value {
    let name = corpus.datasets.get(usize::from(row.dataset)).map_or("", |d| d.name.as_str());
    json!({"dataset": name, "row": row.row})
}

fn logged_json(row: &LogRow) -> Value {
    let mut all = Map::new();
    for (key, value) in [("loss", row.loss), ("grad_norm", row.grad_norm), ("learning_rate", row.learning_rate)] {
        if value.is_some() {
            all.insert(key.to_owned(), optional(value));
        }
    }
    if row.window > 1 {
        all.insert("window".to_owned(), row.window.into());
    }
    Value::Object(all)
}

/// The certificate of a replay.
pub fn certificate_json(certificate: &Certificate) -> Value {
    // Without a log nothing was compared, and a zero deviation would claim that it was.
    let compared = |x: f64| if certificate.verdict == Reproduction::NoLog { Value::Null } else { number(x) };
    json!({
        "verdict": certificate.verdict.word(),
        "from": certificate.from,
        "to": certificate.to,
        "departs_at": certificate.departs_at,
        "bump_at": certificate.bump_at,
        "exact_to": certificate.exact_to,
        "loss_max_rel": compared(certificate.loss_max_rel),
        "grad_norm_max_rel": compared(certificate.grad_norm_max_rel),
        "envelope": {
            "loss": number(certificate.envelope.loss),
            "grad_norm": number(certificate.envelope.grad_norm),
        },
    })
}
