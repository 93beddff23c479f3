//! `spikeprobe watch`: follow a live log, warn early, keep the evidence.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args as ClapArgs;

use super::Common;
use crate::report::terminal::Style;
use crate::run::Checkpoint;
use crate::run::state_file::TrainerState;
use crate::watch::screen::{View, describe, render};
use crate::watch::{Event, Gpus, Keeper, Tail, Watch};
use crate::{Error, Result, interrupt, output};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Output folder of a training that runs (output_dir).
    #[arg(value_name = "OUTPUT_DIR")]
    pub output_dir: PathBuf,
    /// Copy the two newest checkpoints here before save_total_limit deletes them; after a spike they stay, and the
    /// next two join them.
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

/// Watches until Ctrl-C. On a terminal the curves are redrawn; elsewhere each event is a line. `--json -` writes one
/// event a line as it happens, `--json FILE` all events so far.
///
/// # Errors
/// When the folder does not exist, the log cannot be read, or evidence cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[])?;
    if !args.output_dir.is_dir() {
        return Err(Error::input("no such folder")
            .at_path(&args.output_dir)
            .next("give the output_dir of the training"));
    }
    let mut session = Session::new(args)?;
    loop {
        let events = session.look()?;
        for event in &events {
            react(args, event, common);
        }
        session.events.extend(events.iter().cloned());
        session.show(args, common, &events)?;
        if args.once {
            return Ok(());
        }
        pause(Duration::from_secs(args.every))?;
    }
}

/// Sleeps, and wakes for Ctrl-C.
fn pause(time: Duration) -> Result<()> {
    let end = Instant::now() + time;
    while Instant::now() < end {
        interrupt::check()?;
        std::thread::sleep(Duration::from_millis(100).min(time));
    }
    interrupt::check()
}

struct Session {
    output_dir: PathBuf,
    tail: Tail,
    watch: Watch,
    keeper: Option<Keeper>,
    gpus: Gpus,
    events: Vec<Event>,
    /// The curves are drawn.
    drawn: bool,
}

impl Session {
    fn new(args: &Args) -> Result<Self> {
        Ok(Self {
            output_dir: args.output_dir.clone(),
            tail: Tail::new(&args.output_dir.join("trainer_log.jsonl")),
            watch: Watch::default(),
            keeper: args.keep_evidence.as_deref().map(|to| Keeper::new(&args.output_dir, to)).transpose()?,
            gpus: Gpus::open(),
            events: Vec::new(),
            drawn: false,
        })
    }

    fn look(&mut self) -> Result<Vec<Event>> {
        let news = self.tail.read()?;
        let mut events: Vec<Event> = Vec::new();
        if news.restarted {
            events.push(self.watch.restart());
        }
        events.extend(self.watch.lines(&news.lines));
        events.extend(self.norms());
        events.extend(self.gpus.look());
        if let Some(keeper) = &mut self.keeper {
            if events.iter().any(|e| matches!(e, Event::Spike { .. })) {
                keeper.freeze();
            }
            let mut copied = keeper.look()?;
            if keeper.waits() {
                // A trainer with save_total_limit: 1 deletes the older one soon after it saved the next.
                std::thread::sleep(Duration::from_millis(200));
                copied.extend(keeper.look()?);
            }
            events.extend(copied.into_iter().map(|checkpoint| Event::Kept { checkpoint }));
        }
        Ok(events)
    }

    /// Gradient norms of a checkpoint that is new; one that is half written or deleted meanwhile is read next time.
    fn norms(&mut self) -> Vec<Event> {
        let newest = Checkpoint::list(&self.output_dir).unwrap_or_default().into_iter().max_by_key(|c| c.step);
        let Some(newest) = newest.filter(|c| c.step > self.watch.normed()) else { return Vec::new() };
        match TrainerState::read(&newest.dir.join("trainer_state.json")) {
            Ok(state) => self.watch.norms(&state, newest.has_scaler),
            Err(_) => Vec::new(),
        }
    }

    fn show(&mut self, args: &Args, common: &Common, events: &[Event]) -> Result<()> {
        if common.prints() && output::terminal() {
            let title = args.output_dir.display().to_string();
            let view = View { title: &title, watch: &self.watch, events: &self.events, gpus: self.gpus.readings() };
            let text = render(&view, Style::stdout());
            // Redrawn from the top: home, each line cleared to its end, then everything below.
            let home = if self.drawn { "\u{1b}[H" } else { "\u{1b}[H\u{1b}[2J" };
            output::print(&format!("{home}{}\u{1b}[J", text.replace('\n', "\u{1b}[K\n")))?;
            self.drawn = true;
        } else {
            for event in events {
                common.print(&format!("{}\n", describe(event)))?;
            }
        }
        match &common.json {
            Some(path) if path.as_os_str() == "-" => {
                events.iter().try_for_each(|event| output::print(&format!("{}\n", serde_json::json!(event))))
            }
            _ if events.is_empty() && !args.once => Ok(()),
            _ => common.write_json(&serde_json::json!({"schema": "spikeprobe.watch/1", "events": self.events})),
        }
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
