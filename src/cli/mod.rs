//! What was typed → what was meant: one file a subcommand, no maths.
//!
//! To add a subcommand: a file with `Args` (what is typed) and `run(&Args, &Common)`, its `mod` line, a variant of
//! [`Command`] and its arm in [`run`].

mod bench;
mod common;
pub mod demo;
mod diagnose;
mod eval;
mod inspect;
mod numerics;
mod preflight;
mod replay;
mod replay_text;
mod sweep;
mod watch;

use clap::{Parser, Subcommand};

pub use common::{Common, DeviceChoice};

use crate::Result;

/// Replays a LoRA fine-tuning run and proves what made its loss spike.
#[derive(Debug, Parser)]
#[command(version, about, arg_required_else_help = true)]
pub struct Options {
    #[command(flatten)]
    pub common: Common,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// What the files of a run show: configuration, versions, log, data, evaluation.
    Inspect(inspect::Args),
    /// The eval_loss the log should have had, per checkpoint.
    Eval(eval::Args),
    /// Before training: lint, data, the first windows at peak learning rate.
    Preflight(preflight::Args),
    Replay(replay::Args),
    Demo(demo::Args),
    /// Replay a grid of learning rates, accumulation steps, precisions: where is it stable, what to set?
    Sweep(sweep::Args),
    /// Why the loss spiked: which change alone takes the spike away, with proof and a fix.
    Diagnose(diagnose::Args),
    /// What this device's arithmetic is, whether it repeats itself, and whether a step of a run can be trusted.
    Numerics(numerics::Args),
    /// Follow a live log, warn early, keep the evidence.
    Watch(watch::Args),
    /// fp16 against bf16 against fp32: which precision is safe for this run, with which loss scale, and why.
    Bench(bench::Args),
}

/// Runs what was typed.
///
/// # Errors
/// Whatever the subcommand could not do; `main` turns it into an exit code.
pub fn run(options: &Options) -> Result<()> {
    let common = &options.common;
    match &options.command {
        Command::Inspect(args) => inspect::run(args, common),
        Command::Eval(args) => eval::run(args, common),
        Command::Preflight(args) => preflight::run(args, common),
        Command::Replay(args) => replay::run(args, common),
        Command::Demo(args) => demo::run(args, common),
        Command::Sweep(args) => sweep::run(args, common),
        Command::Diagnose(args) => diagnose::run(args, common),
        Command::Numerics(args) => numerics::run(args, common),
        Command::Watch(args) => watch::run(args, common),
        Command::Bench(args) => bench::run(args, common),
    }
}
