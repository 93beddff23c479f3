//! From a micro-batch's summed cross-entropy to what is back-propagated and what is logged (contract 5).
//!
//! Owns the normalisers by trainer version and the trainer's running loss with its NaN filter. The cross-entropy
//! itself belongs to `model/`, N and k of each micro-batch to `batches/`.

use crate::batches::Fetched;
use crate::run::{LossRule, TrainerSemantics};

/// What turns s_i (summed cross-entropy of a micro-batch) into a loss and a gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normaliser {
    /// The loss the trainer sees is s_i / divisor · times. Kept apart because PyTorch rounds after each.
    pub divisor: f32,
    pub times: f32,
    /// Gradient seed of each labelled position, loss scale excluded: ∂loss/∂s_i, averaged over ranks.
    pub seed: f32,
}

/// The run-wide part of a normaliser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossRules {
    pub rule: LossRule,
    /// GA as configured.
    pub accumulation: usize,
    pub world_size: usize,
    /// N counts all ranks, and each rank multiplies its loss by W (contract 5.2).
    pub averages_tokens: bool,
    /// The engine divides gradients by GA once more (contract 5.7).
    pub divides_again: bool,
}

impl LossRules {
    /// The rules of a run; `average_tokens_across_devices` and DeepSpeed are the configuration's.
    pub fn new(semantics: &TrainerSemantics, config: &crate::run::TrainConfig) -> Self {
        Self {
            rule: semantics.loss,
            accumulation: config.gradient_accumulation_steps.max(1),
            world_size: config.world_size.max(1),
            averages_tokens: config.average_tokens_across_devices && config.world_size > 1,
            divides_again: semantics.deepspeed_divides_again && config.deepspeed.is_some(),
        }
    }

    /// Normaliser of one micro-batch with `labels` predicted positions (c_i).
    pub fn of(&self, fetched: &Fetched, labels: u64) -> Normaliser {
        let ranks = self.world_size as f32;
        let (divisor, times) = match self.rule {
            LossRule::TokenMean => (fetched.num_items as f32, if self.averages_tokens { ranks } else { 1.0 }),
            LossRule::MeanUndivided => (labels as f32, 1.0),
            LossRule::MeanOverAccumulation => (labels as f32, 1.0 / self.accumulation as f32),
            LossRule::MeanOverWindow => (labels as f32, 1.0 / fetched.micro_batches.max(1) as f32),
        };
        let engine = if self.divides_again { self.accumulation as f32 } else { 1.0 };
        // DistributedDataParallel averages gradients over ranks.
        Normaliser { divisor, times, seed: times / divisor / ranks / engine }
    }
}

impl Normaliser {
    /// The micro-batch's loss as the trainer adds it up, f32 as PyTorch holds it. 0/0 is NaN, as there.
    pub fn loss(&self, sum: f64) -> f32 {
        sum as f32 / self.divisor * self.times
    }
}

/// The trainer's `tr_loss` since the last log line, per rank (f32, contract 5.3).
#[derive(Debug, Clone, PartialEq)]
pub struct RunningLoss {
    /// As the trainer keeps it, NaN filter included.
    filtered: Vec<f32>,
    /// Without the filter.
    raw: Vec<f32>,
    /// Global step at the last log line.
    last_logged: u64,
}

impl RunningLoss {
    /// At the start of an attempt whose first step is `step + 1`.
    pub fn new(world_size: usize, step: u64) -> Self {
        let zero = vec![0.0; world_size.max(1)];
        Self { filtered: zero.clone(), raw: zero, last_logged: step }
    }

    /// (filtered, raw, step of the last log line), for keeping a state.
    pub fn parts(&self) -> (&[f32], &[f32], u64) {
        (&self.filtered, &self.raw, self.last_logged)
    }

    /// The inverse of [`RunningLoss::parts`].
    pub fn of_parts(filtered: Vec<f32>, raw: Vec<f32>, last_logged: u64) -> Self {
        Self { filtered, raw, last_logged }
    }

    /// Adds one micro-batch; `step`: optimizer steps done before it. With `filter` (logging_nan_inf_filter) a
    /// non-finite loss adds the average of the window so far instead.
    pub fn add(&mut self, rank: usize, loss: f32, step: u64, filter: bool) {
        let Some(total) = self.filtered.get_mut(rank) else { return };
        *total += if filter && !loss.is_finite() {
            *total / (1 + step.saturating_sub(self.last_logged)) as f32
        } else {
            loss
        };
        self.raw[rank] += loss;
    }

    /// (filtered, raw) mean loss per step of the window that ends at `step`.
    pub fn mean(&self, step: u64) -> (f64, f64) {
        let steps = step.saturating_sub(self.last_logged).max(1) as f64;
        let mean = |ranks: &[f32]| f64::from(ranks.iter().sum::<f32>() / ranks.len() as f32) / steps;
        (mean(&self.filtered), mean(&self.raw))
    }

    /// The trainer logged at `step`: `tr_loss -= tr_loss`, so a NaN stays where the filter is off.
    pub fn logged(&mut self, step: u64) {
        for total in &mut self.filtered {
            *total -= *total;
        }
        self.raw.fill(0.0);
        self.last_logged = step;
    }
}
