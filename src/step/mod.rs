//! Accumulate, unscale, clip, update, schedule, loss scale: one optimizer step from one window.
//!
//! ```text
//! window ─► seeds (loss) ─► pass (model) ─► unscale (scaler) ─► norm, clip ─► update (optimizer) ─► schedule
//! ```
//! [`step`] reads as that line. What the window holds belongs to `batches/`, forward and backward to `model/`.

mod clip;
mod loss;
mod optimizer;
mod scaler;
mod schedule;
mod state;

pub use clip::{Clip, clip, round};
pub use loss::{LossRules, Normaliser, RunningLoss};
pub use optimizer::{Moments, Optimizer, Rule};
pub use scaler::GradScaler;
pub use schedule::{Schedule, ScheduleSpec, warmup_steps};
pub use state::TrainState;

use crate::batches::Window;
use crate::model::{Engine, Gradients, PassOptions, PassOutput, Ragged};
use crate::run::{LoggedLearningRate, TrainConfig, TrainerSemantics};
use crate::{Error, Result};

/// What stays the same over all steps of one attempt.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRules {
    pub optimizer: Optimizer,
    pub schedule: Schedule,
    pub loss: LossRules,
    pub max_grad_norm: f64,
    /// logging_nan_inf_filter.
    pub nan_filter: bool,
    pub logging_steps: u64,
    pub logging_first_step: bool,
    pub logged_learning_rate: LoggedLearningRate,
    /// A skipped fp16 step still advances the schedule (fused AdamW, contract 15.4).
    pub skip_advances_schedule: bool,
    /// See [`TrainerSemantics::grouped_attention`].
    pub grouped_attention: bool,
}

impl StepRules {
    /// Rules of an attempt whose schedule spans `total` steps (the plan's T).
    ///
    /// # Errors
    /// Optimizers and schedules that are not covered.
    pub fn new(config: &TrainConfig, semantics: &TrainerSemantics, total: u64) -> Result<Self> {
        let warmup = warmup_steps(config.warmup_steps, config.warmup_ratio, total, semantics.logs_unclipped_norm);
        let spec = ScheduleSpec {
            name: &config.lr_scheduler_type,
            kwargs: &config.lr_scheduler_kwargs,
            base: config.learning_rate,
            total,
            warmup,
        };
        Ok(Self {
            optimizer: Optimizer::new(config)?,
            schedule: Schedule::new(&spec)?,
            loss: LossRules::new(semantics, config),
            max_grad_norm: config.max_grad_norm,
            nan_filter: config.logging_nan_inf_filter,
            logging_steps: config.logging_steps.max(1) as u64,
            logging_first_step: config.logging_first_step,
            logged_learning_rate: semantics.logged_lr,
            skip_advances_schedule: semantics.skip_advances_schedule,
            grouped_attention: semantics.grouped_attention,
        })
    }

    /// Whether the trainer writes a log line after `step`.
    pub fn logs_at(&self, step: u64) -> bool {
        step.is_multiple_of(self.logging_steps) || (step == 1 && self.logging_first_step)
    }

    /// Learning rate of each group's next update.
    pub fn learning_rates(&self, state: &TrainState) -> Vec<f64> {
        if let Some(stored) = &state.stored_learning_rates {
            return stored.clone();
        }
        let factor = self.schedule.factor(state.schedule_steps);
        state.base_learning_rates.iter().map(|base| base * factor).collect()
    }
}

/// One step's inputs besides rules and state.
#[derive(Debug)]
pub struct StepInput<'a> {
    pub window: &'a Window,
    /// The window's rows, micro-batches as units in the same order.
    pub batch: &'a Ragged,
    pub options: &'a PassOptions,
    /// Replaces the schedule's learning rate, per group.
    pub learning_rates: Option<Vec<f64>>,
}

/// What one step did.
#[derive(Debug)]
pub struct StepOutput {
    /// Per group, as the update used them.
    pub learning_rates: Vec<f64>,
    /// First group's, as this trainer version prints it.
    pub learning_rate_logged: f64,
    /// This step's own loss, NaN filter included, and without it.
    pub loss: f64,
    pub loss_raw: f64,
    /// Mean over the logging window where the trainer logs after this step.
    pub loss_logged: Option<f64>,
    pub clip: Clip,
    /// ‖Δw‖₂ over the adapter.
    pub update_norm: f64,
    pub loss_scale: Option<f64>,
    pub skipped: bool,
    /// Non-finite elements of the accumulated gradient.
    pub nonfinite: u64,
    /// Per micro-batch, as the trainer adds them up.
    pub micro_losses: Vec<f32>,
    pub pass: PassOutput,
}

/// Runs one optimizer step and moves `state` past it.
///
/// # Errors
/// Those of the pass and the device. `state` is then unusable.
pub fn step(engine: &Engine, rules: &StepRules, state: &mut TrainState, input: &StepInput<'_>) -> Result<StepOutput> {
    let seeds = seeds(rules, state, input)?;
    let mut gradients = Gradients::of_ranks(engine.device(), &state.adapter, ranks(input.window))?;
    let pass = engine.pass(&state.adapter, input.batch, &seeds, input.options, &mut gradients)?;
    finish(engine, rules, state, input, pass, &gradients)
}

/// d(back-propagated loss) / d(summed loss) of each micro-batch, loss scale included: what the pass of a step needs.
///
/// # Errors
/// A batch of other micro-batches than the window's.
pub fn seeds(rules: &StepRules, state: &TrainState, input: &StepInput<'_>) -> Result<Vec<f32>> {
    let (units, expected) = (input.batch.units(), input.window.micro_batches.len());
    if units != expected {
        return Err(Error::internal(format!("{units} units for {expected} micro-batches")));
    }
    // A micro-batch without labels has no positions to seed; its seed may be infinite (1/0).
    let scale = state.scaler.map_or(1.0, |s| s.scale) as f32;
    Ok(normalisers(rules, input).iter().map(|n| n.seed * scale).collect())
}

/// The rank of each micro-batch, where there are several.
pub fn ranks(window: &Window) -> Vec<usize> {
    let ranks: Vec<usize> = window.micro_batches.iter().map(|unit| unit.rank.into()).collect();
    if ranks.iter().all(|&rank| rank == 0) { Vec::new() } else { ranks }
}

fn normalisers(rules: &StepRules, input: &StepInput<'_>) -> Vec<Normaliser> {
    let labels = input.batch.unit_labels.windows(2).map(|w| (w[1] - w[0]) as u64);
    input.window.micro_batches.iter().zip(labels).map(|(m, c)| rules.loss.of(&m.fetched, c)).collect()
}

/// What follows the pass: losses, clipping, update, schedule. Moves `state` past the step.
///
/// # Errors
/// Those of the device. `state` is then unusable.
pub fn finish(
    engine: &Engine,
    rules: &StepRules,
    state: &mut TrainState,
    input: &StepInput<'_>,
    pass: PassOutput,
    gradients: &Gradients,
) -> Result<StepOutput> {
    let device = engine.device();
    let loss_scale = state.scaler.map(|s| s.scale);
    let units = &input.window.micro_batches;
    let micro_losses: Vec<f32> =
        normalisers(rules, input).iter().zip(&pass.units).map(|(n, unit)| n.loss(f64::from(unit.loss_sum))).collect();
    let mut own = RunningLoss::new(rules.loss.world_size, state.step);
    for (unit, &loss) in units.iter().zip(&micro_losses) {
        own.add(unit.rank.into(), loss, state.step, rules.nan_filter);
        state.running_loss.add(unit.rank.into(), loss, state.step, rules.nan_filter);
    }

    // The loss scale is taken out and the norm clipped where gradients are read; they stay as they are.
    let unscale = state.scaler.map_or(1.0, |scaler| scaler.inverse());
    let norms = device.norms_of(&gradients.tensors, unscale)?;
    let nonfinite: u64 = norms.iter().map(|(_, count)| count).sum();
    let norms: Vec<f32> = norms.iter().map(|(norm, _)| *norm).collect();
    let clipped = clip(&norms, rules.max_grad_norm, state.adapter.dtype);

    let learning_rates = input.learning_rates.clone().unwrap_or_else(|| rules.learning_rates(state));
    let skipped = state.scaler.is_some() && nonfinite > 0;
    let mut update_norm = 0.0;
    if !skipped {
        let factors = [unscale, clipped.coefficient];
        update_norm = state.optimizer.update(
            device,
            &mut state.adapter,
            &mut state.moments,
            gradients,
            &learning_rates,
            factors,
        )?;
    }
    if let Some(scaler) = &mut state.scaler {
        scaler.update(nonfinite > 0);
    }
    if !skipped || rules.skip_advances_schedule {
        state.schedule_steps += 1;
        state.stored_learning_rates = None;
    }
    state.step += 1;
    state.generators.clone_from(&pass.generators);

    let learning_rate_logged = match rules.logged_learning_rate {
        LoggedLearningRate::Used => learning_rates[0],
        LoggedLearningRate::Next => rules.learning_rates(state)[0],
    };
    let (loss, loss_raw) = own.mean(state.step);
    let mut loss_logged = None;
    if rules.logs_at(state.step) {
        loss_logged = Some(state.running_loss.mean(state.step).0);
        state.running_loss.logged(state.step);
    }
    Ok(StepOutput {
        learning_rates,
        learning_rate_logged,
        loss,
        loss_raw,
        loss_logged,
        clip: clipped,
        update_norm,
        loss_scale,
        skipped,
        nonfinite,
        micro_losses,
        pass,
    })
}
