//! `spikeprobe demo`: a recorded spike that ships inside the program, replayed and diagnosed.
//!
//! Owns the embedded files and putting them where the other subcommands can read them. The run is a real
//! LLaMA-Factory run in fp32 that continues from another run's adapter: 0.057 → 5.29 in one step.

use clap::{Args as ClapArgs, Parser};

use super::{Common, diagnose, replay};
use crate::{Error, Result, output};

/// Replay and diagnose a recorded spike that ships with the program.
#[derive(Debug, ClapArgs)]
pub struct Args {}

/// A file of the run: path below the root, content.
pub struct Embedded {
    pub path: &'static str,
    pub content: &'static [u8],
}

/// A file of `demo/` under its own path.
macro_rules! file {
    ($path:literal) => {
        Embedded { path: $path, content: include_bytes!(concat!("../../demo/", $path)) }
    };
}

/// Everything the run needs: model, data, log, adapter it continued from, a checkpoint.
pub const FILES: &[Embedded] = &[
    file!("models/tiny-llama-fp32/config.json"),
    file!("models/tiny-llama-fp32/model.safetensors"),
    file!("models/tiny-llama-fp32/tokenizer.json"),
    file!("models/tiny-llama-fp32/tokenizer_config.json"),
    file!("runs/a8-lr-stage2-llama-fp32/data/dataset_info.json"),
    file!("runs/a8-lr-stage2-llama-fp32/data/train.json"),
    file!("runs/a8-lr-stage2-llama-fp32/out/checkpoint-2/adapter_config.json"),
    file!("runs/a8-lr-stage2-llama-fp32/out/checkpoint-2/adapter_model.safetensors"),
    file!("runs/a8-lr-stage2-llama-fp32/out/checkpoint-2/optimizer.pt"),
    file!("runs/a8-lr-stage2-llama-fp32/out/checkpoint-2/scheduler.pt"),
    file!("runs/a8-lr-stage2-llama-fp32/out/checkpoint-2/trainer_state.json"),
    file!("runs/a8-lr-stage2-llama-fp32/out/checkpoint-2/training_args.bin"),
    file!("runs/a8-lr-stage2-llama-fp32/out/trainer_log.jsonl"),
    file!("runs/a8-lr-stage2-llama-fp32/out/trainer_state.json"),
    file!("runs/a8-lr-stage2-llama-fp32/out/training_args.bin"),
    file!("runs/a8-lr-stage2-llama-fp32/train.yaml"),
    file!("runs/k1-healthy-mem-llama-bf16/out/checkpoint-48/adapter_config.json"),
    file!("runs/k1-healthy-mem-llama-bf16/out/checkpoint-48/adapter_model.safetensors"),
];

/// The run's folder below the root.
pub const RUN: &str = "runs/a8-lr-stage2-llama-fp32";
/// Past the spike at step 3 by a few steps.
const TO: &str = "6";

/// The options of another subcommand with their defaults, whatever those are.
#[derive(Parser)]
struct Typed<T: ClapArgs> {
    #[command(flatten)]
    args: T,
}

/// Puts the run into a temporary folder, its root.
///
/// # Errors
/// The folder cannot be made or written.
pub fn unpacked() -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir().map_err(|e| {
        Error::output(format!("cannot make a temporary folder: {e}")).next("check free space and TMPDIR")
    })?;
    for file in FILES {
        let path = folder.path().join(file.path);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|e| Error::output(e.to_string()).at_path(parent))?;
        }
        output::write_file(&path, |out| out.write_all(file.content).map_err(|e| Error::output(e.to_string())))?;
    }
    Ok(folder)
}

/// Replays the run beside its log, then says what made it spike.
///
/// # Errors
/// When the files cannot be put into a temporary folder, or the replay fails.
pub fn run(_: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[])?;
    let folder = unpacked()?;
    let run = folder.path().join(RUN).into_os_string();
    let here = Common { root: folder.path().to_owned(), json: None, ..common.clone() };
    // --json is the diagnosis'; text for people stays off standard output where that is JSON.
    if common.prints() {
        common.print("A recorded LoRA run: its loss went from 0.057 to 5.29 in one step. Its log, replayed:\n\n")?;
        let typed: Typed<replay::Args> = Typed::parse_from(["demo".into(), run.clone(), "--to".into(), TO.into()]);
        replay::run(&typed.args, &here)?;
        common.print("\nWhy:\n\n")?;
    }
    let typed: Typed<diagnose::Args> = Typed::parse_from(["demo".into(), run]);
    diagnose::run(&typed.args, &Common { json: common.json.clone(), ..here })
}
