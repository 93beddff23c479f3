//! One replay under way: step after step from a start, jumping over what earlier replays know.
//!
//! Owns the order of things; what a step computes is `step/`'s, what interventions mean at it `steps.rs`'.

use super::cache::Cache;
use super::keys::Key;
use super::replayer::no_such_step;
use super::scene::{Scene, Segment};
use super::{Intervention, MicroRecord, Observer, Replayer, Start, StepRecord, generators, start, steps};
use crate::batches::Window;
use crate::model::{Memory, PassOptions, Ragged, Row};
use crate::probe::Probes;
use crate::step::{StepInput, StepOutput, TrainState, step};
use crate::{Error, Result};

/// Between two remembered states; the steps between are replayed again when an experiment parts there.
const SNAPSHOT_EVERY: u64 = 4;
/// Bytes of remembered states; beyond it the oldest go.
const MEMORY_BUDGET: usize = 1 << 30;

/// One replay under way.
pub(super) struct Walk<'a> {
    pub replayer: &'a Replayer,
    pub scene: &'a Scene,
    pub interventions: &'a [Intervention],
    /// The optimizer survives resumes that lost it.
    pub keep: bool,
    pub segment: &'a Segment,
    pub state: TrainState,
    pub key: Key,
    /// The state's tensors are those of an earlier step: every later one was remembered.
    pub stale: bool,
}

/// Everything one step is made of.
pub(super) struct Planned {
    pub window: Window,
    pub options: PassOptions,
    pub learning_rates: Option<Vec<f64>>,
    key: Key,
}

impl<'a> Walk<'a> {
    /// Before the first step after `start`, from the state and segment there.
    ///
    /// # Errors
    /// Model files that cannot be examined.
    pub fn new(
        replayer: &'a Replayer,
        scene: &'a Scene,
        interventions: &'a [Intervention],
        (state, segment): (TrainState, &'a Segment),
        start: &Start,
    ) -> Result<Self> {
        let key = Key::of_start(scene, start, &state)?;
        Ok(Self { replayer, scene, interventions, keep: false, segment, state, key, stale: false })
    }

    /// Moves to the segment of the next step, resuming where a new attempt begins.
    fn enter_segment(&mut self) -> Result<()> {
        let next = self.state.step + 1;
        if self.segment.steps.contains(&next) {
            return Ok(());
        }
        let rates = self.segment.rules.learning_rates(&self.state);
        self.segment = self.scene.segment(next).ok_or_else(|| no_such_step(self.scene, next))?;
        self.key = self.key.resumed(self.keep, &rates);
        self.state = start::resume(self.scene, self.segment, self.state.clone(), rates, self.keep)?;
        Ok(())
    }

    fn plan(&self, state: &TrainState) -> Result<Planned> {
        let step = state.step + 1;
        let window = steps::window(self.scene, self.segment, step, self.interventions)?;
        let options = steps::pass_options(self.scene, self.segment, &window, &state.generators, self.interventions);
        let scheduled = self.segment.rules.learning_rates(state);
        let learning_rates = steps::learning_rates(&scheduled, step, self.interventions);
        let used = learning_rates.as_ref().unwrap_or(&scheduled);
        let known = state.scaler.is_none().then_some(used.as_slice());
        let key = self.key.then(self.scene, self.segment, &window, &options, self.interventions, known);
        Ok(Planned { window, options, learning_rates, key })
    }

    /// Jumps over steps whose records are remembered, to the latest state that is too.
    pub fn skip_known(
        &mut self,
        to: u64,
        shown_from: u64,
        observer: &mut dyn Observer,
        steps: &mut Vec<StepRecord>,
    ) -> Result<()> {
        self.skip(to, shown_from, observer, steps, false)
    }

    /// The same for callers that go on from the state at `to`: records alone do not do.
    pub fn skip_to_state(
        &mut self,
        to: u64,
        shown_from: u64,
        observer: &mut dyn Observer,
        steps: &mut Vec<StepRecord>,
    ) -> Result<()> {
        self.skip(to, shown_from, observer, steps, true)
    }

    fn skip(
        &mut self,
        to: u64,
        shown_from: u64,
        observer: &mut dyn Observer,
        steps: &mut Vec<StepRecord>,
        needs_state: bool,
    ) -> Result<()> {
        // A scaler's schedule position depends on skips, which only running tells.
        if self.state.scaler.is_some() {
            return Ok(());
        }
        let mut ahead = Walk { state: self.state.clone(), ..*self };
        let (mut records, mut reached) = (Vec::new(), 0);
        let mut latest = None;
        while ahead.state.step < to {
            ahead.enter_segment()?;
            let planned = ahead.plan(&ahead.state)?;
            let next = ahead.state.step + 1;
            let memory = self.replayer.memory();
            let Some(record) = memory.records.get(&planned.key).cloned() else { break };
            if observer.probes(next) != Probes::Off || observer.wants_state(next) {
                break;
            }
            records.push(record);
            // Only what plans depend on moves; the tensors are stale until a remembered state replaces them.
            ahead.key = planned.key;
            ahead.state.step = next;
            ahead.state.schedule_steps += 1;
            ahead.state.stored_learning_rates = None;
            if let Some(state) = memory.states.get(&planned.key) {
                latest = Some((state.clone(), planned.key, ahead.segment));
                reached = records.len();
            }
        }
        // Where every step is known, no state is needed.
        if ahead.state.step == to && !needs_state {
            reached = records.len();
            self.stale = latest.as_ref().is_none_or(|(_, key, _)| *key != ahead.key);
            if self.stale {
                latest = Some((ahead.state, ahead.key, ahead.segment));
            }
        }
        if let Some((state, key, segment)) = latest {
            (self.state, self.key, self.segment) = (state, key, segment);
            for record in records.into_iter().take(reached).filter(|r| r.step >= shown_from) {
                observer.step(&record)?;
                steps.push(record);
            }
        }
        Ok(())
    }

    /// Jumps to the latest state that a file holds; returns the records of the steps up to it.
    pub fn skip_kept(&mut self, cache: &Cache, to: u64, observer: &mut dyn Observer) -> Result<Vec<StepRecord>> {
        let mut ahead = Walk { state: self.state.clone(), ..*self };
        let mut found = None;
        while ahead.state.step < to {
            ahead.enter_segment()?;
            let planned = ahead.plan(&ahead.state)?;
            let next = ahead.state.step + 1;
            if observer.probes(next) != Probes::Off || observer.wants_state(next) {
                break;
            }
            ahead.key = planned.key;
            ahead.state.step = next;
            ahead.state.schedule_steps += 1;
            ahead.state.stored_learning_rates = None;
            if cache.has(&ahead.key) {
                found = Some((ahead.key, ahead.segment, ahead.state.optimizer));
            }
        }
        let device = self.scene.engine.device();
        let Some((key, segment, optimizer)) = found else { return Ok(Vec::new()) };
        let Some((state, records)) = cache.read(&key, device, &self.state) else { return Ok(Vec::new()) };
        (self.state, self.key, self.segment) = (TrainState { optimizer, ..state }, key, segment);
        Ok(records)
    }

    /// Writes the state; a folder that cannot be written switches keeping off, which costs time but no result.
    pub fn keep_file(&self, cache: &mut Option<Cache>, records: &[StepRecord]) {
        if let Some(folder) = cache
            && !self.stale
            && folder.write(&self.key, self.scene.engine.device(), &self.state, records).is_err()
        {
            *cache = None;
        }
    }

    /// Runs the next step.
    pub fn step(&mut self, observer: &mut dyn Observer) -> Result<StepRecord> {
        let planned = self.begin_step()?;
        let number = planned.window.step;
        let place = |e: Error| e.at(format!("step {number}"));
        let mut options = planned.options.clone();
        let batch = ragged(self.scene, &planned.window, &options).map_err(place)?;
        options.probes = observer.probes(number);
        let input = StepInput {
            window: &planned.window,
            batch: &batch,
            options: &options,
            learning_rates: planned.learning_rates.clone(),
        };
        let output = step(&self.scene.engine, &self.segment.rules, &mut self.state, &input).map_err(place)?;
        if options.probes != Probes::Off {
            observer.measured(number, &output.pass.measurements)?;
        }
        let record = self.end_step(&planned, &output)?;
        if observer.wants_state(number) {
            observer.state(self.scene.engine.device(), &self.state)?;
        }
        self.remember(&record);
        Ok(record)
    }

    /// What the next step is made of; interventions on the state are done.
    pub fn begin_step(&mut self) -> Result<Planned> {
        self.enter_segment()?;
        let planned = self.plan(&self.state)?;
        let (device, number) = (self.scene.engine.device(), planned.window.step);
        steps::change_state(device, &self.segment.rules, &mut self.state, number, self.interventions)
            .map_err(|e| e.at(format!("step {number}")))?;
        Ok(planned)
    }

    /// The record of a step whose update is made; the state then is that of a checkpoint.
    pub fn end_step(&mut self, planned: &Planned, output: &StepOutput) -> Result<StepRecord> {
        self.key = planned.key;
        generators::after_step(self.scene, self.segment, &mut self.state.generators, self.state.step);
        let record = record(self.scene, self.segment, &planned.window, output);
        if record.loss_raw.is_nan() {
            self.replayer.check_base().map_err(|e| e.at(format!("step {}", record.step)))?;
        }
        Ok(record)
    }

    fn remember(&self, record: &StepRecord) {
        self.replayer.memory().records.insert(self.key, record.clone());
        if self.state.step.is_multiple_of(SNAPSHOT_EVERY) {
            self.keep_state();
        }
    }

    pub fn keep_state(&self) {
        if self.stale {
            return;
        }
        let mut memory = self.replayer.memory();
        if memory.states.insert(self.key, self.state.clone()).is_none() {
            memory.order.push_back(self.key);
            // Every state of a run has the same size; the newest stays whatever its size.
            let most = (MEMORY_BUDGET / self.state.bytes().max(1)).max(1);
            while memory.order.len() > most {
                let Some(oldest) = memory.order.pop_front() else { break };
                memory.states.remove(&oldest);
            }
        }
    }
}

/// The window's rows as one ragged batch, padded where the options ask for the trainer's own shapes.
pub(super) fn ragged(scene: &Scene, window: &Window, options: &PassOptions) -> Result<Ragged> {
    let rows = |unit: &crate::batches::MicroBatch| -> Vec<Row<'_>> {
        unit.examples.iter().map(|&e| Row::from(&scene.corpus.train[e])).collect()
    };
    let batch = Ragged::build(window.micro_batches.iter().map(rows), scene.engine.config().vocab)?;
    Ok(match options.memory {
        Memory::MicroBatches => batch.with_padding(scene.corpus.pad_token_id),
        _ => batch,
    })
}

/// What a step did, as traces and reports carry it.
fn record(scene: &Scene, segment: &Segment, window: &Window, output: &StepOutput) -> StepRecord {
    let scale = output.loss_scale.unwrap_or(1.0);
    let micro_batches = window
        .micro_batches
        .iter()
        .zip(&output.pass.units)
        .zip(&output.micro_losses)
        .map(|((unit, measured), &loss)| MicroRecord {
            rows: unit.examples.iter().map(|&e| scene.corpus.train[e].row).collect(),
            tokens: measured.tokens as u64,
            label_tokens: measured.label_tokens as u64,
            loss: f64::from(loss),
            mean_loss: f64::from(measured.loss_sum) / measured.label_tokens as f64,
            grad_norm: measured.grad_norm / scale,
            nonfinite: measured.nonfinite,
            leaked: unit.fetched.leaked,
        })
        .collect();
    StepRecord {
        step: window.step,
        attempt: segment.attempt,
        epoch: window.epoch,
        learning_rate: output.learning_rates.first().copied().unwrap_or(0.0),
        learning_rate_logged: output.learning_rate_logged,
        loss: output.loss,
        loss_raw: output.loss_raw,
        loss_logged: output.loss_logged,
        grad_norm: f64::from(output.clip.norm),
        clip_coefficient: f64::from(output.clip.coefficient),
        update_norm: output.update_norm,
        loss_scale: output.loss_scale,
        skipped: output.skipped,
        nonfinite: output.nonfinite,
        micro_batches,
    }
}
