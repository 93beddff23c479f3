//! `spikeprobe eval`: the eval_loss the log should have had.
//!
//! Owns what is typed for it and the table for people; the computation is `inspect::evaluate`'s.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::Common;
use crate::inspect::evaluate::{Evaluation, curve, metric, to_json};
use crate::{Result, output};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Change a configuration key first, as eval_dataset=NAME for a run that has no evaluation rows; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = super::replay::parse_setting)]
    pub set: Vec<(String, String)>,
    /// Also replay the run and evaluate after every N steps and after the last.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub every: Option<u64>,
}

/// Evaluates and prints.
///
/// # Errors
/// When the run cannot be read, has no evaluation rows, or nothing to evaluate.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let replayer = common.open_replayer(&args.run, &args.set)?;
    let scene = replayer.scene();
    let progress = !common.quiet && output::progress();
    let points = curve(&replayer, args.every, &mut |point| {
        if progress {
            output::status(&format!("step {}: {} {:.4}", point.step, metric(&point.set), point.loss));
        }
    });
    if progress {
        output::status("");
    }
    let points = points?;
    let mut text = String::new();
    for (set, rows) in &scene.corpus.eval {
        let own: Vec<&Evaluation> = points.iter().filter(|point| point.set == *set).collect();
        table(&mut text, set, rows.len(), scene.run.config.per_device_eval_batch_size, &own);
    }
    common.print(&text)?;
    common.write_json(&to_json(scene, &points))
}

fn table(text: &mut String, set: &str, rows: usize, batch: usize, points: &[&Evaluation]) {
    let _ = writeln!(text, "{} over {rows} rows in batches of {batch}", metric(set));
    let _ = writeln!(text, "{:>6} {:>11} {:>11} {:>11}  adapter", "step", "computed", "logged", "deviation");
    for point in points {
        let logged = point.logged.map_or_else(|| "-".into(), |value| format!("{value:.6}"));
        let deviation = point.deviation().map_or_else(|| "-".into(), |value| format!("{value:.1e}"));
        let origin = if point.from_checkpoint { "checkpoint" } else { "replayed" };
        let _ = write!(text, "{:>6} {:>11.6} {logged:>11} {deviation:>11}  {origin}", point.step, point.loss);
        if point.unlabelled_rows > 0 {
            let _ = write!(text, "  ({} rows in batches without a label)", point.unlabelled_rows);
        }
        text.push('\n');
    }
    let finite = points.iter().filter(|point| point.loss.is_finite());
    if let (Some(best), true) = (finite.min_by(|a, b| a.loss.total_cmp(&b.loss)), points.len() > 1) {
        let _ = writeln!(text, "lowest at step {}: {:.6}", best.step, best.loss);
    }
    text.push('\n');
}
