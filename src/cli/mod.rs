//! What was typed → what was meant: one file a subcommand, no maths.

use crate::Result;

/// Replays a LoRA fine-tuning run and proves what made its loss spike.
#[derive(Debug, clap::Parser)]
#[command(version, about)]
pub struct Options {}

pub fn run(_options: &Options) -> Result<()> {
    Ok(())
}
