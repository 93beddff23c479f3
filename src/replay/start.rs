//! Where a replay begins: the initial adapter, or a checkpoint as the trainer would load it (contract 4.1, 7.3).

use std::path::Path;

use super::scene::{Scene, Segment};
use super::{Start, generators};
use crate::model::{Adapter, initial_weights};
use crate::run::{AdapterWeights, Checkpoint};
use crate::step::{GradScaler, RunningLoss, TrainState};
use crate::{Error, Result};

/// State before the first step after `start`, and the segment that continues from it.
///
/// # Errors
/// Missing or unfitting adapters, checkpoints that cannot be continued.
pub(super) fn start_state<'s>(scene: &'s Scene, start: &Start) -> Result<(TrainState, &'s Segment)> {
    match start {
        Start::Initial => {
            let first = scene.segments.first().ok_or_else(|| Error::input("the run has no steps to replay"))?;
            match first.resumed_from {
                None => Ok((initial(scene, first)?, first)),
                Some(step) => resumed(scene, first, step).map(|state| (state, first)),
            }
        }
        Start::Checkpoint(step) => {
            let segment = scene.segment(step + 1).ok_or_else(|| {
                Error::input(format!("no step follows checkpoint-{step}: the run ends at {}", scene.last_step()))
                    .at("--from")
                    .next("start from an earlier checkpoint, or from initial")
            })?;
            resumed(scene, segment, *step).map(|state| (state, segment))
        }
    }
}

/// The first attempt's state before step 1.
fn initial(scene: &Scene, segment: &Segment) -> Result<TrainState> {
    let config = &segment.config;
    let plan = scene.engine.plan();
    let (weights, scaling, targets) = match &config.adapter_name_or_path {
        Some(folder) => {
            let folder = scene.run.path(folder);
            let weights = AdapterWeights::read(&folder)?;
            let (scaling, targets) = adapter_config(&folder, &weights)?;
            (weights, scaling, targets)
        }
        None => {
            let targets = config.lora_target.clone();
            let weights = initial_weights(scene.engine.config(), &targets, config.lora_rank, config.seed, plan.base)?;
            (weights, scaling(config.lora_alpha, config.lora_rank as f64, config.use_rslora), targets)
        }
    };
    let adapter =
        Adapter::new(scene.engine.device(), scene.engine.config(), &targets, &weights, scaling, plan.adapter)?;
    fresh(scene, segment, adapter, 0)
}

/// An adapter with a fresh optimizer and a schedule at its beginning.
fn fresh(scene: &Scene, segment: &Segment, adapter: Adapter, step: u64) -> Result<TrainState> {
    let optimizer = &segment.rules.optimizer;
    Ok(TrainState {
        step,
        optimizer: *optimizer,
        moments: optimizer.fresh(scene.engine.device(), &adapter)?,
        adapter,
        schedule_steps: 0,
        base_learning_rates: optimizer.group_ratios().iter().map(|r| r * segment.config.learning_rate).collect(),
        stored_learning_rates: None,
        scaler: scene.engine.plan().loss_scaling.then(GradScaler::default),
        running_loss: RunningLoss::new(segment.rules.loss.world_size, step),
        generators: generators::at_start(scene, segment, None)?,
    })
}

/// checkpoint-K as `segment`'s trainer loads it, or as it was when it was written.
fn resumed(scene: &Scene, segment: &Segment, step: u64) -> Result<TrainState> {
    let device = scene.engine.device();
    let config = &segment.config;
    let outside = config.resume_from_checkpoint.as_ref().map(|p| scene.run.path(p)).filter(|p| p.is_dir());
    let checkpoint = match (scene.run.checkpoint(step), outside) {
        (Ok(checkpoint), _) => checkpoint.clone(),
        // The attempt went on from another run's folder.
        (Err(_), Some(dir)) if segment.resumed_from == Some(step) => at(dir, step),
        (Err(error), _) => return Err(error),
    };
    let weights = checkpoint.adapter()?;
    let (scaling, targets) = match &config.adapter_name_or_path {
        Some(folder) => adapter_config(&scene.run.path(folder), &weights)?,
        None => (scaling(config.lora_alpha, config.lora_rank as f64, config.use_rslora), config.lora_target.clone()),
    };
    let plan = scene.engine.plan();
    let adapter = Adapter::new(device, scene.engine.config(), &targets, &weights, scaling, plan.adapter)?;
    let mut state = fresh(scene, segment, adapter, step)?;
    // Without either file the trainer loads neither, and says nothing (contract 7.3).
    if checkpoint.has_optimizer && checkpoint.has_scheduler {
        let file = checkpoint.optimizer(&weights)?;
        let scheduler = checkpoint.scheduler()?;
        state.moments = segment.rules.optimizer.restore(device, &state.adapter, &file)?;
        if !scene.optimizer_changed {
            state.optimizer = state.optimizer.loaded(&file.constants);
        }
        state.schedule_steps = scheduler.last_epoch;
        let groups = state.base_learning_rates.len();
        let scaled = |rates: &[f64]| rates.iter().take(groups).map(|r| r * scene.base_ratio).collect::<Vec<_>>();
        if scheduler.base_lrs.len() >= groups {
            state.base_learning_rates = scaled(&scheduler.base_lrs);
        }
        state.stored_learning_rates =
            (!scene.schedule_changed && file.group_lr.len() >= groups).then(|| scaled(&file.group_lr));
    } else if segment.resumed_from != Some(step) {
        return Err(Error::input("it holds no optimizer state, so the steps after it cannot be continued as they ran")
            .at(format!("checkpoint-{step}"))
            .next("start from an earlier checkpoint with optimizer.pt and scheduler.pt, or from initial"));
    }
    state.generators = generators::at_start(scene, segment, Some(&checkpoint))?;
    if state.scaler.is_some() && checkpoint.has_scaler {
        state.scaler = Some(GradScaler::from(&checkpoint.scaler()?));
    }
    Ok(state)
}

/// What a resume does to the state an earlier attempt reached at the same step: the same as loading its checkpoint.
/// `rates`: what the earlier attempt's next step would have used. `keep` leaves the optimizer alone even where the
/// checkpoint lost it.
pub(super) fn resume(
    scene: &Scene,
    segment: &Segment,
    mut state: TrainState,
    rates: Vec<f64>,
    keep: bool,
) -> Result<TrainState> {
    let step = state.step;
    let checkpoint = scene.run.checkpoint(step).ok();
    let world = segment.config.world_size;
    if let Some(checkpoint) = checkpoint.filter(|c| !keep && c.generator(0, world).is_ok_and(|file| file.is_none())) {
        state.generators = generators::at_start(scene, segment, Some(checkpoint))?;
    }
    let lost = checkpoint.is_some_and(|c| !(c.has_optimizer && c.has_scheduler));
    if lost && !keep {
        let TrainState { scaler, generators, .. } = state;
        return Ok(TrainState { scaler, generators, ..fresh(scene, segment, state.adapter, step)? });
    }
    state.running_loss = RunningLoss::new(segment.rules.loss.world_size, step);
    if !scene.schedule_changed {
        state.stored_learning_rates = Some(rates);
    }
    Ok(state)
}

/// A state of the unchanged run as `scene` goes on from it.
///
/// # Errors
/// A scene whose adapter has another dtype: its state cannot have been reached without.
pub(super) fn switched(scene: &Scene, mut state: TrainState) -> Result<TrainState> {
    let plan = scene.engine.plan();
    if state.adapter.matrices().any(|m| m.dtype != plan.adapter) {
        return Err(Error::input("the adapter's dtype can only be changed from the beginning"));
    }
    for rate in &mut state.base_learning_rates {
        *rate *= scene.base_ratio;
    }
    if scene.schedule_changed || scene.base_ratio != 1.0 {
        state.stored_learning_rates = None;
    }
    state.scaler = plan.loss_scaling.then(|| state.scaler.unwrap_or_default());
    Ok(state)
}

fn at(dir: std::path::PathBuf, step: u64) -> Checkpoint {
    let has = |name: &str| dir.join(name).is_file();
    Checkpoint {
        step,
        has_optimizer: has("optimizer.pt"),
        has_scheduler: has("scheduler.pt"),
        has_scaler: has("scaler.pt"),
        attempt: 0,
        dir,
    }
}

/// alpha / r, or alpha / √r (rslora).
fn scaling(alpha: f64, rank: f64, rslora: bool) -> f64 {
    if rslora { alpha / rank.sqrt() } else { alpha / rank }
}

/// Scaling and targets of an adapter that training continued from: its own, whatever the YAML says. `weights` must have
/// its rank.
fn adapter_config(folder: &Path, weights: &AdapterWeights) -> Result<(f64, Vec<String>)> {
    let path = folder.join("adapter_config.json");
    let broken = |what: &str| Error::input(what).at_path(&path).next("copy the adapter folder again");
    let text = std::fs::read_to_string(&path).map_err(|e| broken(&format!("cannot be read: {e}")))?;
    let json: serde_json::Value =
        crate::run::json::parse(&text).map_err(|e| broken(&format!("not valid JSON: {e}")))?;
    let number = |key: &str| json.get(key).and_then(serde_json::Value::as_f64);
    let (Some(alpha), Some(rank)) = (number("lora_alpha"), number("r")) else {
        return Err(broken("lora_alpha or r is missing"));
    };
    if let Some(other) = weights.modules.iter().find(|module| module.rank as f64 != rank) {
        let what = format!("r is {rank}, but {} has rank {}", other.path, other.rank);
        return Err(broken(&what));
    }
    let rslora = json.get("use_rslora").and_then(serde_json::Value::as_bool).unwrap_or(false);
    for pattern in ["rank_pattern", "alpha_pattern"] {
        if json.get(pattern).and_then(|p| p.as_object()).is_some_and(|p| !p.is_empty()) {
            return Err(Error::refused(format!("{pattern} is not covered")).at_path(&path));
        }
    }
    let targets = match json.get("target_modules") {
        Some(serde_json::Value::Array(names)) => names.iter().filter_map(|n| n.as_str().map(str::to_owned)).collect(),
        _ => return Err(broken("target_modules is not a list of names")),
    };
    Ok((scaling(alpha, rank, rslora), targets))
}
