//! Findings for people.

use std::fmt::Write;

use super::compare::{Comparison, resolved};
use super::{Finding, Severity};
use crate::run::{Origin, Run};

/// The whole answer of `spikeprobe inspect` as text. `verbose`: every key, defaults included.
pub fn report(run: &Run, findings: &[Finding], comparison: Option<&Comparison>, verbose: bool) -> String {
    let mut out = String::new();
    header(&mut out, run);
    config(&mut out, run, verbose);
    list(&mut out, findings);
    if let Some(comparison) = comparison {
        compared(&mut out, comparison);
    }
    out
}

fn header(out: &mut String, run: &Run) {
    let _ = writeln!(out, "{}", run.config_path.display());
    for line in run.evidence() {
        let _ = writeln!(out, "  {line}");
    }
    for (index, attempt) in run.attempts.iter().enumerate() {
        let from = attempt.resumed_from.map_or("the start".into(), |step| format!("checkpoint-{step}"));
        let steps = if attempt.last_step == 0 {
            "no step logged".into()
        } else {
            format!("steps {}–{}", attempt.first_step, attempt.last_step)
        };
        let _ = writeln!(out, "  attempt {}: {steps} from {from}", index + 1);
    }
    for remark in &run.remarks {
        let _ = writeln!(out, "  note: {remark}");
    }
}

fn config(out: &mut String, run: &Run, verbose: bool) {
    let _ = writeln!(out, "\nconfiguration in force");
    for (key, value) in resolved(&run.config) {
        let origin = match run.config.origins.get(key) {
            None if !verbose => continue,
            None => "default".to_owned(),
            Some(Origin::Default) => "default".into(),
            Some(Origin::Config) => "as written".into(),
            Some(Origin::Override) => "--set".into(),
            Some(Origin::TrainingArgs) => "training_args.bin".into(),
            Some(Origin::Evidence(text)) => text.clone(),
        };
        let _ = writeln!(out, "  {key:<28} {value:<32} {origin}");
    }
}

fn list(out: &mut String, findings: &[Finding]) {
    if findings.is_empty() {
        let _ = writeln!(out, "\nnothing found");
        return;
    }
    let _ = writeln!(out, "\nfindings");
    for finding in findings {
        let mark = match finding.severity {
            Severity::Error => "error  ",
            Severity::Warning => "warning",
            Severity::Note => "note   ",
        };
        let _ = writeln!(out, "  {mark} {}  [{}]\n    {}", finding.code.word(), finding.place, finding.message);
    }
}

fn compared(out: &mut String, comparison: &Comparison) {
    let _ = writeln!(out, "\nagainst the baseline");
    match comparison.parts_at {
        Some(step) => {
            let _ = writeln!(out, "  the logs part at step {step} ({} steps in common)", comparison.common_steps);
        }
        None => {
            let _ = writeln!(out, "  the logs agree on all {} common steps", comparison.common_steps);
        }
    }
    for d in &comparison.differences {
        let _ = writeln!(out, "  {:<28} {}  (baseline: {})", d.what, d.run, d.baseline);
    }
    if comparison.differences.is_empty() {
        let _ = writeln!(out, "  nothing that decides numbers differs: look at nondeterminism and hardware");
    }
}
