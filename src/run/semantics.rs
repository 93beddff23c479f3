//! What changed between trainer versions, as data (contract 3.4, 5, 6, 7.4, 15). One value is one trainer;
//! trying another row of the table is one of the experiments.

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
    /// The DeepSpeed engine divides gradients by GA once more (4.46–4.48, contract 5.7).
    pub deepspeed_divides_again: bool,
}
