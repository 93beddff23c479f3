//! One spike, from the log to its evidence: baseline, suspects, trials, learning rates, perturbed replays.
//!
//! Drives the [`Laboratory`]; what to try is `plan.rs`', what it means `verdict.rs`'.

use std::ops::RangeInclusive;

use super::detect::{self, Found};
use super::evidence::{Baseline, Evidence, Match, Trial};
use super::height::{self, Point};
use super::laboratory::{Laboratory, Subject, step_of};
use super::plan::{self, From, Proposal, Situation};
use super::rows::{self, Suspect};
use super::{Cause, CurvePoint, Envelope, Experiment, RowBlame, SpikeKind, departure, hardware};
use crate::replay::{Intervention, Start, StepRecord, Trace};
use crate::{Result, error::Kind};

/// Steps past a spike's first that belong to it.
pub const PAST: u64 = 4;
/// Steps before it in which a counterfactual's spike still counts as this one: chaos moves it.
const EARLY: u64 = 2;
/// Further steps when the unchanged replay does not show it where the log has it.
const LATE: u64 = 8;
/// Factors on the learning rate that decide whether it is a cause at all: one replay usually does.
const RATES: [f64; 2] = [0.1, 0.02];
/// Halvings (in ln) of the interval between the stable and the unstable factor.
const REFINEMENTS: usize = 3;
/// Trials that a spike may cost whatever the budget says.
const TRIALS: u64 = 3;
const PERTURBED: u64 = 2;
/// Excursions below this (in ln) are the usual wandering of a gradient norm.
const TURBULENT: f64 = 1.6;
/// |ln| within which another trainer's bookkeeping gives the logged loss.
const SAME: f64 = 0.02;

/// Replay that experiments may still use.
#[derive(Debug, Clone)]
pub struct Budget {
    pub used: u64,
    limit: u64,
    until: std::time::Instant,
}

impl Budget {
    /// `windows` optimizer steps; beyond them only until `seconds` are over.
    pub fn new(windows: u64, seconds: f64) -> Self {
        let until = std::time::Instant::now() + std::time::Duration::from_secs_f64(seconds);
        Self { used: 0, limit: windows, until }
    }
    fn allows(&self, windows: u64) -> bool {
        self.used + windows <= self.limit || std::time::Instant::now() < self.until
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
    /// The proposal behind each trial, in the order of `evidence.trials`.
    pub proposals: Vec<Proposal>,
}

struct Bench<'a, 'r> {
    subject: &'a Subject<'r>,
    lab: &'a mut dyn Laboratory,
    budget: &'a mut Budget,
    found: Found,
    only: Option<Cause>,
    /// Heights are those of the excursions before the spike, because the spike itself is chaos.
    turbulent: bool,
    /// The last change that removed the spike had to begin at the initial adapter.
    far: bool,
    starts: Vec<Start>,
    near: Start,
    /// First step whose loss went into the spike's log row.
    onset: u64,
    to: u64,
    out: Investigation,
}

/// Everything that can be known about one spike. `only`: the cause of a higher spike of the same run; nothing else
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
    let out = empty(subject, found);
    // Far from any checkpoint one trial alone may exceed the budget; a verdict needs a few.
    let trials = if only.is_none() { TRIALS } else { 1 };
    budget.limit = budget.limit.max(budget.used + trials * (to - step_of(&near)));
    let mut bench =
        Bench { subject, lab, budget, found: *found, only, turbulent: false, far: false, starts, near, onset, to, out };
    match bench.run() {
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Err(error) => bench.out.failure = Some(error),
        Ok(()) => {}
    }
    Ok(bench.out)
}

fn empty(subject: &Subject<'_>, found: &Found) -> Investigation {
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
            perturbed: 0,
            perturbed_with_spike: 0,
            matches_after: false,
        },
        trials: Vec::new(),
        window_without_labels: false,
        window_always_high: false,
        rows: Vec::new(),
        fault: None,
        harmful: height::harmful(&subject.points, found.step, found.until, before),
    };
    Investigation {
        evidence,
        experiments: Vec::new(),
        baseline: Vec::new(),
        start: None,
        failure: None,
        differences: Vec::new(),
        proposals: Vec::new(),
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
        let suspects = if level { Vec::new() } else { self.suspects()? };
        self.blame(&suspects);
        if suspects.is_empty() && self.out.evidence.reproduced() {
            self.out.evidence.window_always_high = self.always_high()?;
        }
        self.trials(&suspects)?;
        let decided = level || self.out.evidence.window_without_labels;
        if self.out.evidence.reproduced() && !decided && self.wants(Cause::LearningRate) {
            self.learning_rates()?;
        }
        Ok(())
    }

    fn wants(&self, cause: Cause) -> bool {
        self.only.is_none_or(|only| only == cause)
    }

    fn range(&self) -> RangeInclusive<u64> {
        match self.found.kind {
            SpikeKind::Jump | SpikeKind::Divergence => self.onset.saturating_sub(EARLY).max(1)..=self.to,
            _ => self.onset..=self.to,
        }
    }

    fn height(&self, trace: &Trace) -> f64 {
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
    fn history(&self) -> Vec<Point> {
        let first = self.out.baseline.first().map_or(u64::MAX, |r| r.step);
        let logged = self.subject.points.iter().filter(|p| p.step < first).copied();
        logged.chain(self.out.baseline.iter().map(Point::replayed)).collect()
    }

    fn baseline(&mut self) -> Result<()> {
        let mut trace = self.lab.replay(&self.near, self.to, &[])?;
        self.out.baseline.clone_from(&trace.steps);
        let mut height = self.height(&trace);
        let shown = height >= 0.5 * self.found.height;
        if !shown && matches!(self.found.kind, SpikeKind::Jump | SpikeKind::Divergence) {
            // The nearest state of all, if there is one nearer: one step of chaos less.
            let nearest = self.starts.first().cloned().unwrap_or(Start::Initial);
            if nearest != self.near {
                let nearer = self.lab.replay(&nearest, self.to, &[])?;
                let nearer_height = self.height(&nearer);
                if nearer_height >= 0.5 * self.found.height {
                    (trace, height, self.near) = (nearer, nearer_height, nearest);
                }
            }
        }
        let replayed: Vec<Point> = trace.steps.iter().map(Point::comparable).collect();
        let differences = departure::differences(&replayed, &self.subject.points, self.subject.rounding());
        let baseline = &mut self.out.evidence.baseline;
        baseline.height = Some(height);
        baseline.before = departure::before(&differences, self.found.step, self.subject.floor());
        self.out.evidence.window_without_labels = replayed.iter().any(|p| p.step == self.found.step && p.unlabelled);
        self.out.start = Some(self.near.clone());
        self.out.differences = differences;
        self.out.baseline.clone_from(&trace.steps);
        self.record("baseline", None, &Default::default(), height, 0, &trace);
        Ok(())
    }

    /// The log spikes and the replay does not: does it part right there, and what does the next checkpoint say?
    fn absent(&mut self) -> Result<()> {
        let step = self.found.step;
        if self.found.kind == SpikeKind::Level {
            self.other_trainers()?;
            return Ok(());
        }
        let none = Envelope { loss: 0.0, grad_norm: 0.0 };
        let sudden = departure::departs_at(&self.out.differences, step, none);
        let spread = self.perturbed(if sudden { self.to } else { self.to + LATE })?;
        let baseline = &mut self.out.evidence.baseline;
        baseline.departs_at_spike = departure::departs_at(&self.out.differences, step, spread);
        if !baseline.departs_at_spike || baseline.before != Match::Close {
            self.turbulence();
            return Ok(());
        }
        if self.other_trainers()? {
            return Ok(());
        }
        self.out.evidence.baseline.matches_after = self.matches_after()?;
        if self.out.evidence.baseline.perturbed_with_spike == 0 {
            self.out.evidence.fault = Some(hardware::locate(self.subject, self.lab, &self.near, step, self.budget)?);
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

    fn turbulence_of(&self, curve: &[CurvePoint]) -> f64 {
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
        let trace = self.lab.replay(&Start::Checkpoint(from), to, &[])?;
        self.budget.used += trace.steps.len() as u64;
        let points: Vec<Point> = trace.steps.iter().map(Point::comparable).collect();
        let differences = departure::differences(&points, &self.subject.points, self.subject.rounding());
        Ok(departure::matches(&differences, self.subject.floor()))
    }

    /// Micro-batches that stand out in the spike's windows and also in an earlier, sound state.
    fn suspects(&mut self) -> Result<Vec<Suspect>> {
        let (step, until) = (self.found.step, self.found.until.min(self.to));
        let mut suspects = rows::suspects(&self.out.baseline, self.onset.saturating_sub(EARLY).max(1), until.max(step));
        suspects.truncate(6);
        let mut confirmed = Vec::new();
        for suspect in suspects {
            if self.bad_in_another_state(&suspect)? {
                confirmed.push(self.without_bystanders(suspect)?);
            }
        }
        Ok(confirmed)
    }

    /// The 2 × 2 of state and window: the suspect's window run in the state before an earlier step.
    fn bad_in_another_state(&mut self, suspect: &Suspect) -> Result<bool> {
        let first = step_of(&self.near) + 1;
        let Some(earlier) = (first..suspect.step).rev().find(|s| s + 2 <= self.found.step.min(suspect.step)) else {
            // Nothing before it to run it in: another epoch's appearance in the log cannot be separated from damage.
            return Ok(false);
        };
        let change = [Intervention::SwapWindow { step: earlier, with: suspect.step }];
        let trace = self.lab.replay(&self.near, earlier, &change)?;
        self.budget.used += 1;
        let swapped: Vec<StepRecord> = trace.steps.into_iter().filter(|r| r.step == earlier).collect();
        let others = self.out.baseline.iter().filter(|r| r.step < self.found.step && r.step != earlier).cloned();
        let mut steps: Vec<StepRecord> = others.chain(swapped).collect();
        steps.sort_by_key(|r| r.step);
        Ok(rows::suspects(&steps, earlier, earlier).iter().any(|s| s.micro_batch == suspect.micro_batch))
    }

    /// The spike's own window in the state before an earlier step: as high there?
    fn always_high(&mut self) -> Result<bool> {
        let rises = matches!(self.found.kind, SpikeKind::Jump | SpikeKind::Divergence);
        let earlier = self.found.step.saturating_sub(2);
        if !rises || earlier <= step_of(&self.near) {
            return Ok(false);
        }
        let change = [Intervention::SwapWindow { step: earlier, with: self.found.step }];
        let trace = self.lab.replay(&self.near, earlier, &change)?;
        self.budget.used += 1;
        let Some(record) = trace.steps.last().filter(|r| r.step == earlier) else { return Ok(false) };
        let history = self.history();
        let height = height::of(self.found.kind, &[Point::replayed(record)], &history, earlier..=earlier);
        Ok(height >= 0.7 * self.out.evidence.reference_height())
    }

    /// Trainers with another bookkeeping: does one of them give the logged step?
    fn other_trainers(&mut self) -> Result<bool> {
        let step = self.found.step;
        let logged = self.subject.points.iter().find(|p| p.step == step).map_or(f64::NAN, |p| p.loss);
        for proposal in plan::other_trainers(self.subject, &self.out.baseline, step) {
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
            self.push_trial(&proposal, distance, 1, &trace);
            if distance <= SAME {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Of a micro-batch with several rows, those that stand out alone.
    fn without_bystanders(&mut self, suspect: Suspect) -> Result<Suspect> {
        if suspect.rows.len() < 2 {
            return Ok(suspect);
        }
        let mut guilty = Vec::new();
        for &row in &suspect.rows {
            let others: Vec<_> = suspect.rows.iter().copied().filter(|r| *r != row).collect();
            let trace = self.lab.replay(&self.near, suspect.step, &[Intervention::NeutraliseRows(others)])?;
            self.budget.used += 1;
            let stands_out = rows::suspects(&trace.steps, suspect.step, suspect.step);
            if stands_out.iter().any(|s| s.micro_batch == suspect.micro_batch) {
                guilty.push(row);
            }
        }
        let rows = if guilty.is_empty() { suspect.rows.clone() } else { guilty };
        Ok(Suspect { rows, ..suspect })
    }

    fn blame(&mut self, suspects: &[Suspect]) {
        let subject = self.subject;
        let blame = |row, micro_batch, step, reason| RowBlame {
            dataset: subject.dataset_name(row),
            row: row.row,
            micro_batch,
            step,
            tokens: None,
            reason,
        };
        let mut all: Vec<RowBlame> = Vec::new();
        for suspect in suspects {
            let reason = format!("its loss is {:.1} times that of the rows around it", suspect.excess.exp());
            all.extend(suspect.rows.iter().map(|&row| blame(row, suspect.micro_batch, suspect.step, reason.clone())));
        }
        if self.out.evidence.window_without_labels
            && let Some(record) = self.out.baseline.iter().find(|r| r.step == self.found.step)
        {
            for (index, micro) in record.micro_batches.iter().enumerate() {
                let reason = || "all of its labels are masked".to_string();
                all.extend(micro.rows.iter().map(|&row| blame(row, index, record.step, reason())));
            }
        }
        all.sort();
        all.dedup_by(|a, b| a.dataset == b.dataset && a.row == b.row);
        self.out.evidence.rows = all;
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
            // A restart of the schedule: the run without it from the beginning, else the rate held from there on.
            let far = proposal.from == From::Initial && !self.budget.allows(self.to);
            match plan::held(self.subject, &situation).filter(|_| far && proposal.cause == Cause::Schedule) {
                Some(held) => self.try_out(&held)?,
                None => self.try_out(proposal)?,
            };
        }
        Ok(())
    }

    /// Replays a proposal; from further back when the nearest start point is already part of the damage.
    fn try_out(&mut self, proposal: &Proposal) -> Result<f64> {
        let starts = match proposal.from {
            From::Near if self.near == Start::Initial => vec![Start::Initial],
            From::Near => vec![self.near.clone(), Start::Initial],
            From::Before(step) => {
                let earlier = self.subject.starts_before(step);
                let whole = |s: &&Start| match s {
                    Start::Initial => true,
                    Start::Checkpoint(k) => {
                        self.subject.run.checkpoints.iter().any(|c| c.step == *k && c.has_optimizer && c.step < step)
                    }
                };
                vec![earlier.iter().find(whole).cloned().unwrap_or(Start::Initial)]
            }
            From::Initial => vec![Start::Initial],
        };
        let mut best = f64::NAN;
        for start in starts {
            let windows = self.to - step_of(&start);
            let reaches_back = start == Start::Initial && self.near != Start::Initial && proposal.from == From::Near;
            // A change of single rows or of the schedule has no effect before the nearest start.
            let only_near = matches!(proposal.cause, Cause::Data | Cause::Schedule | Cause::MaskedLabels);
            // And with a cause at hand, whether a broader change from the beginning would also do is not worth it.
            let settled = self.only.is_some() || self.out.evidence.trials.iter().any(|t| self.out.evidence.removes(t));
            if (reaches_back && (only_near || settled)) || !self.budget.allows(windows) {
                continue;
            }
            let trace = match self.lab.replay(&start, self.to, &proposal.interventions) {
                Err(error) if error.kind == Kind::Interrupted => return Err(error),
                // A change that cannot be replayed is no evidence either way.
                Err(_) => continue,
                Ok(trace) => trace,
            };
            let height = self.height(&trace);
            let windows = self.own_windows(&start, &trace);
            self.budget.used += windows;
            best = height;
            let removed = self.push_trial(proposal, height, windows, &trace);
            if removed {
                self.far = reaches_back;
                break;
            }
        }
        Ok(best)
    }

    /// Whether it removes the spike.
    fn push_trial(&mut self, proposal: &Proposal, height: f64, windows: u64, trace: &Trace) -> bool {
        let trial = Trial {
            cause: proposal.cause,
            name: proposal.name.clone(),
            changes: proposal.changes.clone(),
            height,
            windows,
        };
        let removed = self.out.evidence.removes(&trial);
        self.out.evidence.trials.push(trial);
        self.out.proposals.push(proposal.clone());
        self.record(&proposal.name, Some(proposal.cause), &proposal.changes, height, windows, trace);
        removed
    }

    /// Steps of a trial that the baseline had not replayed already: all from the first that differs.
    fn own_windows(&self, start: &Start, trace: &Trace) -> u64 {
        let shared = if *start == self.near {
            trace.steps.iter().zip(&self.out.baseline).take_while(|(own, base)| own == base).count()
        } else {
            0
        };
        (trace.steps.len() - shared) as u64
    }

    /// Whether a learning rate far below removes the spike, then the largest that does, as far as the budget goes.
    fn learning_rates(&mut self) -> Result<()> {
        // Stable is more than half removed: a loss that still doubles is not.
        let limit = f64::ln(2.0).min(0.5 * self.out.evidence.reference_height());
        let (mut unstable, mut stable) = (1.0, None);
        for factor in RATES {
            let proposal = plan::scaled_learning_rate(self.subject, factor, From::Near);
            if self.try_out(&proposal)? <= limit {
                stable = Some(factor);
                break;
            }
            unstable = factor;
        }
        let Some(mut low) = stable else { return Ok(()) };
        let (from, cost) =
            if self.far { (From::Initial, self.to) } else { (From::Near, self.to - step_of(&self.near)) };
        for _ in 0..REFINEMENTS {
            let middle = f64::sqrt(low * unstable);
            if self.only.is_some() || !self.budget.allows(cost) {
                break;
            }
            let proposal = plan::scaled_learning_rate(self.subject, middle, from);
            if self.try_out(&proposal)? <= limit { low = middle } else { unstable = middle }
        }
        Ok(())
    }

    fn record(
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

fn curve(trace: &Trace) -> Vec<CurvePoint> {
    let point = |r: &StepRecord| CurvePoint { step: r.step, loss: r.loss_raw, grad_norm: r.grad_norm };
    trace.steps.iter().map(point).collect()
}
