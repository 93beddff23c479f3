//! `spikeprobe preflight`: before training: lint, data, and the first windows at the planned peak learning rate.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args as ClapArgs;
use serde_json::json;

use super::Common;
use crate::inspect::{self, text};
use crate::replay::{Intervention, Silent, Start, StepRecord, step_json};
use crate::{Error, Result};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Windows to try at the peak learning rate.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
}

/// Checks and prints.
///
/// # Errors
/// When the run cannot be read or its first windows cannot be computed.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let replayer = common.open_replayer(&args.run, &[])?;
    let run = replayer.run();
    let mut findings = inspect::inspect(run);
    let corpus = replayer.corpus();
    findings.extend(inspect::data::findings(run, &corpus.datasets, &corpus.train, &corpus.dropped));
    inspect::sort(&mut findings);
    let planned = replayer.scene().last_step();
    let to = args.steps.min(planned);
    if to == 0 {
        return Err(Error::input("the run has no step to try").at_path(&run.config_path));
    }
    // Warmup would hide what the peak does: it is held from the first step on.
    let peak = Intervention::HoldLearningRate { from_step: 1, value: run.config.learning_rate };
    let begun = Instant::now();
    let trace = replayer.replay(&Start::Initial, to, &[peak], &mut Silent)?;
    let seconds = begun.elapsed().as_secs_f64() / trace.steps.len().max(1) as f64;
    let mut out = text::report(run, &findings, None, common.verbose);
    steps(&mut out, &trace.steps, run.config.learning_rate);
    let _ = writeln!(out, "\n{planned} steps are planned; a replay here takes about {seconds:.2} s a step");
    common.print(&out)?;
    common.write_json(&json!({
        "schema": "spikeprobe.preflight/1",
        "findings": findings,
        "planned_steps": planned,
        "seconds_per_step": seconds,
        "steps": trace.steps.iter().map(|s| step_json(s, None, corpus)).collect::<Vec<_>>(),
    }))
}

fn steps(out: &mut String, steps: &[StepRecord], peak: f64) {
    let _ = writeln!(out, "\nthe first windows at the peak learning rate {peak:e}");
    let _ = writeln!(out, "  {:>4} {:>12} {:>12} {:>9} {:>12}", "step", "loss", "grad_norm", "clip", "update");
    for s in steps {
        let note = match (s.skipped, s.nonfinite) {
            (true, _) => "  skipped: fp16 overflow",
            (false, n) if n > 0 => "  gradients are not finite",
            _ => "",
        };
        let _ = writeln!(
            out,
            "  {:>4} {:>12.5} {:>12.4} {:>9.4} {:>12.4e}{note}",
            s.step, s.loss, s.grad_norm, s.clip_coefficient, s.update_norm
        );
    }
}
