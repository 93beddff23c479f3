//! `spikeprobe replay`: re-run the optimizer steps of a run and hold them against its log.

use std::path::PathBuf;

use clap::Args as ClapArgs;

use super::Common;
use crate::{Error, Result};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
}

/// Replays and prints.
///
/// # Errors
/// When the run cannot be read or replayed.
pub fn run(args: &Args, _common: &Common) -> Result<()> {
    Err(Error::internal("not built yet").at_path(&args.run))
}
