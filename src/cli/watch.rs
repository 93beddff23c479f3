//! `spikeprobe watch`: follow a live log, warn early, keep the evidence.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use clap::Args as ClapArgs;

use super::Common;
use crate::watch::{Event, Keeper, Tail, Watch};
use crate::{Error, Result, interrupt};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Output folder of a training that runs (output_dir).
    #[arg(value_name = "OUTPUT_DIR")]
    pub output_dir: PathBuf,
    /// Copy the newest checkpoints here before save_total_limit deletes them; after a spike nothing kept is deleted.
    #[arg(long, value_name = "DIR")]
    pub keep_evidence: Option<PathBuf>,
    /// Run this command on a spike; SPIKEPROBE_STEP and SPIKEPROBE_KIND are set for it.
    #[arg(long, value_name = "CMD")]
    pub exec: Option<String>,
    /// Seconds between looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub every: u64,
    /// Look once at what is there and end.
    #[arg(long)]
    pub once: bool,
}

/// Watches until Ctrl-C.
///
/// # Errors
/// When the folder does not exist, or evidence cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    if !args.output_dir.is_dir() {
        return Err(Error::input("no such folder")
            .at_path(&args.output_dir)
            .next("give the output_dir of the training"));
    }
    let mut tail = Tail::new(&args.output_dir.join("trainer_log.jsonl"));
    let mut watch = Watch::default();
    let mut keeper = args.keep_evidence.as_deref().map(|to| Keeper::new(&args.output_dir, to)).transpose()?;
    let mut all = Vec::new();
    loop {
        let news = tail.read()?;
        let mut events: Vec<Event> = Vec::new();
        if news.restarted {
            events.push(watch.restart());
        }
        events.extend(watch.lines(&news.lines));
        if let Some(keeper) = &mut keeper {
            if events.iter().any(|e| matches!(e, Event::Spike { .. })) {
                keeper.freeze();
            }
            events.extend(keeper.look()?.into_iter().map(|checkpoint| Event::Kept { checkpoint }));
        }
        for event in &events {
            common.print(&format!("{}\n", describe(event)))?;
            react(args, event, common);
        }
        if !events.is_empty() {
            all.extend(events);
            common.write_json(&serde_json::json!({"schema": "spikeprobe.watch/1", "events": all}))?;
        }
        if args.once {
            return Ok(());
        }
        interrupt::check()?;
        std::thread::sleep(Duration::from_secs(args.every));
    }
}

fn describe(event: &Event) -> String {
    match event {
        Event::Spike { step, kind, before, at } => {
            let before = before.map_or("-".to_owned(), |b| format!("{b:.5}"));
            format!("spike at step {step}: {kind}, {before} → {at}")
        }
        Event::Restarted => "the log starts over: another process writes it now".to_owned(),
        Event::Unreadable { line } => format!("a line cannot be read: {line}"),
        Event::Kept { checkpoint } => format!("kept {checkpoint}"),
    }
}

/// Runs `--exec`; a command that fails is a remark, the watch goes on.
fn react(args: &Args, event: &Event, common: &Common) {
    let (Some(command), Event::Spike { step, kind, .. }) = (&args.exec, event) else { return };
    let status = Command::new("sh")
        .arg("-c")
        .arg(command)
        .env("SPIKEPROBE_STEP", step.to_string())
        .env("SPIKEPROBE_KIND", kind)
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => common.remark(&format!("--exec ended with {status}")),
        Err(e) => common.remark(&format!("--exec could not be started: {e}")),
    }
}
