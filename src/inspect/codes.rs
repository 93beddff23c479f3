//! The table of finding codes: stable words that other programs may rely on.

use serde::{Serialize, Serializer};

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    // the log
    MaskedNan,
    AllMaskedWindow,
    NanLogged,
    InflatedFiller,
    LossTimesAccumulation,
    EpochBoundaryLeak,
    EarlyEnd,
    LearningRateOffByOne,
    SkippedSteps,
    SentinelGradNorm,
    DeepspeedGradNorm,
    GradNormMissing,
    LogUnreadable,
    // attempts
    AppendedAttempts,
    ResumeOrder,
    ResumePosition,
    ResumeWithoutOptimizer,
    ResumeOtherTotal,
    // the configuration
    ConfigEdited,
    HighLearningRate,
    NoWarmup,
    LongAccumulation,
    NoClipping,
    HalfAdapter,
    Fp16Ignored,
    CoarseLogging,
    EvidenceLost,
    KnownBadVersions,
    VersionsAssumed,
    TemplateMismatch,
    // the data
    AnswersCut,
    MaskedRows,
    DroppedRows,
    DuplicateRows,
    ConflictingRows,
    ExtremeLengths,
    // evaluation
    EvalStrategyNo,
    EvalKeyRemoved,
    EvalStepsTooLarge,
    EvalMetricRenamed,
    EvalSplitAndDataset,
    EvalGenerates,
    EvalDelayed,
    EvalNotFinite,
    EvalLabelsHidden,
    // by replay
    SemanticsFingerprint,
    PeakDiverges,
    PeakNotFinite,
    ThinHeadroom,
}

impl Code {
    /// Every code, in the order of the table.
    pub const ALL: [Code; 49] = [
        Code::MaskedNan,
        Code::AllMaskedWindow,
        Code::NanLogged,
        Code::InflatedFiller,
        Code::LossTimesAccumulation,
        Code::EpochBoundaryLeak,
        Code::EarlyEnd,
        Code::LearningRateOffByOne,
        Code::SkippedSteps,
        Code::SentinelGradNorm,
        Code::DeepspeedGradNorm,
        Code::GradNormMissing,
        Code::LogUnreadable,
        Code::AppendedAttempts,
        Code::ResumeOrder,
        Code::ResumePosition,
        Code::ResumeWithoutOptimizer,
        Code::ResumeOtherTotal,
        Code::ConfigEdited,
        Code::HighLearningRate,
        Code::NoWarmup,
        Code::LongAccumulation,
        Code::NoClipping,
        Code::HalfAdapter,
        Code::Fp16Ignored,
        Code::CoarseLogging,
        Code::EvidenceLost,
        Code::KnownBadVersions,
        Code::VersionsAssumed,
        Code::TemplateMismatch,
        Code::AnswersCut,
        Code::MaskedRows,
        Code::DroppedRows,
        Code::DuplicateRows,
        Code::ConflictingRows,
        Code::ExtremeLengths,
        Code::EvalStrategyNo,
        Code::EvalKeyRemoved,
        Code::EvalStepsTooLarge,
        Code::EvalMetricRenamed,
        Code::EvalSplitAndDataset,
        Code::EvalGenerates,
        Code::EvalDelayed,
        Code::EvalNotFinite,
        Code::EvalLabelsHidden,
        Code::SemanticsFingerprint,
        Code::PeakDiverges,
        Code::PeakNotFinite,
        Code::ThinHeadroom,
    ];

    /// The stable word, and what it means.
    pub fn entry(self) -> (&'static str, &'static str) {
        match self {
            Code::MaskedNan => ("masked_nan", "a loss of 0.0 that stands for NaN (logging_nan_inf_filter)"),
            Code::AllMaskedWindow => ("all_masked_window", "a window without a single label: loss 0.0, gradient 0"),
            Code::NanLogged => ("nan_logged", "NaN or infinite loss in the log"),
            Code::InflatedFiller => ("inflated_filler", "a logging window whose NaN was replaced by a filler"),
            Code::LossTimesAccumulation => {
                ("loss_times_accumulation", "loss and gradient too big by gradient_accumulation_steps")
            }
            Code::EpochBoundaryLeak => {
                ("epoch_boundary_leak", "a partial window leaked into the first step of the next epoch")
            }
            Code::EarlyEnd => ("early_end", "training stopped before the last epoch ended"),
            Code::LearningRateOffByOne => ("learning_rate_off_by_one", "the log shows the next step's learning rate"),
            Code::SkippedSteps => ("skipped_steps", "fp16 overflow: optimizer steps that were not taken"),
            Code::SentinelGradNorm => {
                ("sentinel_grad_norm", "grad_norm of exactly 1, √2, √3: DeepSpeed's overflow mark")
            }
            Code::DeepspeedGradNorm => ("deepspeed_grad_norm", "gradients divided by the accumulation twice"),
            Code::GradNormMissing => ("grad_norm_missing", "no grad_norm: trainer_state.json is missing"),
            Code::LogUnreadable => ("log_unreadable", "lines of the log that cannot be read"),
            Code::AppendedAttempts => ("appended_attempts", "one log file holds several processes"),
            Code::ResumeOrder => ("resume_order", "the resumed epoch went on with epoch 0's order"),
            Code::ResumePosition => ("resume_position", "the resume skipped to the wrong place in its epoch"),
            Code::ResumeWithoutOptimizer => ("resume_without_optimizer", "resumed with a fresh optimizer and schedule"),
            Code::ResumeOtherTotal => ("resume_other_total", "resumed with another number of total steps"),
            Code::ConfigEdited => ("config_edited", "the configuration is not the one that was run"),
            Code::HighLearningRate => ("high_learning_rate", "learning rate or LoRA scale above the rule of thumb"),
            Code::NoWarmup => ("no_warmup", "the first step runs at the full learning rate"),
            Code::LongAccumulation => ("long_accumulation", "long accumulation windows"),
            Code::NoClipping => ("no_clipping", "gradients are not clipped"),
            Code::HalfAdapter => ("half_adapter", "LoRA weights in bfloat16 lose small updates"),
            Code::Fp16Ignored => ("fp16_ignored", "fp16 had no effect"),
            Code::CoarseLogging => ("coarse_logging", "logging windows that hide spikes"),
            Code::EvidenceLost => ("evidence_lost", "checkpoints that a replay could start from are not kept"),
            Code::KnownBadVersions => ("known_bad_versions", "library versions with a known bookkeeping bug"),
            Code::VersionsAssumed => ("versions_assumed", "nothing tells the library versions"),
            Code::TemplateMismatch => ("template_mismatch", "the chat template is not the tokenizer's"),
            Code::AnswersCut => ("answers_cut", "cutoff_len removes the end of answers"),
            Code::MaskedRows => ("masked_rows", "rows without any label"),
            Code::DroppedRows => ("dropped_rows", "rows that the trainer drops"),
            Code::DuplicateRows => ("duplicate_rows", "the same row several times"),
            Code::ConflictingRows => ("conflicting_rows", "the same prompt with different answers"),
            Code::ExtremeLengths => ("extreme_lengths", "rows far longer than the others"),
            Code::EvalStrategyNo => ("eval_strategy_no", "data was split off but never evaluated"),
            Code::EvalKeyRemoved => ("eval_key_removed", "evaluation_strategy is no longer a key"),
            Code::EvalStepsTooLarge => ("eval_steps_too_large", "eval_steps lies beyond the last step"),
            Code::EvalMetricRenamed => ("eval_metric_renamed", "eval_loss was logged under another name"),
            Code::EvalSplitAndDataset => ("eval_split_and_dataset", "val_size and eval_dataset exclude each other"),
            Code::EvalGenerates => ("eval_generates", "predict_with_generate replaces eval_loss"),
            Code::EvalDelayed => ("eval_delayed", "eval_delay lies beyond the last step"),
            Code::EvalNotFinite => ("eval_not_finite", "eval_loss is NaN: a batch without labels"),
            Code::EvalLabelsHidden => ("eval_labels_hidden", "evaluations ran without a loss"),
            Code::SemanticsFingerprint => ("semantics_fingerprint", "the normalisation that explains the logged loss"),
            Code::PeakDiverges => ("peak_diverges", "the first windows diverge at the planned peak learning rate"),
            Code::PeakNotFinite => ("peak_not_finite", "the first windows are not finite in the planned precision"),
            Code::ThinHeadroom => ("thin_headroom", "values near the end of fp16's range"),
        }
    }

    pub fn word(self) -> &'static str {
        self.entry().0
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.word())
    }
}
