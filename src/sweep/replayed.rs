//! The [`Trainer`] that replays: cells of a run on a [`Replayer`], and what a sweep must know of the run.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::folder::fingerprint;
use super::grid::Base;
use super::{Cell, Trainer};
use crate::diagnosis::detect;
use crate::model::select;
use crate::replay::{Intervention, Observer, Replayer, Start, StepRecord};
use crate::{Error, Result};

/// Replays cells of one run.
pub struct Replayed<'a> {
    replayer: &'a Replayer,
    finished: AtomicUsize,
}

/// Remembered scenes and states are dropped after this many cells: what cells share is near each other in a grid.
const FORGET_AFTER: usize = 16;

impl<'a> Replayed<'a> {
    pub fn new(replayer: &'a Replayer) -> Self {
        Self { replayer, finished: AtomicUsize::new(0) }
    }

    fn alone(
        &self,
        start: &Start,
        last: u64,
        interventions: &[Intervention],
        watch: &mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut watch = Watch { watch, stopped: false };
        match self.replayer.replay(start, last, interventions, &mut watch) {
            // Stopped by the watcher, not by Ctrl-C, which it looks at itself.
            Err(_) if watch.stopped => Ok(()),
            outcome => outcome.map(|_| ()),
        }
    }

    fn interventions(&self, cell: &Cell) -> Result<Vec<Intervention>> {
        let set = |(key, value): (String, Value)| Intervention::Set { key, value };
        let mut all: Vec<Intervention> = cell.settings().into_iter().map(set).collect();
        if let Some(word) = cell.precision() {
            all.push(Intervention::Precision(self.replayer.run().precision()?.plan.with_arithmetic(word)));
        }
        Ok(all)
    }
}

/// Passes steps on until told to stop.
struct Watch<'w> {
    watch: &'w mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>,
    stopped: bool,
}

impl Observer for Watch<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if (self.watch)(0, record).is_break() {
            self.stopped = true;
            return Err(Error::interrupted());
        }
        Ok(())
    }
}

impl Trainer for Replayed<'_> {
    fn train(&self, cells: &[&Cell], watch: &mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>) -> Result<()> {
        let Some(first) = cells.first() else { return Ok(()) };
        let (start, first) = start(&first.from)?;
        let settings = |cell: &&Cell| {
            let interventions = self.interventions(cell)?;
            let last = self.replayer.scene_for(&interventions)?.last_step().min(first + cell.steps);
            Ok((interventions, last))
        };
        let settings: Vec<(Vec<Intervention>, u64)> = cells.iter().map(settings).collect::<Result<_>>()?;
        let outcome = match &settings[..] {
            // Alone: what earlier cells and files remember is used.
            [(interventions, last)] => self.alone(&start, *last, interventions, watch),
            settings => self.replayer.replay_together(&start, settings, watch),
        };
        let finished = self.finished.fetch_add(cells.len(), Ordering::Relaxed);
        if (finished + cells.len()) / FORGET_AFTER > finished / FORGET_AFTER {
            self.replayer.forget();
        }
        outcome
    }

    /// Σ rank · (in + out) over the adapted linears.
    fn parameters(&self, cell: &Cell) -> Result<u64> {
        let config = &self.replayer.run().config;
        let model = self.replayer.scene().engine.config();
        let rank = cell.axes.get("lora_rank").and_then(Value::as_u64).unwrap_or(config.lora_rank as u64);
        let modules = select(&config.lora_target, model)?;
        let sides = modules.iter().map(|(_, projection)| projection.shape(model)).map(|(fan_in, out)| fan_in + out);
        Ok(rank * sides.sum::<usize>() as u64)
    }

    fn machine(&self) -> String {
        let device = self.replayer.device();
        format!("{}: {}", device.name(), device.fingerprint())
    }
}

/// `initial` or a checkpoint's step → where to start, and the steps before it.
///
/// # Errors
/// Anything else.
pub fn start(from: &str) -> Result<(Start, u64)> {
    if from == "initial" {
        return Ok((Start::Initial, 0));
    }
    match from.trim_start_matches("checkpoint-").parse() {
        Ok(step) => Ok((Start::Checkpoint(step), step)),
        Err(_) => Err(Error::usage(format!("`{from}` is neither initial nor the step of a checkpoint")).at("--from")),
    }
}

/// The run's own values that a grid refers to. `steps`: how many of the run's own updates to cover; all when `None`.
///
/// # Errors
/// A start point behind the end of the run.
pub fn base(replayer: &Replayer, from: &str, steps: Option<u64>) -> Result<Base> {
    let config = &replayer.run().config;
    let (_, first) = start(from)?;
    let left = replayer.scene().last_step().saturating_sub(first);
    Ok(Base {
        learning_rate: config.learning_rate,
        batch: config.per_device_train_batch_size as u64,
        accumulation: config.gradient_accumulation_steps as u64,
        world_size: config.world_size as u64,
        max_steps: config.max_steps,
        steps: steps.map_or(left, |steps| steps.min(left)),
    })
}

/// The run's own setting of every axis key, to mark it in results.
pub fn own(replayer: &Replayer) -> std::collections::BTreeMap<String, Value> {
    let config = &replayer.run().config;
    let mut own = config.written.clone();
    let mut put = |key: &str, value: Value| drop(own.insert(key.into(), value));
    put("learning_rate", json!(config.learning_rate));
    put("gradient_accumulation_steps", json!(config.gradient_accumulation_steps));
    put("per_device_train_batch_size", json!(config.per_device_train_batch_size));
    put("max_grad_norm", json!(config.max_grad_norm));
    put("lora_rank", json!(config.lora_rank));
    put("lora_alpha", json!(config.lora_alpha));
    put("seed", json!(config.seed));
    let precision = match (config.pure_bf16, config.bf16, config.fp16, config.tf32) {
        (true, ..) => "pure_bf16",
        (_, true, ..) => "bf16",
        (_, _, true, _) => "fp16",
        (_, _, _, true) => "tf32",
        _ => "fp32",
    };
    put("precision", json!(precision));
    own
}

/// What spike detection must know of the run.
pub fn context(replayer: &Replayer) -> detect::Context {
    detect::Context {
        loss_scaling: false,
        // Replayed losses are not rounded.
        rounds_loss: false,
        vocab_size: Some(replayer.corpus().vocab_size),
        accumulation: replayer.run().config.gradient_accumulation_steps,
        // Cells differ in it, and one height is to compare them.
        samples: 0,
    }
}

/// Hash of everything of the run that determines a cell's numbers: settings, versions, rows, model, start point.
///
/// # Errors
/// A file of the run that cannot be read.
pub fn run_fingerprint(replayer: &Replayer, from: &str) -> Result<String> {
    let run = replayer.run();
    let mut settings = run.config.written.clone();
    // Where results go changes no number.
    ["output_dir", "overwrite_output_dir", "report_to", "plot_loss", "run_name"]
        .iter()
        .for_each(|k| drop(settings.remove(*k)));
    let settings = serde_json::to_string(&settings).map_err(|e| Error::internal(e.to_string()))?;
    let mut files: Vec<PathBuf> = replayer.corpus().datasets.iter().flat_map(|d| d.files.clone()).collect();
    let model = run.path(&run.config.model_name_or_path);
    files.extend(files_of(&model, &["safetensors", "json"])?);
    if let (Start::Checkpoint(step), _) = start(from)? {
        files.extend(files_of(&run.checkpoint(step)?.dir, &["safetensors", "pt"])?);
    }
    let texts = [
        ("settings", settings),
        ("versions", format!("{:?}", run.versions)),
        ("semantics", format!("{:?}", run.semantics)),
        ("precision", format!("{:?}", run.precision()?.plan)),
    ];
    fingerprint(&texts, &files)
}

fn files_of(dir: &std::path::Path, endings: &[&str]) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| Error::input(format!("cannot be read: {e}")).at_path(dir))?;
    let mut files: Vec<PathBuf> = entries.filter_map(|entry| entry.ok().map(|e| e.path())).collect();
    files.retain(|path| path.is_file() && path.extension().is_some_and(|e| endings.iter().any(|ending| e == *ending)));
    files.sort();
    Ok(files)
}
