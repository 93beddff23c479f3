//! The one door to replays, and what is known about the run before any.
//!
//! Everything that decides is on this side of [`Laboratory`]; a test puts a scripted one behind it.

use std::sync::Arc;

use super::detect;
use super::height::Point;
use crate::batches::{Corpus, RowId};
use crate::device::cpu::CpuDevice;
use crate::device::{DType, Device};
use crate::model::PrecisionPlan;
use crate::numerics::{Effort, State, Suspect, examine};
use crate::probe::{Measurement, Probes};
use crate::replay::{Intervention, Start, Trace};
use crate::replay::{Observer, Replayer, Silent};
use crate::run::{AdapterWeights, LogRow, Run};
use crate::step::TrainState;
use crate::{Error, Result};

/// Replays of one run.
pub trait Laboratory {
    /// Steps after `start` up to `to` (or the end of the run) under `changes`.
    ///
    /// # Errors
    /// What cannot be replayed.
    fn replay(&mut self, start: &Start, to: u64, changes: &[Intervention]) -> Result<Trace>;

    /// The adapter after step `at` of that replay; at the start point itself if that is `at`.
    ///
    /// # Errors
    /// What cannot be replayed.
    fn adapter(&mut self, start: &Start, at: u64, changes: &[Intervention]) -> Result<AdapterWeights>;

    /// What every site of the model saw at `step` of the unchanged replay.
    ///
    /// # Errors
    /// What cannot be replayed.
    fn measure(&mut self, start: &Start, step: u64) -> Result<Vec<Measurement>>;

    /// Whether this device computes `step` the same way every time, and as its checksums say; `None`: cannot be asked.
    ///
    /// # Errors
    /// What cannot be replayed.
    fn arithmetic(&mut self, _step: u64) -> Result<Option<State>> {
        Ok(None)
    }

    /// How many results so far were not computed but found.
    fn cached(&self) -> u64 {
        0
    }
}

/// The real one.
pub struct ReplayLaboratory<'a> {
    pub replayer: &'a Replayer,
}

impl Laboratory for ReplayLaboratory<'_> {
    fn replay(&mut self, start: &Start, to: u64, changes: &[Intervention]) -> Result<Trace> {
        let end = self.replayer.scene_for(changes)?.last_step();
        self.replayer.replay(start, to.min(end), changes, &mut Silent)
    }

    fn adapter(&mut self, start: &Start, at: u64, changes: &[Intervention]) -> Result<AdapterWeights> {
        if let Start::Checkpoint(step) = start
            && *step == at
        {
            return self.replayer.run().checkpoint(at)?.adapter();
        }
        let mut keeper = Keeper { at, adapter: None };
        self.replayer.replay(start, at, changes, &mut keeper)?;
        keeper.adapter.ok_or_else(|| Error::internal(format!("the replay to step {at} gave no state")))
    }

    fn measure(&mut self, start: &Start, step: u64) -> Result<Vec<Measurement>> {
        let mut meter = Meter { at: step, measured: Vec::new() };
        self.replayer.replay(start, step, &[], &mut meter)?;
        Ok(meter.measured)
    }

    fn arithmetic(&mut self, step: u64) -> Result<Option<State>> {
        let suspect = Suspect::open(self.replayer.source().clone(), self.replayer.shared_device(), step)?;
        let trusted: Arc<dyn Device> = Arc::new(CpuDevice::new(None)?);
        examine(&suspect, &trusted, Effort::default(), None).map(|evidence| Some(evidence.state()))
    }
}

/// Measures one step.
struct Meter {
    at: u64,
    measured: Vec<Measurement>,
}

impl Observer for Meter {
    fn probes(&mut self, step: u64) -> Probes {
        if step == self.at { Probes::PerSite } else { Probes::Off }
    }
    fn measured(&mut self, step: u64, measurements: &[Measurement]) -> Result<()> {
        if step == self.at {
            self.measured = measurements.to_vec();
        }
        Ok(())
    }
}

/// Keeps the adapter of one step.
struct Keeper {
    at: u64,
    adapter: Option<AdapterWeights>,
}

impl Observer for Keeper {
    fn wants_state(&mut self, step: u64) -> bool {
        step == self.at
    }
    fn state(&mut self, device: &dyn Device, state: &TrainState) -> Result<()> {
        self.adapter = Some(state.adapter.weights(device)?);
        Ok(())
    }
}

/// A run with its log as one history.
#[derive(Debug)]
pub struct Subject<'a> {
    pub run: &'a Run,
    pub plan: PrecisionPlan,
    /// Dataset names for [`RowId`]s; `None` when the rows could not be read.
    pub corpus: Option<&'a Corpus>,
    /// The rows that led to the final weights.
    pub rows: Vec<LogRow>,
    pub points: Vec<Point>,
}

impl<'a> Subject<'a> {
    pub fn new(run: &'a Run, plan: PrecisionPlan, corpus: Option<&'a Corpus>) -> Self {
        let rows = detect::effective(&run.log.rows);
        let points = rows.iter().filter_map(Point::logged).collect();
        Self { run, plan, corpus, rows, points }
    }

    pub fn context(&self, vocab_size: Option<usize>) -> detect::Context {
        detect::Context {
            loss_scaling: self.plan.loss_scaling,
            rounds_loss: self.run.semantics.rounds_loss,
            vocab_size,
            accumulation: self.run.config.gradient_accumulation_steps,
            samples: self.samples(),
        }
    }

    /// Samples of an update.
    pub fn samples(&self) -> usize {
        let config = &self.run.config;
        config.gradient_accumulation_steps * config.per_device_train_batch_size * config.world_size.max(1)
    }

    /// Half a unit of the last decimal of a logged loss.
    pub fn rounding(&self) -> f64 {
        if self.run.semantics.rounds_loss { 5.1e-5 } else { 0.0 }
    }

    /// Floor of relative differences between honest replays (design 5.2).
    pub fn floor(&self) -> super::Envelope {
        let half = self.plan.linear() != DType::F32 || self.plan.base != DType::F32;
        match half {
            true => super::Envelope { loss: 1e-3, grad_norm: 1e-2 },
            false => super::Envelope { loss: 1e-5, grad_norm: 1e-4 },
        }
    }

    pub fn last_step(&self) -> u64 {
        self.rows.last().map_or(0, |row| row.step)
    }

    /// Start points from which the steps before `step` can be replayed, nearest first; [`Start::Initial`] is last.
    /// A checkpoint counts that holds the optimizer's state, or from which an attempt really went on without.
    pub fn starts_before(&self, step: u64) -> Vec<Start> {
        let usable = |c: &&crate::run::Checkpoint| {
            let resumed = self.run.attempts.iter().any(|a| a.resumed_from == Some(c.step));
            c.step < step && ((c.has_optimizer && c.has_scheduler) || resumed)
        };
        let mut steps: Vec<u64> = self.run.checkpoints.iter().filter(usable).map(|c| c.step).collect();
        steps.sort_unstable_by(|a, b| b.cmp(a));
        steps.into_iter().map(Start::Checkpoint).chain([Start::Initial]).collect()
    }

    /// The row that a blame names.
    pub fn row_id(&self, blame: &super::RowBlame) -> Option<RowId> {
        let dataset = self.corpus?.datasets.iter().position(|d| d.name == blame.dataset)?;
        Some(RowId { dataset: u16::try_from(dataset).ok()?, row: blame.row })
    }

    /// Positions of a training row's tokens whose predictions count, ascending; empty when the rows could not be read.
    pub fn labelled(&self, row: RowId) -> Vec<usize> {
        let example = self.corpus.and_then(|c| c.train.iter().find(|e| e.row == row));
        let labels = example.map_or(&[][..], |e| &e.labels[..]);
        labels.iter().enumerate().filter(|(_, l)| **l != crate::batches::IGNORE).map(|(i, _)| i).collect()
    }

    pub fn dataset_name(&self, row: RowId) -> String {
        let dataset = self.corpus.and_then(|c| c.datasets.get(usize::from(row.dataset)));
        dataset.map_or_else(|| format!("dataset {}", row.dataset), |d| d.name.clone())
    }
}

/// Step after which a start point's replay begins.
pub fn step_of(start: &Start) -> u64 {
    match start {
        Start::Initial => 0,
        Start::Checkpoint(step) => *step,
    }
}
