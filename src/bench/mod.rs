//! Which precision is safe for this run: gradient errors, ranges, lost updates, loss scale, drift.
//!
//! ```text
//! run ─► replay per precision, probed (trajectory) ─┐
//! states of the unchanged replay ─► passes (passes) ─┼─► Bench ─► verdict ─► terminal, HTML, JSON (present)
//! weights and Adam's moments ─► lost updates (measure) ─┘
//! ```
//! The reference of gradients is an f32 pass whose products accumulate in f64 ([`reference`]).

pub mod measure;
pub mod passes;
pub mod present;
pub mod reference;
pub mod trajectory;
pub mod verdict;

use serde::{Deserialize, Serialize};

use crate::diagnosis::number;
use crate::replay::{Replayer, Start};
use crate::{Error, Result};

pub use measure::GradientError;

/// Version of [`Bench`] as JSON.
pub const SCHEMA: &str = "spikeprobe.bench/1";

/// The precisions looked at; `fp16_unscaled` is fp16 autocast without a GradScaler.
pub const PRECISIONS: [&str; 6] = ["fp32", "tf32", "bf16", "fp16", "fp16_unscaled", "pure_bf16"];

/// Everything measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bench {
    pub schema: String,
    pub run: String,
    pub device: String,
    /// Steps replayed in every precision, and those whose gradients were compared.
    pub steps: u64,
    pub gradient_steps: Vec<u64>,
    pub precisions: Vec<Precision>,
    pub loss_scale: ScaleLimit,
    pub lost_updates: Vec<LostUpdates>,
    /// Learning rate of the update that lost updates were counted at.
    #[serde(with = "number")]
    pub learning_rate: f64,
    /// Peak memory of this process, bytes, where the system tells.
    pub peak_memory: Option<u64>,
    pub verdict: verdict::Verdict,
}

/// One precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Precision {
    pub name: String,
    /// Over all matrices; the mean of the gradient steps.
    pub gradient: GradientError,
    /// Per LoRA matrix, in optimizer order.
    pub matrices: Vec<(String, GradientError)>,
    pub sites: Vec<SiteReport>,
    pub trajectory: trajectory::Trajectory,
    /// Wall-clock time of one forward and backward over a window on this device, mean of the gradient steps.
    #[serde(with = "number")]
    pub milliseconds: f64,
}

/// What one site saw over all replayed steps of a precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    pub site: String,
    pub layer: Option<usize>,
    /// The site without its layer.
    pub kind: String,
    pub backward: bool,
    /// Largest finite magnitude.
    #[serde(with = "number")]
    pub max_abs: f64,
    /// Elements that were NaN or infinite, and the first step with one.
    pub nonfinite: u64,
    pub first_step: Option<u64>,
    /// Those of them that arose here: nothing measured before this site of the same micro-batch was broken. The rest is
    /// inherited. And the first step with one.
    pub arisen: u64,
    pub arises_at: Option<u64>,
    /// Share of elements that are zero or subnormal here and neither in the fp32 replay.
    #[serde(with = "number")]
    pub underflow_share: f64,
}

/// The largest loss scale that the backward pass bears in fp16.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScaleLimit {
    /// Predicted scale at which the first site overflows; `None`: the forward pass overflows by itself.
    pub fails_at: Option<f64>,
    pub site: Option<String>,
    pub step: u64,
    /// Passes at half and at twice the predicted scale did as predicted.
    pub confirmed: bool,
    /// Non-finite gradient elements at half and at twice the predicted scale.
    pub at_half: u64,
    pub at_twice: u64,
    /// Predicted scale at which each site of the backward pass fails, lowest first.
    pub sites: Vec<(String, f64)>,
}

/// Updates that rounding leaves without effect.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LostUpdates {
    /// Dtype of the adapter: fp32, bf16, fp16.
    pub dtype: String,
    /// Learning rate → share of the moving weights that stay where they are.
    pub by_learning_rate: Vec<(f64, f64)>,
    /// Learning rate below which more than half of them are lost.
    pub half_lost_below: Option<f64>,
    /// The same for each LoRA matrix, in optimizer order.
    pub by_matrix: Vec<(String, Option<f64>)>,
}

/// What to look at.
#[derive(Debug, Clone)]
pub struct Options {
    pub from: Start,
    /// Steps to replay in every precision.
    pub steps: u64,
    pub precisions: Vec<String>,
}

/// Measures everything. `told` hears what is being done.
///
/// # Errors
/// What cannot be replayed; Ctrl-C.
pub fn run(replayer: &Replayer, options: &Options, told: &dyn Fn(&str)) -> Result<Bench> {
    let first = match options.from {
        Start::Initial => 0,
        Start::Checkpoint(step) => step,
    };
    let last = replayer.scene().last_step().min(first + options.steps);
    if last <= first {
        return Err(Error::usage("no step to replay").at("--from").next("start from an earlier checkpoint"));
    }
    told("the run as it was");
    // Gradients are compared early, where the adapter is nearly empty, and late, where it is trained.
    let mut gradient_steps = vec![first + (last - first).div_ceil(4), last];
    gradient_steps.dedup();
    let states = trajectory::states(replayer, &options.from, &gradient_steps)?;
    let gradients = passes::gradients(replayer, &states, &options.precisions, told)?;
    let loss_scale = passes::scale_limit(replayer, &states)?;
    let mut precisions = Vec::new();
    let mut wide = None;
    for (name, passes) in options.precisions.iter().zip(gradients) {
        told(&format!("{name}: replay of steps {} to {last}", first + 1));
        let (trajectory, sites) = trajectory::replay(replayer, &options.from, last, name, wide.as_ref())?;
        if name == "fp32" {
            wide = Some((trajectory.clone(), sites.clone()));
        }
        precisions.push(Precision {
            name: name.clone(),
            gradient: passes.total,
            matrices: passes.matrices,
            sites: sites.into_values().map(|report| report.report).collect(),
            trajectory,
            milliseconds: passes.milliseconds,
        });
    }
    let (lost_updates, learning_rate) = passes::lost_updates(replayer, &states)?;
    let verdict = verdict::decide(&precisions, &loss_scale, &lost_updates, learning_rate);
    Ok(Bench {
        schema: SCHEMA.into(),
        run: replayer.run().config_path.display().to_string(),
        device: replayer.device().name(),
        steps: last - first,
        gradient_steps,
        precisions,
        loss_scale,
        lost_updates,
        learning_rate,
        peak_memory: crate::inspect::preflight::peak_memory(),
        verdict,
    })
}
