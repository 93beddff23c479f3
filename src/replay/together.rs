//! Several settings of a run replayed in step with each other, for what their steps have in common.
//!
//! Owns what is shared: replays whose next step has the same rows and the same weights need one pass. Each gets the bits
//! of a replay of its own.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::replayer::no_such_step;
use super::scene::Scene;
use super::walk::{Planned, Walk, ragged};
use super::{Intervention, Replayer, Start, StepRecord, start};
use crate::model::{Adapter, Gradients};
use crate::step::{self, StepInput, StepOutput};
use crate::{Result, interrupt};

/// One of several replays in step.
struct Running<'a> {
    index: usize,
    walk: Walk<'a>,
}

impl Replayer {
    /// Replays each of `settings` from `start` to its step `to`. `told` hears of every step of each (by index) and may
    /// end that one. Nothing is remembered, on disk or in memory.
    ///
    /// # Errors
    /// As [`Replayer::replay`]; the first error of any ends all.
    pub fn replay_together(
        &self,
        start: &Start,
        settings: &[(Vec<Intervention>, u64)],
        told: &mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>,
    ) -> Result<()> {
        let scenes = settings.iter().map(|(set, _)| self.scene_for(set)).collect::<Result<Vec<Arc<Scene>>>>()?;
        let mut running = Vec::with_capacity(settings.len());
        for (index, ((interventions, to), scene)) in settings.iter().zip(&scenes).enumerate() {
            let (state, segment) = start::start_state(scene, start)?;
            if *to <= state.step || scene.segment(*to).is_none() {
                return Err(no_such_step(scene, *to));
            }
            running.push(Running { index, walk: Walk::new(self, scene, interventions, (state, segment), start)? });
        }
        while !running.is_empty() {
            interrupt::check()?;
            let mut records = next_steps(&mut running)?.into_iter();
            running.retain(|one| {
                let goes_on = records.next().is_some_and(|record| told(one.index, &record).is_continue());
                goes_on && one.walk.state.step < settings[one.index].1
            });
        }
        Ok(())
    }
}

/// One step of each; records in their order.
fn next_steps(running: &mut [Running<'_>]) -> Result<Vec<StepRecord>> {
    let planned = running.iter_mut().map(|one| one.walk.begin_step()).collect::<Result<Vec<_>>>()?;
    let mut records: Vec<Option<StepRecord>> = vec![None; running.len()];
    let mut left: Vec<usize> = (0..running.len()).collect();
    while let Some(&first) = left.first() {
        let like_first =
            |&i: &usize| same_rows((&running[first].walk, &planned[first]), (&running[i].walk, &planned[i]));
        let (bunch, others): (Vec<usize>, Vec<usize>) = left.into_iter().partition(like_first);
        left = others;
        let outputs =
            step_bunch(running, &planned, &bunch).map_err(|e| e.at(format!("step {}", planned[first].window.step)))?;
        for (i, output) in bunch.into_iter().zip(outputs) {
            records[i] = Some(running[i].walk.end_step(&planned[i], &output)?);
        }
    }
    Ok(records.into_iter().flatten().collect())
}

/// Whether two steps feed the same rows, in the same way, to the same frozen weights.
fn same_rows((one, a): (&Walk<'_>, &Planned), (other, b): (&Walk<'_>, &Planned)) -> bool {
    Arc::ptr_eq(&one.scene.engine, &other.scene.engine)
        && Arc::ptr_eq(&one.scene.corpus, &other.scene.corpus)
        && a.window.micro_batches == b.window.micro_batches
        && a.options == b.options
}

/// The steps of replays with the same rows.
fn step_bunch(running: &mut [Running<'_>], planned: &[Planned], bunch: &[usize]) -> Result<Vec<StepOutput>> {
    let Planned { window, options, .. } = &planned[bunch[0]];
    let scene = running[bunch[0]].walk.scene;
    let batch = ragged(scene, window, options)?;
    let input = |i: usize| {
        let learning_rates = planned[i].learning_rates.clone();
        StepInput { window: &planned[i].window, batch: &batch, options, learning_rates }
    };
    // Each with other weights or other seeds than those before it needs a pass; the rest take theirs.
    let (mut passes, mut pass_of): (Vec<(&Adapter, Vec<f32>)>, Vec<usize>) = (Vec::new(), Vec::new());
    for &i in bunch {
        let Walk { segment, state, .. } = &running[i].walk;
        let seeds = step::seeds(&segment.rules, state, &input(i))?;
        let mut known = None;
        for (pass, (adapter, theirs)) in passes.iter().enumerate() {
            if seeds == *theirs && state.adapter.equals(adapter, scene.engine.device())? {
                known = Some(pass);
                break;
            }
        }
        pass_of.push(known.unwrap_or(passes.len()));
        if known.is_none() {
            passes.push((&state.adapter, seeds));
        }
    }
    let pass = |(adapter, seeds): &(&Adapter, Vec<f32>)| {
        let mut gradients = Gradients::of_ranks(scene.engine.device(), adapter, step::ranks(window))?;
        Ok((scene.engine.pass(adapter, &batch, seeds, options, &mut gradients)?, gradients))
    };
    let passed = passes.iter().map(pass).collect::<Result<Vec<_>>>()?;
    let finish = |(&i, pass): (&usize, usize)| {
        let Walk { segment, state, .. } = &mut running[i].walk;
        let (output, gradients) = &passed[pass];
        step::finish(&scene.engine, &segment.rules, state, &input(i), output.clone(), gradients)
    };
    bunch.iter().zip(pass_of).map(finish).collect()
}
