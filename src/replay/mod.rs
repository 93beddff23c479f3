//! Start point + windows + interventions → [`Trace`], and its comparison with the log.
//!
//! ```text
//! Run ─► Scene (configuration as intervened: corpus, plans, rules, engine) ─► start state ─► steps ─► Trace ─► Certificate
//! ```
//! [`Replayer`] is the library's entrance: experiments ask it for traces and share prefixes through its snapshots.

mod cache;
mod certificate;
mod cross_check;
mod generators;
mod json;
mod keys;
mod observer;
mod replayer;
mod scene;
mod start;
mod steps;
mod together;
mod walk;

pub use cache::{record_json, record_of};
pub use certificate::*;
pub use cross_check::{CrossCheck, TensorCheck, cross_check, second_opinion, second_opinion_bytes};
pub use json::{certificate_json, step_json, trace_json};
pub use observer::{Observer, Silent};
pub use replayer::*;
pub use scene::{Scene, Segment};

use crate::batches::RowId;

/// Where a replay starts.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// The initial adapter of the first attempt (from the seed, or adapter_name_or_path).
    Initial,
    /// checkpoint-K.
    Checkpoint(u64),
}

/// One factor changed for a counterfactual replay; its reference value is part of it.
#[derive(Debug, Clone, PartialEq)]
pub enum Intervention {
    /// Any supported configuration key, as `--set key=value`.
    Set { key: String, value: serde_json::Value },
    /// Learning rate multiplied by this factor from the start on (schedule shape kept).
    ScaleLearningRate(f64),
    /// Learning rate held at this value from `from_step` on: the schedule without its jump.
    HoldLearningRate { from_step: u64, value: f64 },
    /// Labels of these rows masked; order and windows kept.
    NeutraliseRows(Vec<RowId>),
    /// Labels of a token range of one row masked.
    NeutraliseTokens { row: RowId, tokens: std::ops::Range<usize> },
    /// Another arithmetic.
    Precision(crate::model::PrecisionPlan),
    /// Another trainer's bookkeeping.
    Semantics(crate::run::TrainerSemantics),
    /// Optimizer moments carried through a resume that lost them: replay on from the earlier state.
    KeepOptimizer,
    /// Fresh optimizer moments at this step.
    ResetOptimizer { before_step: u64 },
    /// Relative noise of half an ulp of the compute dtype on every block's input.
    Perturb { seed: u64 },
    /// Each micro-batch padded as the trainer padded it, and computed alone: the trainer's own matrix products.
    ExactShapes,
    /// Dropout masks of this seed, where the run has lora_dropout: not the trainer's own, nor those of seed 0.
    Dropout { seed: u64 },
    /// Windows of these steps replaced by the windows of others (2 × 2 of state and data).
    SwapWindow { step: u64, with: u64 },
    /// One bit flipped: a hypothesis about hardware, or an injected fault.
    FlipBit(BitFlip),
    /// All other changes act from the step after this one on; up to it the run is as it was.
    After(u64),
}

/// A single bit fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitFlip {
    /// Applied before the forward pass of this step.
    pub step: u64,
    pub target: FlipTarget,
    /// Module path for adapter and base tensors.
    pub tensor: String,
    pub element: usize,
    pub bit: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlipTarget {
    LoraA,
    LoraB,
    ExpAvg,
    ExpAvgSq,
    /// A frozen weight, for the forward and backward passes of this step only.
    BaseTransient,
}

/// The result of a replay.
#[derive(Debug, Clone)]
pub struct Trace {
    pub start: Start,
    pub steps: Vec<StepRecord>,
}

/// One optimizer step, as design.md section 4 prints it.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRecord {
    pub step: u64,
    pub attempt: usize,
    pub epoch: f64,
    /// The one the update used.
    pub learning_rate: f64,
    /// What this trainer version prints.
    pub learning_rate_logged: f64,
    /// This step's own loss as the trainer would log it, unrounded, NaN filter included.
    pub loss: f64,
    pub loss_raw: f64,
    /// The number in the trainer's log, unrounded, where it logs after this step: the mean over the window.
    pub loss_logged: Option<f64>,
    /// Pre-clip, unscaled.
    pub grad_norm: f64,
    pub clip_coefficient: f64,
    /// ‖Δw‖₂ over the adapter.
    pub update_norm: f64,
    pub loss_scale: Option<f64>,
    pub skipped: bool,
    /// Gradient elements.
    pub nonfinite: u64,
    pub micro_batches: Vec<MicroRecord>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct MicroRecord {
    pub rows: Vec<RowId>,
    pub tokens: u64,
    pub label_tokens: u64,
    /// As back-propagated.
    pub loss: f64,
    /// s_i / c_i.
    pub mean_loss: f64,
    pub grad_norm: f64,
    pub nonfinite: u64,
    pub leaked: bool,
}
