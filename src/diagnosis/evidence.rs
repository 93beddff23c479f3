//! What the verdict rests on: the spike, how the baseline replay compares with the log, and the trials.
//!
//! Plain values, made by replays or written by a test; nothing here computes.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Cause, Fault, RowBlame, SpikeKind};
use crate::numerics::State;

/// Everything known about one spike.
#[derive(Debug, Clone, PartialEq)]
pub struct Evidence {
    pub step: u64,
    pub kind: SpikeKind,
    /// Height in the log.
    pub logged_height: f64,
    pub baseline: Baseline,
    /// One per change tried.
    pub trials: Vec<Trial>,
    /// Labels in the spike's window are all masked.
    pub window_without_labels: bool,
    /// The spike's window is as high in an earlier, sound state, and no single row makes it so.
    pub window_always_high: bool,
    /// Rows to blame if [`Cause::Data`] or [`Cause::MaskedLabels`] is the verdict.
    pub rows: Vec<RowBlame>,
    /// A flipped bit, located or at least dated.
    pub fault: Option<Fault>,
    /// A change more specific than every sufficient one that the windows did not suffice for.
    pub unaffordable: Option<String>,
    /// Nothing but the cause of a larger spike was tried.
    pub only: Option<Cause>,
    /// The later loss is as high as if the spike had left damage.
    pub harmful: bool,
}

/// How the unchanged replay compares with the log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Baseline {
    /// Height of the spike in the unchanged replay; `None`: nothing could be replayed.
    pub height: Option<f64>,
    pub before: Match,
    /// The replay parts from the log at the spike's first step, far beyond what perturbed replays show there.
    pub departs_at_spike: bool,
    /// It parts after steps that were equal to the last bit: this machine computes as the run's did, and chaos, which
    /// needs a first difference, is no explanation.
    pub parts_exactly: bool,
    /// Replays with half an ulp of noise: how many were made, and in how many the spike was there.
    pub perturbed: usize,
    pub perturbed_with_spike: usize,
    /// From the next checkpoint on the replay matches the log again.
    pub matches_after: bool,
    /// How this device computes the spike's step, where that was asked: the same twice, and as its checksums say?
    pub arithmetic: Option<State>,
}

impl Baseline {
    /// Rounding alone decides whether the spike is there.
    pub fn is_chaotic(&self) -> bool {
        self.perturbed_with_spike > 0 && !self.parts_exactly
    }
}

/// The steps from the start point to the spike, replay against log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// Within the envelope.
    Close,
    /// The log has no row there: the spike is the first one.
    Nothing,
    /// In the band, not on the line: chaos, dropout, a coarse log.
    Band,
    /// Not even in the band.
    Off,
}

/// One counterfactual.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    pub cause: Cause,
    pub name: String,
    pub changes: BTreeMap<String, Value>,
    /// Height of the spike under the change.
    pub height: f64,
    pub windows: u64,
}

/// A trial that leaves this part of the height leaves nothing.
const CLEAN: f64 = 0.1;

impl Evidence {
    /// The height that a trial has to halve: that of the replay where it shows the spike, else of the log.
    pub fn reference_height(&self) -> f64 {
        match self.baseline.height {
            Some(height) if self.reproduced() => height,
            _ => self.logged_height,
        }
    }
    /// The unchanged replay shows at least half of the logged height.
    pub fn reproduced(&self) -> bool {
        self.baseline.height.is_some_and(|height| height >= 0.5 * self.logged_height)
    }
    /// The sufficient trial of a cause that changes least and yet leaves nothing; of those that leave something, which
    /// grows again past the spike, the one that leaves least. A bisection's later trials change less.
    pub fn smallest_change(&self, cause: Cause) -> Option<(usize, &Trial)> {
        let sufficient = || self.trials.iter().enumerate().filter(|(_, t)| t.cause == cause && self.removes(t));
        let clean = sufficient().rfind(|(_, t)| t.height <= CLEAN * self.reference_height());
        clean.or_else(|| sufficient().min_by(|a, b| a.1.height.total_cmp(&b.1.height)))
    }
    /// At least half of the height is gone. A NaN height is not gone.
    pub fn removes(&self, trial: &Trial) -> bool {
        trial.height <= 0.5 * self.reference_height()
    }
}
