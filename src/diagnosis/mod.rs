//! Spikes, interventions, shares, verdicts: why the loss spiked, as a pure function of evidence.
//!
//! ```text
//! log ─► spikes (detect) ─► baseline replay, certificate (departure) ─► experiments (plan) ─► Evidence ─► verdict ─► Diagnosis
//! ```
//! This folder decides; it replays only through a trait, so that every rule is tested on scripted evidence.
//! What people read of a [`Diagnosis`] is made in `report/`.

mod absent;
pub mod archive;
mod bits;
pub mod departure;
pub mod detect;
pub mod diagnose;
pub mod evidence;
mod explosion;
mod fix;
mod hardware;
pub mod height;
pub mod investigate;
pub mod laboratory;
mod mechanism;
pub mod number;
pub mod past;
pub mod patch;
mod plan;
mod quiet;
pub mod remembering;
mod route;
pub mod rows;
pub mod shares;
mod stall;
mod summary;
mod suspects;
pub mod verdict;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of [`Diagnosis`] as JSON; additions are free, changes bump the number (design section 4).
pub const SCHEMA: &str = "spikeprobe.diagnosis/1";

/// What made a loss spike. Declared from the most to the least specific: a bit that flipped explains one step of
/// one run, while a lower learning rate hides almost everything. The verdict is the first sufficient one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    Hardware,
    TrainerBookkeeping,
    MaskedLabels,
    Fp16Overflow,
    Bf16Rounding,
    Data,
    OptimizerState,
    Schedule,
    GradientClipping,
    GradientAccumulation,
    LearningRate,
    Nondeterminism,
    /// Nothing is wrong.
    None,
    /// The evidence does not decide; the summary says what to try next.
    Undetermined,
}

impl Cause {
    /// The word of the JSON.
    pub fn word(self) -> &'static str {
        match self {
            Cause::Hardware => "hardware",
            Cause::TrainerBookkeeping => "trainer_bookkeeping",
            Cause::MaskedLabels => "masked_labels",
            Cause::Fp16Overflow => "fp16_overflow",
            Cause::Bf16Rounding => "bf16_rounding",
            Cause::Data => "data",
            Cause::OptimizerState => "optimizer_state",
            Cause::Schedule => "schedule",
            Cause::GradientClipping => "gradient_clipping",
            Cause::GradientAccumulation => "gradient_accumulation",
            Cause::LearningRate => "learning_rate",
            Cause::Nondeterminism => "nondeterminism",
            Cause::None => "none",
            Cause::Undetermined => "undetermined",
        }
    }
}

/// How much the evidence carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Confidence {
    /// Read from the log or one ambiguous experiment.
    Weak,
    /// Replayed, with a gap: the spike was not matched digit by digit, or removed only in part.
    Moderate,
    /// Matched before the spike, spike reproduced (or its absence proved), cause removed, spike gone.
    Strong,
}

/// The shape of a spike in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpikeKind {
    /// The loss rises within a step or two and comes back.
    Jump,
    /// The loss rises and stays up.
    Divergence,
    /// The loss is logged as NaN or infinite.
    Nan,
    /// The loss is logged as 0.0: the NaN filter, or a window without labels.
    MaskedNan,
    /// Only the pre-clip gradient norm explodes.
    GradientExplosion,
    /// The loss is fine and the gradient norm is not finite: the scaler skipped the step.
    SkippedStep,
    /// The loss stops falling although the learning rate is up.
    Stall,
    /// The whole log is a multiple of what the model computes.
    Level,
}

/// One spike and its own verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Spike {
    /// First logged step whose height crosses the threshold.
    pub step: u64,
    /// Last logged step of the episode.
    pub until: u64,
    pub kind: SpikeKind,
    /// Loss (gradient norm for a gradient explosion) before it: the recent minimum.
    #[serde(with = "number::optional")]
    pub before: Option<f64>,
    /// The highest value of the episode.
    #[serde(with = "number")]
    pub at: f64,
    /// Natural logarithm of at / before, bounded; 1 for NaN, masked NaN and skipped steps;
    /// the lost progress for a stall.
    #[serde(with = "number")]
    pub height: f64,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub cause: Cause,
    /// Other changes that alone remove at least half of the height, most specific first.
    pub also_sufficient: Vec<Cause>,
    pub confidence: Confidence,
    /// False when the later loss is as if nothing had happened.
    pub harmful: bool,
    /// One or two sentences for a tired person: what it was, what shows it, what to change.
    pub summary: String,
}

/// A dataset row that carries blame.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RowBlame {
    /// Name in dataset_info.json.
    pub dataset: String,
    /// Counted from 0 in the file.
    pub row: u32,
    /// Index of its micro-batch in the spike's window.
    pub micro_batch: usize,
    /// Step whose window it was in.
    pub step: u64,
    /// Token range that carries it, when it was bisected.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tokens: Option<(usize, usize)>,
    pub reason: String,
}

/// A place in the model that shows the mechanism.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteBlame {
    /// `layers.3.mlp.down_proj input`, `layers.1.self_attn.o_proj lora_B`.
    pub site: String,
    pub step: u64,
    pub message: String,
    /// Named measurements (max_abs, headroom_binades, update_rms …).
    pub measured: BTreeMap<String, Value>,
}

/// One counterfactual replay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Experiment {
    pub name: String,
    /// Key → value as a user would set it.
    pub changes: BTreeMap<String, Value>,
    /// Height of the spike under the change.
    #[serde(with = "number")]
    pub height: f64,
    /// At least half of the baseline's height is gone.
    pub removed: bool,
    /// Which cause this change stands for; absent for the baseline and for controls.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cause: Option<Cause>,
    /// Optimizer steps replayed for it.
    pub windows: u64,
    /// Loss by step, for the report's curves.
    pub curve: Vec<CurvePoint>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    pub step: u64,
    #[serde(with = "number")]
    pub loss: f64,
    #[serde(with = "number")]
    pub grad_norm: f64,
}

/// The smallest change that removes the spike, replayed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fix {
    pub changes: BTreeMap<String, Value>,
    #[serde(with = "number")]
    pub height: f64,
    pub checked_steps: u64,
    /// What to know when applying it (a dataset without the rows changes the order, …).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub note: Option<String>,
}

/// A single bit that was found flipped, and how far the replayed injection proves it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    pub step: u64,
    /// `lora_A`, `lora_B`, `exp_avg`, `exp_avg_sq`, `transient`.
    pub target: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tensor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub element: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub bit: Option<u32>,
    /// The injected flip, replayed, gives the logged step and the next checkpoint.
    pub proved: bool,
    pub message: String,
}

/// How well the baseline replay matches the log (design section 4, `certificate`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CertificateSummary {
    /// `reproduced`, `departs` or `no_log`.
    pub verdict: String,
    pub from: u64,
    pub to: u64,
    pub departs_at: Option<u64>,
    #[serde(with = "number")]
    pub loss_max_rel: f64,
    #[serde(with = "number")]
    pub grad_norm_max_rel: f64,
    pub envelope: Envelope,
}

/// Relative differences that honest arithmetic may show.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    #[serde(with = "number")]
    pub loss: f64,
    #[serde(with = "number")]
    pub grad_norm: f64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable, for programs.
    pub code: String,
    /// `error`, `warning` or `note`.
    pub severity: String,
    pub message: String,
    /// File, key, step.
    #[serde(rename = "where")]
    pub place: String,
}

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Diagnosis {
    pub schema: String,
    pub spikes: Vec<Spike>,
    pub verdict: Verdict,
    /// Parts of the height, by Shapley value over what moved anything; they sum to 1 unless empty.
    pub shares: BTreeMap<String, f64>,
    pub rows: Vec<RowBlame>,
    pub sites: Vec<SiteBlame>,
    pub experiments: Vec<Experiment>,
    pub fix: Option<Fix>,
    pub fault: Option<Fault>,
    pub certificate: Option<CertificateSummary>,
    pub findings: Vec<Finding>,
    /// Optimizer steps replayed beyond the baseline for the verdict.
    pub windows_replayed: u64,
    pub cost: Cost,
}

/// What the answer cost, in optimizer steps (windows), counted whether they were computed or found in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// What `--windows` allows for experiments.
    pub limit: u64,
    /// The unchanged run: to reproduce spikes, and to reach the states that experiments start from.
    pub baseline: u64,
    /// Under changes: rows in other states, perturbed replays, trials.
    pub experiments: u64,
    /// The fix, past the spike.
    pub proof: u64,
    /// Replays whose results were on disk.
    pub cached: u64,
}
