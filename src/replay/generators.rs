//! Where the trainer's CPU generators stand, which draw the masks of lora_dropout (contract 10).
//!
//! Each process of a trainer seeds its own with `seed`, and a resume puts it where rng_state.pth says. Besides the masks,
//! every pass over a data loader draws one 64-bit number from it (`_BaseDataLoaderIter`'s base seed): each epoch of
//! training, and each evaluation.

use serde_json::Value;

use super::scene::{Scene, Segment};
use crate::Result;
use crate::batches::{Mt19937, Window};
use crate::model::TorchMasks;
use crate::run::{Checkpoint, TrainConfig};

/// 32-bit numbers of a base seed.
const BASE_SEED: u64 = 2;

/// The generators before the first step of a process that starts afresh or, with `checkpoint`, resumes; none where
/// the masks do not come from them.
///
/// # Errors
/// A damaged rng_state.pth.
pub(super) fn at_start(scene: &Scene, segment: &Segment, checkpoint: Option<&Checkpoint>) -> Result<Vec<Mt19937>> {
    let config = &segment.config;
    if config.lora_dropout == 0.0 || !scene.draws_torch_masks() {
        return Ok(Vec::new());
    }
    (0..config.world_size)
        .map(|rank| {
            let kept = checkpoint.map(|c| c.generator(rank, config.world_size)).transpose()?.flatten();
            let resumed = kept.and_then(|file| Mt19937::resumed(&file.state, file.next));
            resumed.map_or_else(|| seeded(scene, segment, checkpoint.is_some()), Ok)
        })
        .collect()
}

/// A generator that nothing put where it was. What a process draws before its first micro-batch then counts: a resume
/// in the middle of an epoch has begun that epoch.
fn seeded(scene: &Scene, segment: &Segment, resumed: bool) -> Result<Mt19937> {
    let config = &segment.config;
    let mut generator = Mt19937::new(config.seed);
    let first = segment.plan.window(*segment.plan.steps().start())?;
    let begun = first.micro_batches.first().is_some_and(|unit| !unit.opens_epoch);
    generator.skip(if resumed && begun { BASE_SEED } else { 0 });
    if config.written.get("eval_on_start").and_then(Value::as_bool) == Some(true) {
        generator.skip(BASE_SEED * evaluation_sets(scene));
    }
    Ok(generator)
}

/// What draws the masks of `window`: `generators` and what else draws from them between its micro-batches.
pub(super) fn masks(scene: &Scene, segment: &Segment, generators: &[Mt19937], window: &Window) -> TorchMasks {
    let by_epoch = if evaluates(&segment.config, "epoch", window.epoch_index) { evaluation_sets(scene) } else { 0 };
    let started = window.step == *segment.plan.steps().start();
    let units = window.micro_batches.iter().enumerate().map(|(index, unit)| {
        // A process evaluates at the end of its epochs, so not before its first micro-batch.
        let evaluations = if started && index < generators.len() { 0 } else { by_epoch };
        let before = if unit.opens_epoch { BASE_SEED * (1 + evaluations) } else { 0 };
        (usize::from(unit.rank), before)
    });
    TorchMasks { generators: generators.to_vec(), units: units.collect() }
}

/// Moves `generators` past what the trainer draws between `step` and its checkpoint.
pub(super) fn after_step(scene: &Scene, segment: &Segment, generators: &mut [Mt19937], step: u64) {
    let config = &segment.config;
    // TrainerState.compute_steps: a fraction is one of all steps; unset, as often as is logged.
    let every = config.eval_steps.unwrap_or(config.logging_steps as f64);
    let every = if every < 1.0 { (segment.plan.total_steps as f64 * every).ceil() } else { every } as u64;
    if evaluates(config, "steps", step) && step.is_multiple_of(every.max(1)) {
        let numbers = BASE_SEED * evaluation_sets(scene);
        generators.iter_mut().for_each(|generator| generator.skip(numbers));
    }
}

/// Whether evaluations follow this strategy and have begun, so many steps or epochs after the start.
fn evaluates(config: &TrainConfig, strategy: &str, done: u64) -> bool {
    let delay = config.written.get("eval_delay").and_then(Value::as_f64).unwrap_or(0.0);
    config.eval_strategy == strategy && delay <= done as f64
}

/// Data loaders of an evaluation.
fn evaluation_sets(scene: &Scene) -> u64 {
    scene.corpus.eval.iter().filter(|(_, rows)| !rows.is_empty()).count() as u64
}
