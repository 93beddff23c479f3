//! The log spikes and the unchanged replay does not: a fault, another trainer, or chaos?

use super::evidence::Match;
use super::height::{self, Point};
use super::investigate::Tried;
use super::investigate::{Bench, EARLY};
use super::laboratory::step_of;
use super::{CurvePoint, Envelope, SpikeKind, departure, hardware, plan};
use crate::Result;
use crate::error::Kind;
use crate::replay::{Intervention, Start, StepRecord};

/// Further steps when the unchanged replay does not show it where the log has it.
const LATE: u64 = 8;
const PERTURBED: u64 = 2;
/// Beyond so many steps one of them has to do.
const SHORT: u64 = 8;
/// |ln| within which another trainer's bookkeeping gives the logged loss.
const SAME: f64 = 0.02;
/// Excursions below this (in ln) are the usual wandering of a gradient norm.
const TURBULENT: f64 = 1.6;

impl Bench<'_, '_> {
    /// The log spikes and the replay does not: does it part right there, and what does the next checkpoint say?
    pub(super) fn absent(&mut self) -> Result<()> {
        if self.found.kind == SpikeKind::Level {
            self.other_trainers()?;
            return Ok(());
        }
        let exactly = departure::parts_exactly(&self.out.differences, self.found.step);
        self.out.evidence.baseline.parts_exactly = exactly.is_some();
        let step = exactly.unwrap_or_else(|| departure::broken_from(&self.out.differences, self.found.step));
        if step < self.found.step {
            self.out.evidence.baseline.before = departure::before(&self.out.differences, step, self.subject.floor());
        }
        let none = Envelope { loss: 0.0, grad_norm: 0.0 };
        let sudden = exactly.is_some() || departure::departs_at(&self.out.differences, step, none);
        let spread = self.perturbed(if sudden { self.to } else { self.to + LATE })?;
        let baseline = &mut self.out.evidence.baseline;
        baseline.departs_at_spike = exactly.is_some() || departure::departs_at(&self.out.differences, step, spread);
        if !baseline.departs_at_spike || baseline.before != Match::Close {
            self.turbulence();
            return Ok(());
        }
        if self.other_trainers()? {
            return Ok(());
        }
        self.out.evidence.baseline.matches_after = self.matches_after()?;
        if !self.out.evidence.baseline.is_chaotic() {
            // The device that is to convict another one is heard first.
            self.out.evidence.baseline.arithmetic = match self.lab.arithmetic(step) {
                Err(error) if error.kind == Kind::Interrupted => return Err(error),
                asked => asked.unwrap_or(None),
            };
            self.out.evidence.fault =
                Some(hardware::locate(self.subject, self.lab, &self.near, (step, false), self.budget)?);
        }
        Ok(())
    }

    /// On the edge of stability rounding decides which excursion grows into the spike; the excursions themselves are
    /// there in every replay, first in the gradient norm. From here on a change counts that calms them.
    fn turbulence(&mut self) {
        if !matches!(self.found.kind, SpikeKind::Jump | SpikeKind::Divergence) {
            return;
        }
        let replays = self.out.experiments.iter();
        let highest = replays.map(|e| self.turbulence_of(&e.curve)).fold(0.0, f64::max);
        if highest < TURBULENT {
            return;
        }
        self.turbulent = true;
        let evidence = &mut self.out.evidence;
        evidence.logged_height = highest;
        evidence.baseline.height = Some(highest);
        evidence.baseline.before = match evidence.baseline.before {
            Match::Off => Match::Off,
            _ => Match::Band,
        };
    }

    pub(super) fn turbulence_of(&self, curve: &[CurvePoint]) -> f64 {
        let first = curve.first().map_or(u64::MAX, |p| p.step);
        let point = |p: &CurvePoint| Point {
            step: p.step,
            loss: p.loss,
            grad_norm: p.grad_norm,
            skipped: false,
            unlabelled: false,
        };
        let points: Vec<Point> = curve.iter().map(point).collect();
        let history: Vec<Point> = self.subject.points.iter().filter(|p| p.step < first).copied().collect();
        let range = self.onset.saturating_sub(LATE).max(1)..=self.to;
        let of = |kind| height::of(kind, &points, &history, range.clone());
        of(SpikeKind::GradientExplosion).max(of(SpikeKind::Jump))
    }

    /// Replays with half an ulp of noise: does rounding decide whether the spike comes? Returns how far they part
    /// from the unchanged replay at the spike's step, in ln.
    fn perturbed(&mut self, to: u64) -> Result<Envelope> {
        let (step, to) = (self.found.step, to.min(self.subject.last_step()));
        let at = |steps: &[StepRecord]| {
            steps.iter().find(|r| r.step == step).map_or((f64::NAN, f64::NAN), |r| (r.loss_raw, r.grad_norm))
        };
        let unchanged = at(&self.out.baseline);
        let mut spread = Envelope { loss: 0.0, grad_norm: 0.0 };
        for seed in 0..PERTURBED {
            // One that spikes says that rounding decides; the second is for a run that looks quiet.
            let decided = self.out.evidence.baseline.perturbed_with_spike > 0;
            let windows = to - step_of(&self.near);
            if decided || (seed > 0 && windows > SHORT) || !self.budget.allows(windows) {
                break;
            }
            let trace = self.lab.replay(&self.near, to, &[Intervention::Perturb { seed }])?;
            let points: Vec<Point> = trace.steps.iter().map(Point::replayed).collect();
            let early = self.onset.saturating_sub(EARLY).max(1);
            let height = height::of(self.found.kind, &points, &self.history(), early..=to);
            let windows = trace.steps.len() as u64;
            self.budget.used += windows;
            let baseline = &mut self.out.evidence.baseline;
            baseline.perturbed += 1;
            baseline.perturbed_with_spike += usize::from(height >= 0.5 * self.found.height);
            let (loss, norm) = at(&trace.steps);
            spread.loss = spread.loss.max(departure::distance(loss, unchanged.0));
            spread.grad_norm = spread.grad_norm.max(departure::distance(norm, unchanged.1));
            self.record(&format!("perturbed, seed {seed}"), None, &Default::default(), height, windows, &trace);
        }
        Ok(spread)
    }

    /// Whether a replay from the first checkpoint after the spike follows the log.
    fn matches_after(&mut self) -> Result<bool> {
        let next = self.subject.run.checkpoints.iter().find(|c| c.step >= self.found.step && c.has_optimizer);
        let Some(checkpoint) = next.filter(|c| c.step < self.subject.last_step()) else { return Ok(false) };
        let (from, to) = (checkpoint.step, (checkpoint.step + 2).min(self.subject.last_step()));
        let trace = self.unchanged(&Start::Checkpoint(from), to)?;
        let points: Vec<Point> = trace.steps.iter().map(Point::comparable).collect();
        let differences = departure::differences(&points, &self.subject.points, self.subject.rounding());
        Ok(departure::matches(&differences, self.subject.floor()))
    }

    /// Trainers with another bookkeeping: does one of them give the logged step?
    fn other_trainers(&mut self) -> Result<bool> {
        let step = self.found.step;
        let logged = self.subject.points.iter().find(|p| p.step == step).map_or(f64::NAN, |p| p.loss);
        for proposal in plan::other_trainers(self.subject, &self.out.baseline, step) {
            if !self.budget.allows(1) {
                break;
            }
            let trace = match self.lab.replay(&self.near, step, &proposal.interventions) {
                Err(error) if error.kind == Kind::Interrupted => return Err(error),
                Err(_) => continue,
                Ok(trace) => trace,
            };
            self.budget.used += 1;
            if trace.steps == self.out.baseline[..trace.steps.len().min(self.out.baseline.len())] {
                continue;
            }
            let at = trace.steps.iter().find(|r| r.step == step).map_or(f64::NAN, |r| Point::comparable(r).loss);
            let distance = departure::distance(at, logged);
            let interventions = proposal.interventions.clone();
            self.push_trial(Tried { proposal, start: self.near.clone(), interventions }, distance, 1, &trace);
            if distance <= SAME {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
