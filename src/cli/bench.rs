//! `spikeprobe bench`: which precision is safe for a run on this device.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::Common;
use crate::bench::{self, Options, PRECISIONS};
use crate::report::terminal::Style;
use crate::sweep::replayed::start;
use crate::{Error, Result, output};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
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

/// Measures and prints.
///
/// # Errors
/// When the run cannot be read or replayed.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let replayer = common.open_replayer(&args.run, &[])?;
    let chosen =
        |name: &&&str| args.precision.is_empty() || **name == "fp32" || args.precision.iter().any(|p| p == **name);
    let options = Options {
        from: start(&args.from)?.0,
        steps: args.steps,
        precisions: PRECISIONS.iter().filter(chosen).map(|name| (*name).to_owned()).collect(),
    };
    let shown = !common.quiet && output::progress();
    let bench = bench::run(&replayer, &options, &|what| {
        if shown {
            output::status(what);
        }
    })?;
    if shown {
        output::status("");
    }
    if let Some(path) = &args.html {
        output::write_text(path, &bench.html())?;
    }
    common.print(&bench.terminal(Style::stdout()))?;
    let json = serde_json::to_value(&bench).map_err(|e| Error::internal(format!("JSON: {e}")))?;
    common.write_json(&json)
}
