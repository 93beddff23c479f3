//! [`Replayer`]: the entrance for experiments. Opens a run once, replays it as often as asked, and remembers states
//! so that replays with a common beginning share it.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::cache::Cache;
use super::keys::{Key, model_identity, program_identity};
use super::scene::{Scene, Shared};
use super::walk::Walk;
use super::{Intervention, Observer, Start, StepRecord, Trace, start};
use sha2::{Digest, Sha256};

use crate::batches::{Corpus, Window};
use crate::device::Device;
use crate::device::hooked::{Hook, Hooked};
use crate::interrupt;
use crate::model::{BaseModel, Engine};
use crate::run::Run;
use crate::step::TrainState;
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

/// What a start from disk reads of a checkpoint or an adapter.
const STATE_FILES: [&str; 8] = [
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
];

/// Work worth a file: what a shorter replay would save is less than reading it costs in disk and surprise.
pub const WORTH_KEEPING: Duration = Duration::from_secs(20);

/// A run ready to be replayed.
pub struct Replayer {
    source: Source,
    scene: Arc<Scene>,
    shared: Shared,
    memory: Mutex<Memory>,
    /// The base model's broken tensors, once a loss was NaN and somebody had to look.
    broken: OnceLock<Vec<(String, u64)>>,
}

/// What earlier replays left.
#[derive(Default)]
pub(super) struct Memory {
    scenes: Vec<(Vec<Intervention>, Arc<Scene>)>,
    pub records: HashMap<Key, StepRecord>,
    pub states: HashMap<Key, TrainState>,
    /// Keys of `states`, oldest first.
    pub order: VecDeque<Key>,
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
        Ok(Self { source, scene, shared, memory: Mutex::default(), broken: OnceLock::new() })
    }

    /// The same run with every operation seen by `hook`. Weights and rows are shared, what was computed is not.
    ///
    /// # Errors
    /// The run's files cannot be read any more.
    pub fn watched(&self, hook: Arc<dyn Hook>) -> Result<Self> {
        let source = Source { cache: None, ..self.source.clone() };
        let run = Run::open(&source.path, &source.root, &source.overrides, &source.versions)?;
        let device: Arc<dyn Device> = Arc::new(Hooked { inner: self.shared_device(), hook });
        let engine = Arc::new(self.shared.engine.on(Arc::clone(&device)));
        let shared = Shared { device, engine, others: Arc::default(), ..self.shared.clone() };
        let scene = Arc::new(Scene::new(&shared, run, &[])?);
        Ok(Self { source, scene, shared, memory: Mutex::default(), broken: OnceLock::new() })
    }

    /// The run as it was.
    pub fn run(&self) -> &Run {
        &self.scene.run
    }
    /// Where the run lies.
    pub fn source(&self) -> &Source {
        &self.source
    }
    /// The rows as they were.
    pub fn corpus(&self) -> &Corpus {
        &self.scene.corpus
    }
    pub fn device(&self) -> &dyn Device {
        &*self.shared.device
    }
    /// The device, to make other engines on it.
    pub fn shared_device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.shared.device)
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
        if let Some((after, changes)) = delayed(start, interventions) {
            return self.replay_delayed(start, after, to, &changes, observer);
        }
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

    /// The unchanged run up to `after`, then the run as `changes` make it.
    fn replay_delayed(
        &self,
        start: &Start,
        after: u64,
        to: u64,
        changes: &[Intervention],
        observer: &mut dyn Observer,
    ) -> Result<Trace> {
        let mut steps = Vec::new();
        let (state, segment) = start::start_state(&self.scene, start)?;
        let (first, key) = (state.step + 1, Key::of_start(&self.scene, start, &state)?);
        let scene: &Scene = &self.scene;
        let mut walk =
            Walk { replayer: self, scene, interventions: &[], keep: false, segment, state, key, stale: false };
        walk.skip_to_state(after, first, observer, &mut steps)?;
        while walk.state.step < after {
            interrupt::check()?;
            let record = walk.step(observer)?;
            observer.step(&record)?;
            steps.push(record);
        }
        walk.keep_state();
        let scene = self.scene_for(changes)?;
        let segment = scene.segment(after + 1).ok_or_else(|| no_such_step(&scene, to))?;
        let state = start::switched(&scene, walk.state)?;
        let key = walk.key.switched(&scene);
        let keep = changes.contains(&Intervention::KeepOptimizer);
        let mut walk =
            Walk { replayer: self, scene: &scene, interventions: changes, keep, segment, state, key, stale: false };
        walk.skip_known(to, after + 1, observer, &mut steps)?;
        while walk.state.step < to {
            interrupt::check()?;
            let record = walk.step(observer)?;
            observer.step(&record)?;
            steps.push(record);
        }
        walk.keep_state();
        Ok(Trace { start: start.clone(), steps })
    }

    /// Hash of everything a replay depends on besides start, steps and interventions: the program, the machine, the
    /// configuration of every attempt, the rows as they are fed, the base model, and what starts from disk read.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn identity(&self) -> Result<String> {
        let (run, scene) = (self.run(), &self.scene);
        let mut hash = Sha256::new();
        hash.update(format!("{}|{}", program_identity(), self.device().fingerprint()));
        hash.update(model_identity(&run.path(&run.config.model_name_or_path))?);
        hash.update(format!("{:?}{:?}{:?}", run.config, run.semantics, run.attempts));
        hash.update(format!("{:?}{:?}", scene.engine.plan(), run.precision()?.plan));
        for example in &scene.corpus.train {
            hash.update(format!("{:?}{}", example.row, example.input_ids.len()));
            hash.update(bytemuck::cast_slice::<u32, u8>(&example.input_ids));
            hash.update(bytemuck::cast_slice::<i32, u8>(&example.labels));
        }
        let continued = run.config.adapter_name_or_path.iter().map(|p| run.path(p));
        let resumed = run.attempts.iter().filter_map(|a| a.config.resume_from_checkpoint.as_ref()).map(|p| run.path(p));
        let folders = run.checkpoints.iter().map(|c| c.dir.clone()).chain(continued).chain(resumed);
        for folder in folders {
            let generators = (0..run.config.world_size).map(|rank| format!("rng_state_{rank}.pth"));
            for name in STATE_FILES.into_iter().map(str::to_owned).chain(generators) {
                let path = folder.join(name);
                if let Ok(mut file) = std::fs::File::open(&path) {
                    hash.update(format!("{}", path.display()));
                    let unreadable = |e: std::io::Error| Error::input(format!("cannot be read: {e}")).at_path(&path);
                    std::io::copy(&mut file, &mut hash).map_err(unreadable)?;
                }
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Drops everything remembered (scenes, records, states): for callers that replay hundreds of settings once each.
    pub fn forget(&self) {
        *self.memory() = Memory::default();
    }

    /// Fails if the base model holds NaN or infinities: what to ask when a loss is NaN. Reads every weight, once.
    ///
    /// # Errors
    /// Names the tensor; those of the device.
    pub(super) fn check_base(&self) -> Result<()> {
        let broken = match self.broken.get() {
            Some(known) => known,
            None => {
                let found = self.shared.base.nonfinite(self.device())?;
                self.broken.get_or_init(|| found)
            }
        };
        match broken.first() {
            None => Ok(()),
            Some((name, count)) => {
                Err(Error::input(format!("{count} weights are NaN or infinite, so the loss is not a number"))
                    .at(name)
                    .at_path(&self.shared.base.dir)
                    .next("copy or download the base model again"))
            }
        }
    }

    /// `start`, or the latest earlier one whose optimizer is on disk.
    fn start_with_optimizer(&self, scene: &Scene, start: &Start) -> Start {
        let Start::Checkpoint(step) = start else { return Start::Initial };
        let whole = scene.run.checkpoints.iter().rev().find(|c| c.step <= *step && c.has_optimizer && c.has_scheduler);
        whole.map_or(Start::Initial, |c| Start::Checkpoint(c.step))
    }

    pub(super) fn memory(&self) -> std::sync::MutexGuard<'_, Memory> {
        // A panic elsewhere leaves maps of finished entries; they stay usable.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The step of [`Intervention::After`] and the changes without it; `None` where they act from the start anyway.
fn delayed(start: &Start, interventions: &[Intervention]) -> Option<(u64, Vec<Intervention>)> {
    let after = interventions.iter().rev().find_map(|i| match i {
        Intervention::After(step) => Some(*step),
        _ => None,
    })?;
    let first = match start {
        Start::Initial => 0,
        Start::Checkpoint(step) => *step,
    };
    let changes = interventions.iter().filter(|i| !matches!(i, Intervention::After(_))).cloned().collect();
    (after > first).then_some((after, changes))
}

pub(super) fn no_such_step(scene: &Scene, step: u64) -> Error {
    let last = scene.last_step();
    Error::input(format!("there is no step {step}: the run ends at {last}"))
        .next(format!("steps 1 to {last} can be replayed"))
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
