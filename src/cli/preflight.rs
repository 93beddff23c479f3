//! `spikeprobe preflight`: look before training starts.
//!
//! Owns what is typed for it and the text for people; the measurements are `inspect::preflight`'s.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::Common;
use crate::Result;
use crate::device::DType;
use crate::inspect::preflight::{Preflight, judge, preflight, to_json};
use crate::inspect::{self, text};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Change a configuration key first; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::replay::parse_setting)]
    pub set: Vec<(String, String)>,
    /// Windows to try at the peak learning rate.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
}

/// Measures and prints.
///
/// # Errors
/// When the run cannot be read or its first windows cannot be computed.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[])?;
    let replayer = common.open_replayer(&args.run, &args.set)?;
    let run = replayer.run();
    let corpus = replayer.corpus();
    let mut findings = inspect::inspect(run);
    findings.extend(inspect::data::findings(run, &corpus.datasets, &corpus.train, &corpus.dropped));
    let flight = preflight(&replayer, args.steps)?;
    findings.extend(judge(&flight, &run.place("learning_rate")));
    inspect::sort(&mut findings);
    let mut out = text::report(run, &findings, None, common.verbose);
    measured(&mut out, &flight, &replayer.device().name());
    common.print(&out)?;
    common.write_json(&to_json(&replayer, &flight, &findings))
}

/// Sites shown.
const MOST_SITES: usize = 6;

fn measured(out: &mut String, flight: &Preflight, device: &str) {
    let data = &flight.data;
    let _ = write!(
        out,
        "\ndata\n  {} rows ({} dropped by the trainer), {} tokens, {} of them predicted; a row has {} tokens in the \
         middle, {} at most\n  {} steps an epoch, {} in all\n\nthe first windows at the peak learning rate {:e}\n",
        data.rows,
        data.dropped,
        data.tokens,
        data.label_tokens,
        data.median,
        data.longest,
        data.steps_per_epoch,
        data.total_steps,
        flight.learning_rate,
    );
    let _ = writeln!(out, "  {:>4} {:>12} {:>12} {:>9} {:>12}", "step", "loss", "grad_norm", "clip", "update");
    for s in &flight.steps {
        let note = match (s.skipped, s.nonfinite) {
            (true, _) => format!("  skipped: fp16 overflow at loss scale {}", s.loss_scale.unwrap_or(0.0)),
            (false, 0) => String::new(),
            (false, n) => format!("  {n} gradient elements are not finite"),
        };
        let _ = writeln!(
            out,
            "  {:>4} {:>12.5} {:>12.4} {:>9.4} {:>12.4e}{note}",
            s.step, s.loss_raw, s.grad_norm, s.clip_coefficient, s.update_norm
        );
    }
    out.push_str("\nlargest values (share of fp16's range, 65504)\n");
    for headroom in flight.headroom.iter().take(MOST_SITES) {
        let dtype = match headroom.dtype {
            DType::F32 => "fp32",
            DType::BF16 => "bf16",
            DType::F16 => "fp16",
        };
        let (max, share) = (headroom.max_abs, 100.0 * headroom.of_fp16());
        let _ = write!(out, "  {max:>9.3e} {share:>8.2} %  {dtype}  {}", headroom.site);
        if headroom.nonfinite > 0 {
            let _ = write!(out, ": {} not finite", headroom.nonfinite);
        }
        out.push('\n');
    }
    cost(out, flight, device);
}

fn cost(out: &mut String, flight: &Preflight, device: &str) {
    let seconds = flight.seconds_per_step * flight.data.total_steps as f64;
    let _ = writeln!(
        out,
        "\ncost\n  {:.2} s a step on this device ({device}): a replay of all {} steps takes about {}",
        flight.seconds_per_step,
        flight.data.total_steps,
        duration(seconds)
    );
    // PyTorch keeps of each LoRA element weight, gradient and two moments, all f32.
    let _ = writeln!(
        out,
        "  base weights {}, {} trainable parameters with gradient and Adam's moments {}; activations come on top",
        bytes(flight.base_bytes),
        flight.trainable,
        bytes(16 * flight.trainable as u64)
    );
    if let Some(peak) = flight.peak_memory {
        let _ = writeln!(out, "  this preflight took {} of host memory at its peak", bytes(peak));
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

fn bytes(count: u64) -> String {
    match count as f64 / f64::from(1 << 20) {
        mib if mib < 1024.0 => format!("{mib:.1} MiB"),
        mib => format!("{:.1} GiB", mib / 1024.0),
    }
}
