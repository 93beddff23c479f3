//! What changed between trainer versions, as data (contract 3.4, 5, 6, 7.4, 15). One value is one trainer;
//! trying another row of the table is one of the experiments.

use super::{Version, Versions};

/// How batches of an epoch are cut into accumulation windows, and how many steps an epoch counts (contract 3.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowRule {
    /// transformers ≤ 4.45: a window closes every GA micro-batches counted across epochs.
    AcrossEpochs,
    /// 4.46: normalisers cut per epoch as in `FloorLeak`, but a window closes every GA micro-batches counted
    /// across epochs; the two agree only while len % GA == 0.
    FloorAcross,
    /// 4.47–4.51: steps counted with floor(len / GA), ceil(len / GA) performed; the last window may leak.
    FloorLeak,
    /// ≥ 4.52: ceil(len / GA) windows, the last one short.
    Ceil,
}

/// What is back-propagated for one micro-batch (contract 5.1). s_i: summed cross-entropy; c_i: shifted label
/// count; N: label count of the window; k: micro-batches in the window; GA: configured accumulation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LossRule {
    /// s_i / c_i / GA (transformers ≤ 4.45, and models without loss kwargs on 4.48–4.53).
    MeanOverAccumulation,
    /// s_i / c_i / k (models without loss kwargs on ≥ 4.55).
    MeanOverWindow,
    /// s_i / c_i, undivided: loss and gradient GA times too big (models without loss kwargs on 4.46.3–4.47.1).
    MeanUndivided,
    /// s_i / N (≥ 4.46).
    TokenMean,
}

/// Which learning rate the log shows (contract 5.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoggedLearningRate {
    /// ≥ 4.51: the one the update used.
    Used,
    /// ≤ 4.50: read after scheduler.step().
    Next,
}

/// Permutation used for the rest of an epoch ≥ 1 after a mid-epoch resume (contract 7.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResumeOrder {
    Right,
    /// The resumed epoch continues with epoch 0's permutation.
    EpochZero,
}

/// One trainer's bookkeeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainerSemantics {
    pub windows: WindowRule,
    pub loss: LossRule,
    /// N counts `labels[:, 1:]` (4.46.0–1) instead of all labels.
    pub count_shifted: bool,
    pub logged_lr: LoggedLearningRate,
    /// Logged loss rounded to 4 decimals (4.x).
    pub rounds_loss: bool,
    pub resume_order: ResumeOrder,
    /// After a mid-epoch resume micro-batches are counted from 0 (4.47–4.56; 4.57.1 and 5.x count on), so that
    /// the resumed epoch's last partial window never closes and leaks into the next epoch (contract 15.3).
    pub resume_restarts_count: bool,
    /// Default of average_tokens_across_devices (true from 4.55).
    pub averages_tokens: bool,
    /// max_grad_norm ≤ 0 still logs grad_norm (5.x).
    pub logs_unclipped_norm: bool,
    /// A skipped fp16 step still advances the schedule (fused AdamW, contract 15.4).
    pub skip_advances_schedule: bool,
    /// LLaMA-Factory ≤ 0.9.3 labels position 0 with eos for efficient_eos templates (contract 2.5 b).
    pub eos_label_at_zero: bool,
    /// LLaMA-Factory ≥ 0.9.3 splits validation rows before tokenizing (contract 2.3).
    pub splits_before_tokenizing: bool,
    /// LLaMA-Factory ≤ 0.9.3 loads the base in the compute dtype (contract 4.2).
    pub base_in_compute_dtype: bool,
    /// Attention without a mask gets keys and values per group (`enable_gqa`, ≥ 4.54), not repeated per head.
    pub grouped_attention: bool,
    /// The DeepSpeed engine divides gradients by GA once more (4.46–4.48, contract 5.7).
    pub deepspeed_divides_again: bool,
}

impl TrainerSemantics {
    /// The row of the table for these versions. What is unknown behaves as the newest version that was run here.
    ///
    /// `model_type` is config.json's; `optim` as configured. Sources: contract 2.5, 3.4, 4.2, 5, 7.4, 15.
    pub fn of(versions: &Versions, model_type: Option<&str>, optim: &str) -> Self {
        let tf = versions.transformers.as_ref().map_or(Version(5, 6, 0), |(v, _)| *v);
        let accelerate = versions.accelerate.as_ref().map_or(Version(1, 11, 0), |(v, _)| *v);
        let factory = versions.llamafactory.as_ref().map_or(Version(0, 9, 5), |(v, _)| *v);
        Self {
            windows: window_rule(tf),
            loss: loss_rule(tf, model_type),
            count_shifted: (Version(4, 46, 0)..Version(4, 46, 2)).contains(&tf),
            logged_lr: if tf < Version(4, 51, 0) { LoggedLearningRate::Next } else { LoggedLearningRate::Used },
            rounds_loss: tf < Version(5, 0, 0),
            resume_order: resume_order(tf, accelerate),
            resume_restarts_count: (Version(4, 47, 0)..Version(4, 57, 0)).contains(&tf),
            averages_tokens: tf >= Version(4, 55, 0),
            logs_unclipped_norm: tf >= Version(5, 0, 0),
            skip_advances_schedule: optim == "adamw_torch_fused",
            eos_label_at_zero: factory <= Version(0, 9, 3),
            splits_before_tokenizing: factory >= Version(0, 9, 3),
            base_in_compute_dtype: factory <= Version(0, 9, 3),
            grouped_attention: tf >= Version(4, 54, 0),
            deepspeed_divides_again: (Version(4, 46, 0)..Version(4, 49, 0)).contains(&tf),
        }
    }
}

/// Contract 3.4.
fn window_rule(tf: Version) -> WindowRule {
    if tf < Version(4, 46, 0) {
        WindowRule::AcrossEpochs
    } else if tf < Version(4, 47, 0) {
        WindowRule::FloorAcross
    } else if tf < Version(4, 52, 0) {
        WindowRule::FloorLeak
    } else {
        WindowRule::Ceil
    }
}

/// Contract 5.1. From 4.48 on the four model types that are replayed all take loss keywords; in 4.46 and 4.47 the
/// forward needed a parameter named `loss_kwargs`, which mistral lacks (15.7).
fn loss_rule(tf: Version, model_type: Option<&str>) -> LossRule {
    let lacks_keywords = model_type == Some("mistral") && tf < Version(4, 48, 0);
    if tf < Version(4, 46, 0) {
        LossRule::MeanOverAccumulation
    } else if lacks_keywords && tf >= Version(4, 46, 2) {
        LossRule::MeanUndivided
    } else {
        LossRule::TokenMean
    }
}

/// Contract 7.4. accelerate 1.6 was never tried; it is taken for 1.5.
fn resume_order(tf: Version, accelerate: Version) -> ResumeOrder {
    let epoch_set_after_skip = tf >= Version(5, 0, 0);
    let wrong = if accelerate >= Version(1, 7, 0) { !epoch_set_after_skip } else { epoch_set_after_skip };
    if wrong { ResumeOrder::EpochZero } else { ResumeOrder::Right }
}
