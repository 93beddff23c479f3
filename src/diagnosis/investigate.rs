//! One spike, from the log to its evidence: baseline, suspects, trials, learning rates, perturbed replays.
//!
//! Drives the [`Laboratory`]; what to try is `plan.rs`', what it means `verdict.rs`'.

use std::ops::RangeInclusive;

use super::detect::{self, Found};
use super::evidence::{Baseline, Evidence, Match, Trial};
use super::height::{self, Point};
use super::laboratory::{Laboratory, Subject, step_of};
use super::plan::{self, From, Proposal, Situation};
use super::route::Route;
use super::rows::Suspect;
use super::{Cause, CurvePoint, Experiment, SpikeKind, departure};
use crate::replay::{Intervention, Start, StepRecord, Trace};
use crate::{Result, error::Kind};

/// Steps past a spike's first that belong to it.
pub const PAST: u64 = 4;
/// Steps before it in which a counterfactual's spike still counts as this one: chaos moves it.
pub(super) const EARLY: u64 = 2;
/// Factors on the learning rate that decide whether it is a cause at all: one replay usually does.
const RATES: [f64; 2] = [0.1, 0.02];
/// Halvings (in ln) of the interval between the stable and the unstable factor.
const REFINEMENTS: usize = 3;

/// Replay that experiments may still use, and what was used. Time plays no part unless the user gives some.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Optimizer steps replayed under changes.
    pub used: u64,
    /// Optimizer steps of the unchanged run, replayed to reproduce spikes and to start experiments from.
    pub baseline: u64,
    /// Optimizer steps of the fix's proof.
    pub proof: u64,
    pub limit: u64,
    until: Option<std::time::Instant>,
}

impl Budget {
    /// `windows` optimizer steps; beyond them only until `seconds` are over.
    pub fn new(windows: u64, seconds: Option<f64>) -> Self {
        let until = seconds.map(|s| std::time::Instant::now() + std::time::Duration::from_secs_f64(s));
        Self { used: 0, baseline: 0, proof: 0, limit: windows, until }
    }
    pub fn allows(&self, windows: u64) -> bool {
        self.used + windows <= self.limit || self.until.is_some_and(|until| std::time::Instant::now() < until)
    }
}

/// What came of it.
#[derive(Debug)]
pub struct Investigation {
    pub evidence: Evidence,
    pub experiments: Vec<Experiment>,
    pub baseline: Vec<StepRecord>,
    pub start: Option<Start>,
    /// Why nothing was replayed.
    pub failure: Option<crate::Error>,
    pub differences: Vec<departure::Difference>,
    /// The replay behind each trial, in the order of `evidence.trials`.
    pub tried: Vec<Tried>,
}

/// How a trial was replayed: what the fix's proof repeats.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    pub proposal: Proposal,
    pub start: Start,
    /// Of the proposal, with the step after which they act.
    pub interventions: Vec<Intervention>,
}

pub(super) struct Bench<'a, 'r> {
    pub(super) subject: &'a Subject<'r>,
    pub(super) lab: &'a mut dyn Laboratory,
    pub(super) budget: &'a mut Budget,
    pub(super) found: Found,
    pub(super) only: Option<Cause>,
    /// Heights are those of the excursions before the spike, because the spike itself is chaos.
    pub(super) turbulent: bool,
    pub(super) starts: Vec<Start>,
    pub(super) near: Start,
    /// First step whose loss went into the spike's log row.
    pub(super) onset: u64,
    pub(super) to: u64,
    pub(super) out: Investigation,
}

/// Everything that can be known about one spike. `only`: the cause of a larger spike of the same run; nothing else
/// is tried then.
///
/// # Errors
/// Only Ctrl-C; what cannot be replayed becomes evidence of that.
pub fn investigate(
    subject: &Subject<'_>,
    lab: &mut dyn Laboratory,
    found: &Found,
    only: Option<Cause>,
    budget: &mut Budget,
) -> Result<Investigation> {
    let window = subject.rows.get(found.index).map_or(1, |row| row.window.max(1));
    let onset = (found.step + 1).saturating_sub(window).max(1);
    let starts = subject.starts_before(onset);
    // The nearest state from which one step before the spike can still be compared: every further step adds chaos.
    let near = starts.iter().find(|s| step_of(s) + 2 <= onset).or(starts.last()).cloned().unwrap_or(Start::Initial);
    let to = (found.step + PAST).min(subject.last_step().max(found.step));
    let out = empty(subject, found, only);
    let mut bench = Bench { subject, lab, budget, found: *found, only, turbulent: false, starts, near, onset, to, out };
    match bench.run() {
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Err(error) => bench.out.failure = Some(error),
        Ok(()) => {}
    }
    Ok(bench.out)
}

fn empty(subject: &Subject<'_>, found: &Found, only: Option<Cause>) -> Investigation {
    let before = if found.kind == SpikeKind::GradientExplosion {
        subject.points.iter().rev().find(|p| p.step < found.step).map(|p| p.loss)
    } else {
        found.before
    };
    let evidence = Evidence {
        step: found.step,
        kind: found.kind,
        logged_height: found.height,
        baseline: Baseline {
            height: None,
            before: Match::Nothing,
            departs_at_spike: false,
            parts_exactly: false,
            perturbed: 0,
            perturbed_with_spike: 0,
            matches_after: false,
            arithmetic: None,
        },
        trials: Vec::new(),
        window_without_labels: false,
        window_always_high: false,
        rows: Vec::new(),
        fault: None,
        unaffordable: None,
        only,
        harmful: height::harmful(&subject.points, found.step, found.until, before),
    };
    Investigation {
        evidence,
        experiments: Vec::new(),
        baseline: Vec::new(),
        start: None,
        failure: None,
        differences: Vec::new(),
        tried: Vec::new(),
    }
}

impl Bench<'_, '_> {
    fn run(&mut self) -> Result<()> {
        self.baseline()?;
        let evidence = &self.out.evidence;
        let (reproduced, level) = (evidence.reproduced(), self.found.kind == SpikeKind::Level);
        if self.found.kind == SpikeKind::GradientExplosion && !evidence.harmful && reproduced {
            return Ok(());
        }
        if !reproduced {
            self.absent()?;
        }
        let mut suspects = if level { Vec::new() } else { self.suspects()? };
        // Without its only row a window has no loss at all, so that leaving it out proves nothing.
        if !suspects.is_empty() && !self.out.evidence.harmful && suspects.iter().all(|s| self.hard_window(s)) {
            self.out.evidence.window_always_high = true;
            suspects.clear();
        }
        self.blame(&suspects);
        let evidence = &self.out.evidence;
        if suspects.is_empty() && evidence.reproduced() && !evidence.window_always_high {
            self.out.evidence.window_always_high = self.always_high()?;
        }
        self.trials(&suspects)?;
        let evidence = &self.out.evidence;
        // What one row or one window does, a lower learning rate cannot undo.
        let certain = evidence.trials.iter().any(|t| t.cause <= Cause::Data && evidence.removes(t));
        let decided = level || certain || evidence.window_without_labels || evidence.unaffordable.is_some();
        if self.out.evidence.reproduced() && !decided && self.wants(Cause::LearningRate) {
            self.learning_rates()?;
        }
        Ok(())
    }

    fn wants(&self, cause: Cause) -> bool {
        self.only.is_none_or(|only| only == cause)
    }

    pub(super) fn range(&self) -> RangeInclusive<u64> {
        match self.found.kind {
            SpikeKind::Jump | SpikeKind::Divergence => self.onset.saturating_sub(EARLY).max(1)..=self.to,
            _ => self.onset..=self.to,
        }
    }

    pub(super) fn height(&self, trace: &Trace) -> f64 {
        if self.turbulent {
            return self.turbulence_of(&curve(trace));
        }
        if self.found.kind == SpikeKind::Level {
            // Not a rise but a factor: over what one accumulation step less would log.
            let first = trace.steps.first().map_or(f64::NAN, |r| r.loss_raw);
            return detect::height(first, self.found.before.unwrap_or(f64::NAN));
        }
        let points: Vec<Point> = trace.steps.iter().map(Point::replayed).collect();
        height::of(self.found.kind, &points, &self.history(), self.range())
    }

    /// The replayed baseline, and the log where it has no step.
    pub(super) fn history(&self) -> Vec<Point> {
        let first = self.out.baseline.first().map_or(u64::MAX, |r| r.step);
        let logged = self.subject.points.iter().filter(|p| p.step < first).copied();
        logged.chain(self.out.baseline.iter().map(Point::replayed)).collect()
    }

    fn baseline(&mut self) -> Result<()> {
        let mut trace = self.unchanged(&self.near.clone(), self.to)?;
        self.out.baseline.clone_from(&trace.steps);
        let mut height = self.height(&trace);
        let shown = height >= 0.5 * self.found.height;
        // A replay that parts after bits that were all equal is no chaos: a nearer state would be part of the damage.
        let parted = departure::parts_exactly(&self.differences(&trace), self.found.step).is_some();
        if !shown && !parted && matches!(self.found.kind, SpikeKind::Jump | SpikeKind::Divergence) {
            // The nearest state of all, if there is one nearer: one step of chaos less.
            let nearest = self.starts.first().cloned().unwrap_or(Start::Initial);
            if nearest != self.near {
                let nearer = self.unchanged(&nearest, self.to)?;
                let nearer_height = self.height(&nearer);
                if nearer_height >= 0.5 * self.found.height {
                    (trace, height, self.near) = (nearer, nearer_height, nearest);
                }
            }
        }
        let differences = self.differences(&trace);
        let mut before = departure::before(&differences, self.found.step, self.subject.floor());
        if before == Match::Off && self.is_the_run(&differences)? {
            before = Match::Band;
        }
        let baseline = &mut self.out.evidence.baseline;
        baseline.height = Some(height);
        baseline.before = before;
        let mut at_spike = trace.steps.iter().filter(|r| r.step == self.found.step);
        self.out.evidence.window_without_labels = at_spike.any(|r| Point::comparable(r).unlabelled);
        self.out.start = Some(self.near.clone());
        self.out.differences = differences;
        self.out.baseline.clone_from(&trace.steps);
        self.record("baseline", None, &Default::default(), height, 0, &trace);
        Ok(())
    }

    /// The replay parts from the log, but begins on its line: the inputs are the run's, what parted them is chaos.
    fn is_the_run(&mut self, differences: &[departure::Difference]) -> Result<bool> {
        let floor = self.subject.floor();
        if departure::begins_close(differences, floor) {
            return Ok(true);
        }
        if self.near == Start::Initial {
            return Ok(false);
        }
        let trace = self.unchanged(&Start::Initial, departure::BEGINNING as u64)?;
        Ok(departure::begins_close(&self.differences(&trace), floor))
    }

    /// `trace` against the log.
    fn differences(&self, trace: &Trace) -> Vec<departure::Difference> {
        let replayed: Vec<Point> = trace.steps.iter().map(Point::comparable).collect();
        departure::differences(&replayed, &self.subject.points, self.subject.rounding())
    }

    pub(super) fn unchanged(&mut self, start: &Start, to: u64) -> Result<Trace> {
        let trace = self.lab.replay(start, to, &[])?;
        self.budget.baseline += trace.steps.len() as u64;
        Ok(trace)
    }

    fn trials(&mut self, suspects: &[Suspect]) -> Result<()> {
        let baseline = self.out.baseline.clone();
        let situation = Situation { step: self.found.step, kind: self.found.kind, baseline: &baseline, suspects };
        let mut proposals = plan::proposals(self.subject, &situation);
        if self.out.evidence.window_without_labels {
            proposals.retain(|p| p.cause == Cause::MaskedLabels);
        }
        if self.found.kind == SpikeKind::Level {
            proposals.retain(|p| p.cause == Cause::TrainerBookkeeping);
        }
        proposals.retain(|p| self.wants(p.cause));
        for proposal in &proposals {
            // They come most specific first: what follows one that suffices cannot be the verdict.
            if self.settled() {
                break;
            }
            let tried = self.out.tried.len();
            // A restart of the schedule: the run without it from the beginning; where that is too far, or another run
            // with jumps of its own, the rate held from there on.
            let restart = proposal.cause == Cause::Schedule && proposal.from == From::Initial;
            if !restart || self.budget.allows(self.to) {
                self.try_out(proposal)?;
            }
            if let Some(held) = plan::held(self.subject, &situation).filter(|_| restart && !self.settled()) {
                let before = self.out.tried.len();
                self.try_out(&held)?;
                if self.out.tried.len() == before && !self.affordable(&held) {
                    self.out.evidence.unaffordable = Some(held.name);
                    break;
                }
            }
            // Without it, a less specific change that suffices would be named in its place.
            if self.out.tried.len() == tried && !self.affordable(proposal) {
                self.out.evidence.unaffordable = Some(proposal.name.clone());
                break;
            }
        }
        Ok(())
    }

    fn affordable(&self, proposal: &Proposal) -> bool {
        self.routes(proposal).first().is_none_or(|route| self.budget.allows(self.cost(proposal, route)))
    }

    /// A cause is at hand.
    fn settled(&self) -> bool {
        self.out.evidence.trials.iter().any(|t| self.out.evidence.removes(t))
    }

    /// Replays a proposal; from further back when the nearest start point is already part of the damage.
    fn try_out(&mut self, proposal: &Proposal) -> Result<()> {
        for route in self.routes(proposal) {
            if route.back && self.only.is_some() {
                break;
            }
            if self.travel(proposal, &route)?.is_some_and(|tried| tried.1) {
                break;
            }
        }
        Ok(())
    }

    /// Height and whether the spike is gone; `None` where the budget or the change does not allow the replay.
    fn travel(&mut self, proposal: &Proposal, route: &Route) -> Result<Option<(f64, bool)>> {
        if !self.budget.allows(self.cost(proposal, route)) {
            return Ok(None);
        }
        let mut interventions = proposal.interventions.clone();
        interventions.extend(route.after.map(Intervention::After));
        let trace = match self.lab.replay(&route.start, self.to, &interventions) {
            Err(error) if error.kind == Kind::Interrupted => return Err(error),
            // A change that cannot be replayed is no evidence either way.
            Err(_) => return Ok(None),
            Ok(trace) => trace,
        };
        let height = self.height(&trace);
        let windows = self.own_windows(route, &trace);
        self.budget.used += windows;
        self.budget.baseline += if route.start == self.near { 0 } else { trace.steps.len() as u64 - windows };
        let tried = Tried { proposal: proposal.clone(), start: route.start.clone(), interventions };
        Ok(Some((height, self.push_trial(tried, height, windows, &trace))))
    }

    /// Whether it removes the spike.
    pub(super) fn push_trial(&mut self, tried: Tried, height: f64, windows: u64, trace: &Trace) -> bool {
        let proposal = &tried.proposal;
        let trial = Trial {
            cause: proposal.cause,
            name: proposal.name.clone(),
            changes: proposal.changes.clone(),
            height,
            windows,
        };
        let removed = self.out.evidence.removes(&trial);
        self.out.evidence.trials.push(trial);
        self.record(&proposal.name, Some(proposal.cause), &proposal.changes, height, windows, trace);
        self.out.tried.push(tried);
        removed
    }

    /// Whether a learning rate far below removes the spike, then the largest that does, as far as the budget goes.
    fn learning_rates(&mut self) -> Result<()> {
        // Stable is more than half removed: a loss that still doubles is not.
        let limit = f64::ln(2.0).min(0.5 * self.out.evidence.reference_height());
        let settled = self.settled();
        let proposal = |factor| plan::scaled_learning_rate(self.subject, factor, From::Near);
        let routes = self.routes(&proposal(1.0));
        // With a more specific cause at hand it is only asked whether this would also do.
        let alone = self.only.is_some() || settled;
        let routes: Vec<&Route> = routes.iter().filter(|r| !(r.back && alone)).collect();
        let mut found = None;
        'routes: for route in routes {
            let mut unstable = 1.0;
            for factor in RATES {
                match self.travel(&proposal(factor), route)? {
                    Some((height, _)) if height <= limit => {
                        found = Some((route, factor, unstable));
                        break 'routes;
                    }
                    Some(_) if !alone => unstable = factor,
                    _ => break,
                }
            }
        }
        let Some((route, mut low, mut unstable)) = found.filter(|_| !alone) else { return Ok(()) };
        for _ in 0..REFINEMENTS {
            let middle = f64::sqrt(low * unstable);
            match self.travel(&proposal(middle), route)? {
                Some((height, _)) if height <= limit => low = middle,
                Some(_) => unstable = middle,
                None => break,
            }
        }
        Ok(())
    }

    pub(super) fn record(
        &mut self,
        name: &str,
        cause: Option<Cause>,
        changes: &std::collections::BTreeMap<String, serde_json::Value>,
        height: f64,
        windows: u64,
        trace: &Trace,
    ) {
        self.out.experiments.push(Experiment {
            name: name.to_string(),
            changes: changes.clone(),
            height,
            removed: cause.is_some() && height <= 0.5 * self.out.evidence.reference_height(),
            cause,
            windows,
            curve: curve(trace),
        });
    }
}

/// Loss and gradient norm by step.
fn curve(trace: &Trace) -> Vec<CurvePoint> {
    let point = |r: &StepRecord| CurvePoint { step: r.step, loss: r.loss_raw, grad_norm: r.grad_norm };
    trace.steps.iter().map(point).collect()
}
