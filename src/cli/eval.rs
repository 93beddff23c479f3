//! `spikeprobe eval`: the eval_loss the log should have had.
//!
//! Owns what is typed for it; the computation is `inspect::evaluate`'s, table and page are `inspect::evaluation_page`'s.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::Common;
use crate::inspect::evaluate::{curve, metric, to_json};
use crate::inspect::evaluation_page::{html, table};
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
    /// Write a page with the curve beside the training loss.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Evaluates and prints.
///
/// # Errors
/// When the run cannot be read, has no evaluation rows, or nothing to evaluate.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[&args.html])?;
    let replayer = common.open_replayer(&args.run, &args.set)?;
    let scene = replayer.scene();
    let progress = !common.quiet && output::progress();
    let mut found = Vec::new();
    let outcome = curve(&replayer, args.every, &mut |point| {
        found.push(point.clone());
        if progress {
            output::status(&format!("step {}: {} {:.4}", point.step, metric(&point.set), point.loss));
        }
    });
    if progress {
        output::status("");
    }
    let (points, cut) = match outcome {
        Ok(points) => (points, None),
        // Ctrl-C, or a damaged checkpoint: the points before it are results all the same.
        Err(e) if !found.is_empty() => (found, Some(e)),
        Err(e) => return Err(e),
    };
    let mut json = to_json(scene, &points);
    if let Some(cut) = cut {
        json["interrupted"] = true.into();
        common.print(&table(scene, &points))?;
        common.write_json(&json)?;
        return Err(cut);
    }
    common.print(&table(scene, &points))?;
    if let Some(path) = &args.html {
        output::write_text(path, &html(scene, &points))?;
        common.remark(&format!("wrote {}", path.display()));
    }
    common.write_json(&json)
}
