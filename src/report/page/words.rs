//! Causes, kinds and changes in words.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::diagnosis::{Cause, Confidence, Diagnosis, Spike, SpikeKind};
use crate::report::number;

/// The headline of a cause.
pub fn cause_title(cause: Cause) -> &'static str {
    match cause {
        Cause::Hardware => "A hardware fault: a bit flipped",
        Cause::TrainerBookkeeping => "The trainer's own bookkeeping, not the model",
        Cause::MaskedLabels => "A window without a single label",
        Cause::Fp16Overflow => "An fp16 overflow",
        Cause::Bf16Rounding => "Updates lost to bf16 rounding",
        Cause::Data => "Bad rows in the dataset",
        Cause::OptimizerState => "Lost or stale optimizer state",
        Cause::Schedule => "A jump in the learning rate schedule",
        Cause::GradientClipping => "Gradient clipping is off",
        Cause::GradientAccumulation => "Too few samples per update",
        Cause::LearningRate => "The learning rate is too high",
        Cause::Nondeterminism => "The same step does not repeat itself",
        Cause::None => "No spike",
        Cause::Undetermined => "Undetermined",
    }
}

/// `optimizer_state` → `optimizer state`.
pub fn plain(cause: &str) -> String {
    cause.replace('_', " ")
}

pub fn confidence_word(confidence: Confidence) -> &'static str {
    match confidence {
        Confidence::Weak => "weak",
        Confidence::Moderate => "moderate",
        Confidence::Strong => "strong",
    }
}

/// The colour a verdict carries: `bad`, `warn`, `good`.
pub fn tone(diagnosis: &Diagnosis) -> &'static str {
    match diagnosis.verdict.cause {
        Cause::None => "good",
        Cause::Undetermined => "warn",
        _ if diagnosis.verdict.harmful => "bad",
        _ => "warn",
    }
}

/// One line about a spike: where, from what to what.
pub fn spike_line(spike: &Spike) -> String {
    let before = spike.before.map_or(String::new(), |before| format!(" {} →", number(before)));
    match spike.kind {
        SpikeKind::Jump | SpikeKind::Divergence => format!("loss{before} {}", number(spike.at)),
        SpikeKind::GradientExplosion => format!("grad_norm{before} {}", number(spike.at)),
        SpikeKind::Nan => format!("loss{before} {}", number(spike.at)),
        SpikeKind::MaskedNan => format!("loss{before} 0.0, which stands for NaN or for no labels"),
        SpikeKind::SkippedStep => "update skipped: the gradient was not finite".into(),
        SpikeKind::Stall => format!("loss stays at {}", number(spike.at)),
        SpikeKind::Level => format!("the whole log is shifted: {}", number(spike.at)),
    }
}

/// `{learning_rate: 2e-4}` → `learning_rate: 0.0002`.
pub fn changes_line(changes: &BTreeMap<String, Value>) -> String {
    let line = |(key, value): (&String, &Value)| format!("{key}: {}", value_text(value));
    changes.iter().map(line).collect::<Vec<_>>().join(", ")
}

pub fn value_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(n) => n.as_f64().filter(|_| n.is_f64()).map_or_else(|| n.to_string(), number),
        other => other.to_string(),
    }
}

/// What shows the cause, most convincing first.
pub fn evidence(diagnosis: &Diagnosis, baseline_height: Option<f64>) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(fault) = &diagnosis.fault {
        lines.push(fault.message.clone());
    }
    let cause = diagnosis.verdict.cause;
    let decisive = diagnosis.experiments.iter().filter(|e| e.cause == Some(cause) && e.removed);
    if let Some(experiment) = decisive.min_by(|a, b| a.height.total_cmp(&b.height)) {
        lines.push(match baseline_height {
            Some(height) if height > 0.0 && experiment.height.is_finite() => format!(
                "{}: the spike's height falls from {} to {}",
                experiment.name,
                number(height),
                number(experiment.height.max(0.0))
            ),
            _ => format!("{}: the spike is gone", experiment.name),
        });
    }
    lines.extend(diagnosis.rows.iter().take(2).map(|r| format!("{} row {}: {}", r.dataset, r.row, r.reason)));
    lines.extend(diagnosis.sites.iter().take(2).map(|s| format!("{}: {}", s.site, s.message)));
    lines.extend(diagnosis.certificate.as_ref().map(certificate_line));
    lines
}

/// What the replay proved about itself.
pub fn certificate_line(certificate: &crate::diagnosis::CertificateSummary) -> String {
    let span = format!("steps {}–{}", certificate.from, certificate.to);
    let compared = certificate.departs_at != Some(certificate.from);
    let exact = compared && certificate.loss_max_rel == 0.0 && certificate.grad_norm_max_rel == 0.0;
    let agree = if exact { "agree to the last bit" } else { "agree" };
    match (certificate.verdict.as_str(), certificate.departs_at) {
        ("reproduced", _) if exact => format!("Replay and log {agree} over {span}"),
        ("reproduced", _) => format!(
            "Replay and log agree over {span}: loss within {}, grad_norm within {}",
            number(certificate.loss_max_rel),
            number(certificate.grad_norm_max_rel)
        ),
        ("departs", Some(step)) => {
            format!("Replay and log {agree} up to step {} and part at step {step}", step.saturating_sub(1))
        }
        ("no_log", _) => format!("Replayed {span}; there is no log to compare with"),
        (other, _) => format!("Replay of {span}: {}", plain(other)),
    }
}

/// What to do about it, one line a change.
pub fn remedy(diagnosis: &Diagnosis) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(fix) = &diagnosis.fix {
        lines.extend(fix.changes.iter().map(|(key, value)| format!("{key}: {}", value_text(value))));
        lines.push(format!("replayed {} steps with it: height {}", fix.checked_steps, number(fix.height.max(0.0))));
        lines.extend(fix.note.clone());
    }
    if lines.is_empty() {
        lines.push(match diagnosis.verdict.cause {
            Cause::None => "Nothing.".into(),
            Cause::Undetermined => "Nothing yet: see the summary for what to try next.".into(),
            _ if !diagnosis.verdict.harmful => "Nothing: the later loss is as if it had not happened.".into(),
            _ => "No verified change: see the experiments for what removes it.".into(),
        });
    }
    lines
}
