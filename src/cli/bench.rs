//! `spikeprobe bench`: which precision is safe for a run on this device.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::{Common, demo};
use crate::bench::{self, Options, PRECISIONS};
use crate::replay::Replayer;
use crate::report::terminal::Style;
use crate::sweep::replayed::start;
use crate::{Error, Result, output};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one [default: the small run that ships
    /// with the program].
    #[arg(value_name = "RUN")]
    pub run: Option<PathBuf>,
    /// Where to start: initial (step 0) or the step of a checkpoint.
    #[arg(long, value_name = "initial|K", default_value = "initial")]
    pub from: String,
    /// Steps to replay in every precision.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: u64,
    /// Precisions to compare [default: fp32,tf32,bf16,fp16,fp16_unscaled,pure_bf16]; fp32 is always among them.
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', value_parser = PRECISIONS)]
    pub precision: Vec<String>,
    /// Write the report as one HTML file.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// Learning rate at which the shipped run has no spike: what diverged would say little of precisions.
const HEALTHY: &str = "4e-4";

/// Measures and prints.
///
/// # Errors
/// When the run cannot be read or replayed.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[&args.html])?;
    match &args.run {
        Some(run) => measure(args, common, common.open_replayer(run, &[])?, None),
        None => {
            let folder = demo::unpacked()?;
            let shipped = Common { root: folder.path().to_owned(), ..common.clone() };
            let healthy = ("learning_rate".to_owned(), HEALTHY.to_owned());
            let replayer = shipped.open_replayer(&folder.path().join(demo::RUN), &[healthy])?;
            measure(args, common, replayer, Some("the run that ships with spikeprobe, without its spike"))
        }
    }
}

/// `name`: what the run is called in results, if not by its path.
fn measure(args: &Args, common: &Common, replayer: Replayer, name: Option<&str>) -> Result<()> {
    let chosen =
        |name: &&&str| args.precision.is_empty() || **name == "fp32" || args.precision.iter().any(|p| p == **name);
    let options = Options {
        from: start(&args.from)?.0,
        steps: args.steps,
        precisions: PRECISIONS.iter().filter(chosen).map(|name| (*name).to_owned()).collect(),
    };
    let shown = !common.quiet && output::progress();
    let mut bench = bench::run(&replayer, &options, &|what| {
        if shown {
            output::status(what);
        }
    })?;
    if shown {
        output::status("");
    }
    if let Some(name) = name {
        bench.run = name.to_owned();
    }
    if let Some(path) = &args.html {
        output::write_text(path, &bench.html())?;
    }
    common.print(&bench.terminal(Style::stdout()))?;
    let json = serde_json::to_value(&bench).map_err(|e| Error::internal(format!("JSON: {e}")))?;
    common.write_json(&json)
}
