//! `spikeprobe diagnose`: why the loss spiked, with proof.
//!
//! Owns what is typed for it and the summary for people; what is decided is `diagnosis/`'s.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::Common;
use crate::diagnosis::diagnose::{Options, diagnose};
use crate::diagnosis::laboratory::{ReplayLaboratory, Subject};
use crate::diagnosis::{Cause, Confidence, Diagnosis, Experiment};
use crate::{Error, Result};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Explain the spike at this step instead of the highest.
    #[arg(long, value_name = "STEP")]
    pub spike: Option<u64>,
    /// Optimizer steps that experiments may replay beyond the baseline.
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub windows: u64,
    /// Seconds within which experiments may go on beyond --windows.
    #[arg(long, value_name = "S", default_value_t = 20.0)]
    pub seconds: f64,
}

/// Diagnoses and prints.
///
/// # Errors
/// When the run cannot be read.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let replayer = common.open_replayer(&args.run, &[])?;
    let subject = Subject::new(replayer.run(), *replayer.scene().engine.plan(), Some(replayer.corpus()));
    let options = Options {
        spike: args.spike,
        windows: args.windows,
        seconds: args.seconds,
        vocab_size: Some(replayer.scene().engine.config().vocab),
    };
    let diagnosis = diagnose(&subject, &mut ReplayLaboratory { replayer: &replayer }, &options)?;
    common.print(&summary(&diagnosis))?;
    let json = serde_json::to_value(&diagnosis).map_err(|e| Error::internal(format!("diagnosis as JSON: {e}")))?;
    common.write_json(&json)
}

/// Cause, evidence, what to change.
fn summary(diagnosis: &Diagnosis) -> String {
    let verdict = &diagnosis.verdict;
    let mut text = String::new();
    let sure = match verdict.confidence {
        Confidence::Strong => "proved",
        Confidence::Moderate => "likely",
        Confidence::Weak => "open",
    };
    let title = match verdict.cause {
        Cause::None => "nothing wrong".to_string(),
        Cause::Undetermined => "not determined".to_string(),
        cause => cause.word().replace('_', " "),
    };
    let _ = writeln!(text, "CAUSE    {title} ({sure})\n         {}", verdict.summary);
    if !verdict.also_sufficient.is_empty() {
        let words: Vec<_> = verdict.also_sufficient.iter().map(|c| c.word().replace('_', " ")).collect();
        let _ = writeln!(text, "         Also hides it: {}.", words.join(", "));
    }
    for spike in diagnosis.spikes.iter().take(8) {
        let before = spike.before.map_or_else(|| "-".to_string(), |b| format!("{b:.4}"));
        let _ = writeln!(
            text,
            "SPIKE    step {}: {before} → {:.4} ({})",
            spike.step,
            spike.at,
            spike.verdict.cause.word().replace('_', " ")
        );
    }
    if let Some(certificate) = &diagnosis.certificate {
        let line = match certificate.departs_at {
            None => format!("steps {} to {} match the log", certificate.from, certificate.to),
            Some(step) => format!("from step {} on; parts from the log at step {step}", certificate.from),
        };
        let _ = writeln!(text, "REPLAY   {line}");
    }
    for experiment in &diagnosis.experiments {
        let _ = writeln!(text, "TRIED    {}", line(experiment));
    }
    for row in diagnosis.rows.iter().take(20) {
        let _ = writeln!(text, "ROW      {}:{} (step {}): {}", row.dataset, row.row, row.step, row.reason);
    }
    if let Some(fix) = &diagnosis.fix {
        let changes: Vec<String> = fix.changes.iter().map(|(k, v)| format!("{k}: {v}")).collect();
        let _ = writeln!(text, "FIX      {} (replayed {} steps: quiet)", changes.join(", "), fix.checked_steps);
        if let Some(note) = &fix.note {
            let _ = writeln!(text, "         {note}");
        }
    }
    for finding in &diagnosis.findings {
        let _ = writeln!(text, "NOTE     {}", finding.message);
    }
    text
}

fn line(experiment: &Experiment) -> String {
    let outcome = match (experiment.cause, experiment.removed) {
        (None, _) => "",
        (Some(_), true) => ", spike gone",
        (Some(_), false) => ", spike stays",
    };
    format!("{}: height {:.2}{outcome}", experiment.name, experiment.height)
}
