//! Grids of settings, each cell one replay: where training stays stable, and what to set.
//!
//! ```text
//! --lr --accumulation --grid ─► Grid ─► Cells ─► (what the Folder lacks) ─► Trainer ─► Outcome per file ─► Sweep ─► suggestion
//! ```
//! Owns grids, the folder of results, sharding, outcomes and the suggestion. A cell is run through [`Trainer`], so
//! that everything here is tested without replaying; [`replayed`] is the one that replays.

mod bunch;
pub mod folder;
pub mod grid;
pub mod outcome;
pub mod present;
pub mod queue;
pub mod replayed;
pub mod suggest;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::replay::StepRecord;

pub use outcome::Outcome;

/// Version of a cell's result file.
pub const CELL_SCHEMA: &str = "spikeprobe.cell/1";
/// Version of a sweep's manifest and of its merged results.
pub const SWEEP_SCHEMA: &str = "spikeprobe.sweep/1";

/// One point of a grid: everything that determines its result, given the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Axis key → value, as the grid names it (`precision` included).
    pub axes: BTreeMap<String, Value>,
    /// Configuration keys that follow from an axis (batch size at constant samples, max_steps), key → value.
    pub derived: BTreeMap<String, Value>,
    /// `initial`, or the step of a checkpoint.
    pub from: String,
    /// Optimizer steps to replay.
    pub steps: u64,
    /// Rows per optimizer step, over all ranks.
    pub samples_per_step: u64,
}

impl Cell {
    /// The configuration keys to set: axes and what follows from them, without `precision`.
    pub fn settings(&self) -> BTreeMap<String, Value> {
        let both = self.axes.iter().chain(&self.derived);
        both.filter(|(key, _)| *key != grid::PRECISION).map(|(k, v)| (k.clone(), v.clone())).collect()
    }

    pub fn precision(&self) -> Option<&str> {
        self.axes.get(grid::PRECISION).and_then(Value::as_str)
    }
}

/// Runs cells: one, or several that share what their steps have in common.
pub trait Trainer: Sync {
    /// `watch` sees every optimizer step of each cell (by index) in order and may end that cell early.
    ///
    /// # Errors
    /// Whatever keeps a cell from being replayed; the cells then have no result and are tried again next time.
    fn train(&self, cells: &[&Cell], watch: &mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>) -> Result<()>;
    /// Trained parameters of a cell, for the root mean square of an update.
    ///
    /// # Errors
    /// As [`Trainer::train`].
    fn parameters(&self, cell: &Cell) -> Result<u64>;
    /// Device and machine, as results carry it.
    fn machine(&self) -> String;
}
