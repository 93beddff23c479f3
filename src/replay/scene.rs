//! A run as interventions change it: configuration, rows, windows, rules and arithmetic of a replay.
//!
//! Owns what an intervention means before the first step; what one means at a step is `steps.rs`'.

use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use super::Intervention;
use crate::Result;
use crate::batches::{Corpus, IGNORE, Plan};
use crate::device::Device;
use crate::model::{BaseModel, Engine, PrecisionPlan};
use crate::run::{Run, TrainConfig};
use crate::step::StepRules;

/// What a replay computes with.
pub struct Scene {
    pub run: Run,
    pub corpus: Arc<Corpus>,
    pub engine: Arc<Engine>,
    /// The steps that led to the run's end, in order; attempts that were thrown away are left out.
    pub segments: Vec<Segment>,
    /// `--set` changed what the stored learning rate of a checkpoint would be.
    pub(super) schedule_changed: bool,
    /// `--set` changed a constant that a checkpoint's optimizer would bring back.
    pub(super) optimizer_changed: bool,
    /// Factor on learning rates stored in checkpoints: learning_rate as set over learning_rate as configured.
    pub(super) base_ratio: f64,
}

/// Consecutive steps of one attempt.
pub struct Segment {
    /// Index into [`Run::attempts`].
    pub attempt: usize,
    /// First and last step; empty if the attempt was thrown away whole.
    pub steps: RangeInclusive<u64>,
    /// Checkpoint it resumed from.
    pub resumed_from: Option<u64>,
    pub config: TrainConfig,
    pub plan: Plan,
    pub rules: StepRules,
}

/// Keys whose change makes the learning rate stored in a checkpoint stale.
const SCHEDULE_KEYS: [&str; 9] = [
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "num_train_epochs",
    "max_steps",
    "gradient_accumulation_steps",
    "per_device_train_batch_size",
];

/// Keys whose change is meant for the optimizer of a checkpoint too, though the trainer would ignore it on a resume.
const OPTIMIZER_KEYS: [&str; 5] = ["optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"];

/// What can be shared between scenes of one run.
#[derive(Clone)]
pub(super) struct Shared {
    pub device: Arc<dyn Device>,
    pub base: Arc<BaseModel>,
    /// Rows as the unchanged configuration gives them.
    pub corpus: Arc<Corpus>,
    pub engine: Arc<Engine>,
    /// Engines of other precisions over the same base: each may hold its own copy of the weights, so one is enough.
    pub others: Arc<Mutex<Vec<Arc<Engine>>>>,
    /// learning_rate of the unchanged configuration.
    pub learning_rate: f64,
}

impl Scene {
    /// `run`: opened with every `Set` among `interventions` laid over its configuration.
    ///
    /// # Errors
    /// Rows, windows, schedules or precision that cannot be replayed.
    pub(super) fn new(shared: &Shared, mut run: Run, interventions: &[Intervention]) -> Result<Self> {
        let mut precision = None;
        let mut set: Vec<&str> = Vec::new();
        for intervention in interventions {
            match intervention {
                Intervention::Semantics(semantics) => run.semantics = *semantics,
                Intervention::Precision(plan) => precision = Some(*plan),
                Intervention::Set { key, .. } => set.push(key),
                _ => {}
            }
        }
        let corpus = match set.iter().all(|key| !changes_rows(key)) {
            true => Arc::clone(&shared.corpus),
            false => Arc::new(Corpus::load(&run, &run.config)?),
        };
        let corpus = neutralised(corpus, interventions);
        let plan = match precision {
            Some(plan) => plan,
            None => run.precision()?.plan,
        };
        let engine = engine(shared, &run, plan)?;
        let segments = segments(&run, &corpus)?;
        let base_ratio = if set.contains(&"learning_rate") && shared.learning_rate != 0.0 {
            run.config.learning_rate / shared.learning_rate
        } else {
            1.0
        };
        let schedule_changed = set.iter().any(|key| SCHEDULE_KEYS.contains(key));
        let optimizer_changed = set.iter().any(|key| OPTIMIZER_KEYS.contains(key));
        Ok(Self { run, corpus, engine, segments, schedule_changed, optimizer_changed, base_ratio })
    }

    /// The segment that performs `step`.
    pub fn segment(&self, step: u64) -> Option<&Segment> {
        self.segments.iter().find(|s| s.steps.contains(&step))
    }

    /// Whether lora_dropout's masks are torch's own: the trainer ran on a CPU, as far as its configuration or a checkpoint
    /// tells (contract 10).
    pub fn draws_torch_masks(&self) -> bool {
        // A file that cannot be read says nothing; whoever starts from it hears why.
        let world = self.run.config.world_size;
        let kept = || self.run.checkpoints.iter().find_map(|checkpoint| checkpoint.generator(0, world).ok().flatten());
        self.run.config.use_cpu || kept().is_some_and(|file| !file.on_gpu)
    }

    /// The frozen weights.
    pub(super) fn base(&self) -> Arc<BaseModel> {
        self.engine.base()
    }

    /// Last step of the run as planned.
    pub fn last_step(&self) -> u64 {
        self.segments.last().map_or(0, |s| *s.steps.end())
    }
}

/// Keys that change which rows there are or how they are tokenized.
fn changes_rows(key: &str) -> bool {
    const KEYS: [&str; 18] = [
        "dataset",
        "dataset_dir",
        "eval_dataset",
        "template",
        "cutoff_len",
        "max_samples",
        "val_size",
        "train_on_prompt",
        "mask_history",
        "default_system",
        "enable_thinking",
        "model_name_or_path",
        "packing",
        "neat_packing",
        "seed",
        "mix_strategy",
        "preserve_thinking",
        "efficient_eos",
    ];
    KEYS.contains(&key)
}

/// Labels of neutralised rows masked. Rows, order and windows stay; N counts what is left.
fn neutralised(corpus: Arc<Corpus>, interventions: &[Intervention]) -> Arc<Corpus> {
    let mut corpus = corpus;
    for intervention in interventions {
        match intervention {
            Intervention::NeutraliseRows(rows) => {
                for example in Arc::make_mut(&mut corpus).train.iter_mut().filter(|e| rows.contains(&e.row)) {
                    example.labels.fill(IGNORE);
                }
            }
            Intervention::NeutraliseTokens { row, tokens } => {
                for example in Arc::make_mut(&mut corpus).train.iter_mut().filter(|e| e.row == *row) {
                    let end = tokens.end.min(example.labels.len());
                    if let Some(labels) = example.labels.get_mut(tokens.start.min(end)..end) {
                        labels.fill(IGNORE);
                    }
                }
            }
            _ => {}
        }
    }
    corpus
}

fn engine(shared: &Shared, run: &Run, plan: PrecisionPlan) -> Result<Arc<Engine>> {
    let folder = run.path(&run.config.model_name_or_path);
    if folder == shared.base.dir {
        if *shared.engine.plan() == plan {
            return Ok(Arc::clone(&shared.engine));
        }
        let mut others = shared.others.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = others.iter().find(|e| *e.plan() == plan) {
            return Ok(Arc::clone(engine));
        }
        let engine = Arc::new(Engine::new(Arc::clone(&shared.device), Arc::clone(&shared.base), plan)?);
        others.push(Arc::clone(&engine));
        return Ok(engine);
    }
    let base = Arc::new(BaseModel::open(&folder)?);
    Ok(Arc::new(Engine::new(Arc::clone(&shared.device), base, plan)?))
}

/// The attempts whose steps led to the end: each runs until the step a later one started from.
fn segments(run: &Run, corpus: &Corpus) -> Result<Vec<Segment>> {
    let mut segments: Vec<Segment> = Vec::new();
    for (index, attempt) in run.attempts.iter().enumerate() {
        let start = attempt.resumed_from.unwrap_or(0);
        let later = run.attempts[index + 1..].iter().map(|a| a.resumed_from.unwrap_or(0)).min();
        let plan = Plan::new(corpus, &attempt.config, &run.semantics, attempt.resumed_from)
            .map_err(|e| e.at(format!("attempt {}", index + 1)))?;
        let planned = *plan.steps().end();
        let last = later.map_or(planned, |later| later.min(planned));
        let rules = StepRules::new(&attempt.config, &run.semantics, plan.total_steps)?;
        if last > start || later.is_none() {
            segments.push(Segment {
                attempt: index,
                steps: start + 1..=last,
                resumed_from: attempt.resumed_from,
                config: attempt.config.clone(),
                plan,
                rules,
            });
        }
    }
    Ok(segments)
}
