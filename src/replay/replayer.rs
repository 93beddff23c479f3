//! [`Replayer`]: the entrance for experiments. Opens a run once, replays it as often as asked, and remembers states
//! so that replays with a common beginning share it.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::keys::Key;
use super::scene::{Scene, Segment, Shared};
use super::{Intervention, MicroRecord, Start, StepRecord, Trace, start, steps};
use crate::batches::{Corpus, Window};
use crate::device::Device;
use crate::interrupt;
use crate::model::{BaseModel, Engine, Ragged, Row};
use crate::probe::{Measurement, Probes};
use crate::run::Run;
use crate::step::{StepInput, StepOutput, TrainState, step};
use crate::{Error, Result};

/// Where a run lies and what the user said about it.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// Configuration file, or the folder that holds it.
    pub path: PathBuf,
    /// Relative paths of the configuration start here.
    pub root: PathBuf,
    /// `--set key=value`.
    pub overrides: Vec<(String, String)>,
    /// `--versions name=x.y.z`.
    pub versions: Vec<(String, String)>,
    /// Where and how often replays keep states on disk; none: nothing is kept.
    pub cache: Option<Keeping>,
}

/// States kept on disk.
#[derive(Debug, Clone)]
pub struct Keeping {
    pub folder: PathBuf,
    /// Work between two files.
    pub every: Duration,
}

impl Keeping {
    /// In `folder`, whenever [`WORTH_KEEPING`] was spent.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder, every: WORTH_KEEPING }
    }
}

/// Told of every step of a replay.
pub trait Observer {
    /// A step is done (or was found among the remembered ones).
    ///
    /// # Errors
    /// Stops the replay.
    fn step(&mut self, _record: &StepRecord) -> Result<()> {
        Ok(())
    }
    /// How closely the pass of `step` is measured. Anything but off runs the step even if its result is known.
    fn probes(&mut self, _step: u64) -> Probes {
        Probes::Off
    }
    /// What was measured at `step`.
    ///
    /// # Errors
    /// Stops the replay.
    fn measured(&mut self, _step: u64, _measurements: &[Measurement]) -> Result<()> {
        Ok(())
    }
    /// The state after a step, when [`Observer::wants_state`] said so.
    ///
    /// # Errors
    /// Stops the replay.
    fn state(&mut self, _device: &dyn Device, _state: &TrainState) -> Result<()> {
        Ok(())
    }
    /// Whether [`Observer::state`] is to be called after `step`; such a step runs even if its result is known.
    fn wants_state(&mut self, _step: u64) -> bool {
        false
    }
}

/// Observes nothing.
pub struct Silent;

impl Observer for Silent {}

/// Between two remembered states; the steps between are replayed again when an experiment parts there.
const SNAPSHOT_EVERY: u64 = 4;
/// Bytes of remembered states; beyond it the oldest go.
const MEMORY_BUDGET: usize = 1 << 30;
/// Work worth a file: what a shorter replay would save is less than reading it costs in disk and surprise.
pub const WORTH_KEEPING: Duration = Duration::from_secs(20);

/// A run ready to be replayed.
pub struct Replayer {
    source: Source,
    scene: Arc<Scene>,
    shared: Shared,
    memory: Mutex<Memory>,
}

#[derive(Default)]
struct Memory {
    scenes: Vec<(Vec<Intervention>, Arc<Scene>)>,
    records: std::collections::HashMap<Key, StepRecord>,
    states: std::collections::HashMap<Key, TrainState>,
    /// Keys of `states`, oldest first.
    order: std::collections::VecDeque<Key>,
}

impl Replayer {
    /// Reads the run, its rows and its base model.
    ///
    /// # Errors
    /// Anything on disk that is missing, broken or not covered.
    pub fn open(source: Source, device: Arc<dyn Device>) -> Result<Self> {
        let run = Run::open(&source.path, &source.root, &source.overrides, &source.versions)?;
        let base = Arc::new(BaseModel::open(&run.path(&run.config.model_name_or_path))?);
        let corpus = Arc::new(Corpus::load(&run, &run.config)?);
        let engine = Arc::new(Engine::new(Arc::clone(&device), Arc::clone(&base), run.precision()?.plan)?);
        let learning_rate = run.config.learning_rate;
        let others = Arc::default();
        let shared = Shared { device, base, corpus, engine, others, learning_rate };
        let scene = Arc::new(Scene::new(&shared, run, &[])?);
        Ok(Self { source, scene, shared, memory: Mutex::default() })
    }

    /// The run as it was.
    pub fn run(&self) -> &Run {
        &self.scene.run
    }
    /// The rows as they were.
    pub fn corpus(&self) -> &Corpus {
        &self.scene.corpus
    }
    pub fn device(&self) -> &dyn Device {
        &*self.shared.device
    }
    /// The run without interventions.
    pub fn scene(&self) -> &Scene {
        &self.scene
    }
    /// The window of a step of the unchanged run.
    ///
    /// # Errors
    /// Steps outside the run.
    pub fn window(&self, step: u64) -> Result<Window> {
        match self.scene.segment(step) {
            Some(segment) => segment.plan.window(step),
            None => Err(no_such_step(&self.scene, step)),
        }
    }

    /// The latest start from which `step` can be replayed: a checkpoint before it that can be continued, else initial.
    pub fn start_before(&self, step: u64) -> Start {
        let usable = self.scene.run.checkpoints.iter().rev().find(|c| {
            let begins = self.scene.segments.iter().any(|s| s.resumed_from == Some(c.step));
            c.step < step
                && ((c.has_optimizer && c.has_scheduler) || begins)
                && self.scene.segment(c.step + 1).is_some()
        });
        usable.map_or(Start::Initial, |c| Start::Checkpoint(c.step))
    }

    /// The run as `interventions` change it.
    ///
    /// # Errors
    /// Settings that cannot be replayed.
    pub fn scene_for(&self, interventions: &[Intervention]) -> Result<Arc<Scene>> {
        let changes: Vec<Intervention> = interventions.iter().filter(|i| i.changes_scene()).cloned().collect();
        if changes.is_empty() {
            return Ok(Arc::clone(&self.scene));
        }
        if let Some((_, scene)) = self.memory().scenes.iter().find(|(known, _)| *known == changes) {
            return Ok(Arc::clone(scene));
        }
        let mut overrides = self.source.overrides.clone();
        overrides.extend(changes.iter().filter_map(|i| match i {
            Intervention::Set { key, value } => Some((key.clone(), text(value))),
            _ => None,
        }));
        let run = Run::open(&self.source.path, &self.source.root, &overrides, &self.source.versions)?;
        let scene = Arc::new(Scene::new(&self.shared, run, &changes)?);
        self.memory().scenes.push((changes, Arc::clone(&scene)));
        Ok(scene)
    }

    /// Replays the steps after `start` up to and including `to`.
    ///
    /// # Errors
    /// What cannot be replayed; [`Error::interrupted`] after Ctrl-C, with every finished step already observed.
    pub fn replay(
        &self,
        start: &Start,
        to: u64,
        interventions: &[Intervention],
        observer: &mut dyn Observer,
    ) -> Result<Trace> {
        let scene = self.scene_for(interventions)?;
        let keep = interventions.contains(&Intervention::KeepOptimizer);
        let begin = if keep { self.start_with_optimizer(&scene, start) } else { start.clone() };
        let (state, segment) = start::start_state(&scene, &begin)?;
        let first = state.step + 1;
        if to < first || scene.segment(to).is_none() {
            return Err(
                no_such_step(&scene, to).next(format!("steps {first} to {} can be replayed", scene.last_step()))
            );
        }
        let shown_from = match start {
            Start::Initial => first,
            Start::Checkpoint(step) => step + 1,
        };
        let key = Key::of_start(&scene, &begin, &state)?;
        let mut walk = Walk { replayer: self, scene: &scene, interventions, keep, segment, state, key, stale: false };
        let mut steps = Vec::new();
        let cache = self.source.cache.as_ref().map(|k| Cache::new(&k.folder));
        walk.skip_known(to, shown_from, observer, &mut steps)?;
        // Files hold the records since the start, so they help only where memory did not.
        let mut since_start = Vec::new();
        let mut keeps = cache.filter(|_| walk.state.step + 1 == first);
        if let Some(cache) = &keeps {
            since_start = walk.skip_kept(cache, to, observer)?;
            for record in since_start.iter().filter(|r| r.step >= shown_from) {
                observer.step(record)?;
                steps.push(record.clone());
            }
        }
        let every = self.source.cache.as_ref().map_or(WORTH_KEEPING, |k| k.every);
        let mut kept = Instant::now();
        while walk.state.step < to {
            if let Err(e) = interrupt::check() {
                walk.keep_file(&mut keeps, &since_start);
                return Err(e);
            }
            let record = walk.step(observer)?;
            since_start.push(record.clone());
            if kept.elapsed() > every {
                walk.keep_file(&mut keeps, &since_start);
                kept = Instant::now();
            }
            if record.step >= shown_from {
                observer.step(&record)?;
                steps.push(record);
            }
        }
        walk.keep_state();
        Ok(Trace { start: start.clone(), steps })
    }

    /// Drops everything remembered (scenes, records, states): for callers that replay hundreds of settings once each.
    pub fn forget(&self) {
        *self.memory() = Memory::default();
    }

    /// `start`, or the latest earlier one whose optimizer is on disk.
    fn start_with_optimizer(&self, scene: &Scene, start: &Start) -> Start {
        let Start::Checkpoint(step) = start else { return Start::Initial };
        let whole = scene.run.checkpoints.iter().rev().find(|c| c.step <= *step && c.has_optimizer && c.has_scheduler);
        whole.map_or(Start::Initial, |c| Start::Checkpoint(c.step))
    }

    fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        // A panic elsewhere leaves maps of finished entries; they stay usable.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_such_step(scene: &Scene, step: u64) -> Error {
    Error::input(format!("there is no step {step}: the run ends at {}", scene.last_step()))
}

/// A JSON value as the command line would give it.
fn text(value: &serde_json::Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

impl Intervention {
    /// Whether it changes configuration, rows, windows or arithmetic as a whole rather than single steps.
    fn changes_scene(&self) -> bool {
        matches!(
            self,
            Intervention::Set { .. }
                | Intervention::NeutraliseRows(_)
                | Intervention::NeutraliseTokens { .. }
                | Intervention::Precision(_)
                | Intervention::Semantics(_)
        )
    }
}

/// One replay under way.
struct Walk<'a> {
    replayer: &'a Replayer,
    scene: &'a Scene,
    interventions: &'a [Intervention],
    keep: bool,
    segment: &'a Segment,
    state: TrainState,
    key: Key,
    /// The state's tensors are those of an earlier step: every later one was remembered.
    stale: bool,
}

/// Everything one step is made of.
struct Planned {
    window: Window,
    options: crate::model::PassOptions,
    learning_rates: Option<Vec<f64>>,
    key: Key,
}

impl<'a> Walk<'a> {
    /// Moves to the segment of the next step, resuming where a new attempt begins.
    fn enter_segment(&mut self) -> Result<()> {
        let next = self.state.step + 1;
        if self.segment.steps.contains(&next) {
            return Ok(());
        }
        let rates = self.segment.rules.learning_rates(&self.state);
        self.segment = self.scene.segment(next).ok_or_else(|| no_such_step(self.scene, next))?;
        self.key = self.key.resumed(self.keep, &rates);
        self.state = start::resume(self.scene, self.segment, self.state.clone(), rates, self.keep)?;
        Ok(())
    }

    fn plan(&self, state: &TrainState) -> Result<Planned> {
        let step = state.step + 1;
        let window = steps::window(self.scene, self.segment, step, self.interventions)?;
        let options = steps::pass_options(self.segment, step, self.interventions);
        let scheduled = self.segment.rules.learning_rates(state);
        let learning_rates = steps::learning_rates(&scheduled, step, self.interventions);
        let used = learning_rates.as_ref().unwrap_or(&scheduled);
        let known = state.scaler.is_none().then_some(used.as_slice());
        let key = self.key.then(self.scene, self.segment, &window, &options, self.interventions, known);
        Ok(Planned { window, options, learning_rates, key })
    }

    /// Jumps over steps whose records are remembered, to the latest state that is too.
    fn skip_known(
        &mut self,
        to: u64,
        shown_from: u64,
        observer: &mut dyn Observer,
        steps: &mut Vec<StepRecord>,
    ) -> Result<()> {
        // A scaler's schedule position depends on skips, which only running tells.
        if self.state.scaler.is_some() {
            return Ok(());
        }
        let mut ahead = Walk { state: self.state.clone(), ..*self };
        let (mut records, mut reached) = (Vec::new(), 0);
        let mut latest = None;
        while ahead.state.step < to {
            ahead.enter_segment()?;
            let planned = ahead.plan(&ahead.state)?;
            let next = ahead.state.step + 1;
            let memory = self.replayer.memory();
            let Some(record) = memory.records.get(&planned.key).cloned() else { break };
            if observer.probes(next) != Probes::Off || observer.wants_state(next) {
                break;
            }
            records.push(record);
            // Only what plans depend on moves; the tensors are stale until a remembered state replaces them.
            ahead.key = planned.key;
            ahead.state.step = next;
            ahead.state.schedule_steps += 1;
            ahead.state.stored_learning_rates = None;
            if let Some(state) = memory.states.get(&planned.key) {
                latest = Some((state.clone(), planned.key, ahead.segment));
                reached = records.len();
            }
        }
        // Where every step is known, no state is needed.
        if ahead.state.step == to {
            reached = records.len();
            self.stale = latest.as_ref().is_none_or(|(_, key, _)| *key != ahead.key);
            if self.stale {
                latest = Some((ahead.state, ahead.key, ahead.segment));
            }
        }
        if let Some((state, key, segment)) = latest {
            (self.state, self.key, self.segment) = (state, key, segment);
            for record in records.into_iter().take(reached).filter(|r| r.step >= shown_from) {
                observer.step(&record)?;
                steps.push(record);
            }
        }
        Ok(())
    }

    /// Jumps to the latest state that a file holds; returns the records of the steps up to it.
    fn skip_kept(&mut self, cache: &Cache, to: u64, observer: &mut dyn Observer) -> Result<Vec<StepRecord>> {
        let mut ahead = Walk { state: self.state.clone(), ..*self };
        let mut found = None;
        while ahead.state.step < to {
            ahead.enter_segment()?;
            let planned = ahead.plan(&ahead.state)?;
            let next = ahead.state.step + 1;
            if observer.probes(next) != Probes::Off || observer.wants_state(next) {
                break;
            }
            ahead.key = planned.key;
            ahead.state.step = next;
            ahead.state.schedule_steps += 1;
            ahead.state.stored_learning_rates = None;
            if cache.has(&ahead.key) {
                found = Some((ahead.key, ahead.segment));
            }
        }
        let device = self.scene.engine.device();
        let Some((key, segment)) = found else { return Ok(Vec::new()) };
        let Some((state, records)) = cache.read(&key, device, &self.state) else { return Ok(Vec::new()) };
        (self.state, self.key, self.segment) = (state, key, segment);
        Ok(records)
    }

    /// Writes the state; a folder that cannot be written switches keeping off, which costs time but no result.
    fn keep_file(&self, cache: &mut Option<Cache>, records: &[StepRecord]) {
        if let Some(folder) = cache
            && !self.stale
            && folder.write(&self.key, self.scene.engine.device(), &self.state, records).is_err()
        {
            *cache = None;
        }
    }

    /// Runs the next step.
    fn step(&mut self, observer: &mut dyn Observer) -> Result<StepRecord> {
        self.enter_segment()?;
        let planned = self.plan(&self.state)?;
        let number = self.state.step + 1;
        let place = |e: Error| e.at(format!("step {number}"));
        let device = self.scene.engine.device();
        let rules = &self.segment.rules;
        steps::change_state(device, rules, &mut self.state, number, self.interventions).map_err(place)?;
        let batch = ragged(&self.scene.corpus, &planned.window, self.scene.engine.config().vocab).map_err(place)?;
        let mut options = planned.options;
        options.probes = observer.probes(number);
        let input = StepInput {
            window: &planned.window,
            batch: &batch,
            options: &options,
            learning_rates: planned.learning_rates,
        };
        let output = step(&self.scene.engine, rules, &mut self.state, &input).map_err(place)?;
        self.key = planned.key;
        if options.probes != Probes::Off {
            observer.measured(number, &output.pass.measurements)?;
        }
        if observer.wants_state(number) {
            observer.state(device, &self.state)?;
        }
        let record = record(self.scene, self.segment, &planned.window, &output);
        self.remember(&record);
        Ok(record)
    }

    fn remember(&self, record: &StepRecord) {
        self.replayer.memory().records.insert(self.key, record.clone());
        if self.state.step.is_multiple_of(SNAPSHOT_EVERY) {
            self.keep_state();
        }
    }

    fn keep_state(&self) {
        if self.stale {
            return;
        }
        let mut memory = self.replayer.memory();
        if memory.states.insert(self.key, self.state.clone()).is_none() {
            memory.order.push_back(self.key);
            // Every state of a run has the same size; the newest stays whatever its size.
            let most = (MEMORY_BUDGET / self.state.bytes().max(1)).max(1);
            while memory.order.len() > most {
                let Some(oldest) = memory.order.pop_front() else { break };
                memory.states.remove(&oldest);
            }
        }
    }
}

/// The window's rows as one ragged batch.
fn ragged(corpus: &Corpus, window: &Window, vocab: usize) -> Result<Ragged> {
    let rows = |unit: &crate::batches::MicroBatch| -> Vec<Row<'_>> {
        unit.examples.iter().map(|&e| Row::from(&corpus.train[e])).collect()
    };
    Ragged::build(window.micro_batches.iter().map(rows), vocab)
}

/// What a step did, as traces and reports carry it.
fn record(scene: &Scene, segment: &Segment, window: &Window, output: &StepOutput) -> StepRecord {
    let scale = output.loss_scale.unwrap_or(1.0);
    let micro_batches = window
        .micro_batches
        .iter()
        .zip(&output.pass.units)
        .zip(&output.micro_losses)
        .map(|((unit, measured), &loss)| MicroRecord {
            rows: unit.examples.iter().map(|&e| scene.corpus.train[e].row).collect(),
            tokens: measured.tokens as u64,
            label_tokens: measured.label_tokens as u64,
            loss: f64::from(loss),
            mean_loss: f64::from(measured.loss_sum) / measured.label_tokens as f64,
            grad_norm: measured.grad_norm / scale,
            nonfinite: measured.nonfinite,
            leaked: unit.fetched.leaked,
        })
        .collect();
    StepRecord {
        step: window.step,
        attempt: segment.attempt,
        epoch: window.epoch,
        learning_rate: output.learning_rates.first().copied().unwrap_or(0.0),
        learning_rate_logged: output.learning_rate_logged,
        loss: output.loss,
        loss_raw: output.loss_raw,
        loss_logged: output.loss_logged,
        grad_norm: f64::from(output.clip.norm),
        clip_coefficient: f64::from(output.clip.coefficient),
        update_norm: output.update_norm,
        loss_scale: output.loss_scale,
        skipped: output.skipped,
        nonfinite: output.nonfinite,
        micro_batches,
    }
}
