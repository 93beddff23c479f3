//! What became of a cell: judged step by step while it trains, in constant memory but for its curve.

use serde::{Deserialize, Serialize};

use crate::diagnosis::{SpikeKind, detect, number};
use crate::replay::StepRecord;
use crate::run::LogRow;

/// How a cell went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// No spike of the loss, nothing that is not finite, not stopped, no worse at the end than at the beginning, and
    /// not far from its own best stretch.
    pub stable: bool,
    /// Optimizer steps replayed, and rows they saw.
    pub steps: u64,
    pub samples: u64,
    /// Mean loss of the last tenth of the steps; NaN when none is finite.
    #[serde(with = "number")]
    pub final_loss: f64,
    /// Highest finite loss.
    #[serde(with = "number")]
    pub peak_loss: f64,
    pub spikes: Vec<SpikeSeen>,
    /// Steps whose loss or gradient was not finite and whose update was still made.
    pub nonfinite_steps: u64,
    /// Updates the loss scaler left out.
    pub skipped_steps: u64,
    /// Share of steps whose gradient was clipped.
    #[serde(with = "number")]
    pub clip_share: f64,
    /// Largest root mean square of an update, per trained parameter.
    #[serde(with = "number")]
    pub max_update_rms: f64,
    /// Label and prompt tokens of all micro-batches.
    pub tokens: u64,
    /// Why the rest was not run.
    pub stopped: Option<String>,
    pub curve: Vec<Point>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SpikeSeen {
    pub step: u64,
    pub kind: SpikeKind,
    #[serde(with = "number")]
    pub height: f64,
}

impl SpikeSeen {
    /// Of the loss; a gradient that shot up and was clipped, or a skipped update, did none to it.
    pub fn harmful(&self) -> bool {
        matches!(self.kind, SpikeKind::Jump | SpikeKind::Divergence | SpikeKind::Nan | SpikeKind::MaskedNan)
    }
}

/// One optimizer step of a curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Rows seen up to and including this step.
    pub samples: u64,
    #[serde(with = "number")]
    pub loss: f64,
    #[serde(with = "number")]
    pub grad_norm: f64,
}

/// Points a curve keeps: lowest and highest loss of each stretch.
const CURVE: usize = 400;
/// A cell that has been far up for this many steps, or this share of them, does not come back in time to matter.
const PATIENCE: u64 = 8;
const PATIENCE_SHARE: f64 = 0.05;
/// Far up: this factor over its own best and one nat above it, and above where it began.
const FAR: f64 = 4.0;

/// The end has risen from the best stretch of the same length when it lies this factor above it, by more standard errors
/// than [`CERTAIN`], and by this share of the first loss: a noisy loss that came down and crept up again may have no spike.
const RISEN: f64 = 1.5;
const CERTAIN: f64 = 3.0;
const RISEN_SHARE: f64 = 0.05;
/// Lengths of a stretch: a tenth, a sixth and a quarter of the steps. Shorter ones see sudden rises, longer ones noisy.
const STRETCHES: [usize; 3] = [10, 6, 4];
/// Steps whose mean says anything.
const STRETCH: usize = 4;

/// Collects an [`Outcome`].
#[derive(Debug)]
pub struct Tracker {
    patience: u64,
    samples_per_step: u64,
    parameters: u64,
    context: detect::Context,
    rows: Vec<LogRow>,
    outcome: Outcome,
    clipped: u64,
    first: Option<f64>,
    /// Lowest loss before the current stretch, and how long it has lasted.
    best: f64,
    high_for: u64,
    broken_for: u64,
}

impl Tracker {
    /// `steps` planned; `parameters`: trained ones; `context`: what spike detection needs to know of the run.
    pub fn new(steps: u64, samples_per_step: u64, parameters: u64, context: detect::Context) -> Self {
        let outcome = Outcome {
            stable: false,
            steps: 0,
            samples: 0,
            final_loss: f64::NAN,
            peak_loss: f64::NAN,
            spikes: vec![],
            nonfinite_steps: 0,
            skipped_steps: 0,
            clip_share: 0.0,
            max_update_rms: 0.0,
            tokens: 0,
            stopped: None,
            curve: vec![],
        };
        Self {
            patience: PATIENCE.max((steps as f64 * PATIENCE_SHARE) as u64),
            samples_per_step,
            parameters: parameters.max(1),
            context,
            rows: vec![],
            outcome,
            clipped: 0,
            first: None,
            best: f64::INFINITY,
            high_for: 0,
            broken_for: 0,
        }
    }

    /// Takes one step in; true: the cell has clearly diverged, stop it.
    pub fn push(&mut self, record: &StepRecord) -> bool {
        let outcome = &mut self.outcome;
        outcome.steps += 1;
        outcome.samples += self.samples_per_step;
        outcome.tokens += record.micro_batches.iter().map(|m| m.tokens).sum::<u64>();
        outcome.skipped_steps += u64::from(record.skipped);
        let broken = !record.loss_raw.is_finite() || record.nonfinite > 0 || !record.grad_norm.is_finite();
        outcome.nonfinite_steps += u64::from(broken && !record.skipped);
        self.clipped += u64::from(record.clip_coefficient < 1.0);
        let rms = record.update_norm / (self.parameters as f64).sqrt();
        if rms > outcome.max_update_rms || rms.is_nan() {
            outcome.max_update_rms = rms;
        }
        let loss = record.loss_raw;
        if loss.is_finite() && (outcome.peak_loss.is_nan() || loss > outcome.peak_loss) {
            outcome.peak_loss = loss;
        }
        let samples = outcome.samples;
        outcome.curve.push(Point { samples, loss, grad_norm: record.grad_norm });
        self.rows.push(row(record));
        // A skipped update heals a gradient that is not finite; a loss that is not has the same weights before it again.
        self.judge(loss, !loss.is_finite() || (broken && !record.skipped))
    }

    fn judge(&mut self, loss: f64, broken: bool) -> bool {
        let first = *self.first.get_or_insert(loss);
        let far = loss > FAR * self.best && loss > self.best + 1.0 && loss > first;
        self.high_for = if far { self.high_for + 1 } else { 0 };
        self.broken_for = if broken { self.broken_for + 1 } else { 0 };
        if !far && loss < self.best {
            self.best = loss;
        }
        let step = self.outcome.steps;
        if self.broken_for >= self.patience {
            self.outcome.stopped = Some(format!("not finite for {} steps up to step {step}", self.broken_for));
        } else if self.high_for >= self.patience {
            let best = crate::report::number(self.best);
            self.outcome.stopped =
                Some(format!("loss far above its best {best} for {} steps up to step {step}", self.high_for));
        }
        self.outcome.stopped.is_some()
    }

    /// The outcome of the steps seen.
    pub fn finish(mut self) -> Outcome {
        let mut outcome = self.outcome;
        let tail = (outcome.curve.len() / 10).max(1);
        let last = &outcome.curve[outcome.curve.len().saturating_sub(tail)..];
        let finite: Vec<f64> = last.iter().map(|p| p.loss).filter(|l| l.is_finite()).collect();
        outcome.final_loss = finite.iter().sum::<f64>() / finite.len() as f64;
        outcome.clip_share = self.clipped as f64 / outcome.steps.max(1) as f64;
        self.context.loss_scaling |= outcome.skipped_steps > 0;
        let seen = |f: &detect::Found| SpikeSeen { step: f.step, kind: f.kind, height: f.height };
        outcome.spikes = detect::spikes(&self.rows, &self.context).iter().map(seen).collect();
        let improved = self.first.is_some_and(|first| outcome.final_loss <= first.max(f64::MIN_POSITIVE) * 1.2);
        outcome.stable = outcome.stopped.is_none()
            && outcome.nonfinite_steps == 0
            && improved
            && !has_risen(&outcome.curve)
            && !outcome.spikes.iter().any(SpikeSeen::harmful);
        outcome.curve = shortened(&outcome.curve);
        outcome
    }
}

/// Whether the end of a curve is clearly above its best stretch, in logarithms, in which losses scatter evenly.
fn has_risen(curve: &[Point]) -> bool {
    let losses: Vec<f64> = curve.iter().map(|p| p.loss).filter(|loss| *loss > 0.0 && loss.is_finite()).collect();
    // Sums of logarithms and of their squares up to each step: a stretch's mean and scatter are differences.
    let mut sums = vec![(0.0, 0.0)];
    for log in losses.iter().map(|loss| loss.ln()) {
        let (sum, squares) = sums[sums.len() - 1];
        sums.push((sum + log, squares + log * log));
    }
    let n = losses.len();
    let risen = |stretch: usize| n >= 3 * stretch && risen_over(&sums, stretch, losses[0]);
    STRETCHES.iter().any(|part| risen((n / part).max(STRETCH)))
}

/// The same for stretches of one length.
fn risen_over(sums: &[(f64, f64)], stretch: usize, first: f64) -> bool {
    // Mean and its squared standard error of the stretch before `end`.
    let level = |end: usize| {
        let n = stretch as f64;
        let (from, to) = (sums[end - stretch], sums[end]);
        let mean = (to.0 - from.0) / n;
        (mean, ((to.1 - from.1) / n - mean * mean).max(0.0) / (n - 1.0))
    };
    let last = sums.len() - 1;
    let best = (stretch..=last).map(level).min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::NAN, 0.0));
    let end = level(last);
    let rise = end.0 - best.0;
    let lost = end.0.exp() - best.0.exp();
    rise > RISEN.ln() && rise > CERTAIN * (end.1 + best.1).sqrt() && lost > RISEN_SHARE * first
}

fn row(record: &StepRecord) -> LogRow {
    LogRow {
        attempt: 0,
        step: record.step,
        window: 1,
        epoch: Some(record.epoch),
        loss: Some(record.loss),
        grad_norm: Some(record.grad_norm),
        learning_rate: Some(record.learning_rate),
        total_steps: None,
        source: String::new(),
    }
}

fn shortened(curve: &[Point]) -> Vec<Point> {
    let indexed: Vec<(f64, f64)> = curve.iter().enumerate().map(|(i, p)| (i as f64, p.loss)).collect();
    let kept = crate::report::html::scale::downsample(&indexed, CURVE / 4);
    if curve.len() <= CURVE { curve.to_vec() } else { kept.iter().map(|k| curve[k.0 as usize]).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: f64) -> StepRecord {
        StepRecord {
            step,
            attempt: 0,
            epoch: 0.0,
            learning_rate: 1e-3,
            learning_rate_logged: 1e-3,
            loss: if loss.is_nan() { 0.0 } else { loss },
            loss_raw: loss,
            loss_logged: None,
            grad_norm: if loss.is_nan() { f64::NAN } else { 0.5 },
            clip_coefficient: if step.is_multiple_of(4) { 0.5 } else { 1.0 },
            update_norm: 0.1,
            loss_scale: None,
            skipped: false,
            nonfinite: 0,
            micro_batches: vec![],
        }
    }
    fn train(losses: impl IntoIterator<Item = f64>) -> Outcome {
        let mut tracker = Tracker::new(100, 8, 100, detect::Context::default());
        for (i, loss) in losses.into_iter().enumerate() {
            if tracker.push(&record(i as u64 + 1, loss)) {
                break;
            }
        }
        tracker.finish()
    }
    fn falling(step: u64) -> f64 {
        0.1 + 3.0 * (-(step as f64) / 10.0).exp()
    }

    #[test]
    fn a_falling_loss_is_stable_and_measured() {
        let outcome = train((0..100).map(falling));
        assert!(outcome.stable, "{outcome:?}");
        assert_eq!((outcome.steps, outcome.samples), (100, 800));
        assert!((outcome.final_loss - 0.1).abs() < 0.01 && outcome.peak_loss == falling(0));
        assert_eq!(outcome.clip_share, 0.25);
        assert!((outcome.max_update_rms - 0.01).abs() < 1e-12);
    }

    #[test]
    fn a_jump_that_recovers_runs_on_and_is_unstable() {
        let outcome = train((0..100).map(|s| if s == 60 { 4.0 } else { falling(s) }));
        assert!(!outcome.stable && outcome.stopped.is_none());
        assert_eq!((outcome.spikes.len(), outcome.spikes[0].step), (1, 61));
    }

    #[test]
    fn a_diverged_cell_stops_and_says_so() {
        let outcome = train((0..100).map(|s| if s >= 40 { 5.0 } else { falling(s) }));
        assert_eq!(outcome.steps, 48);
        assert!(outcome.stopped.as_deref().is_some_and(|s| s.contains("far above")) && !outcome.stable);
        let nan = train((0..100).map(|s| if s >= 40 { f64::NAN } else { falling(s) }));
        assert_eq!((nan.steps, nan.nonfinite_steps), (48, 8));
        assert!(nan.stopped.is_some_and(|s| s.contains("not finite")));
        assert!(nan.final_loss.is_nan() || nan.final_loss.is_finite());
    }

    #[test]
    fn a_loss_that_only_rises_slowly_is_not_stable() {
        assert!(!train((0..100).map(|s| 1.0 + s as f64 * 0.01)).stable);
    }

    /// A loss that scatters by ± 30 % around `level`.
    fn noisy(step: u64, level: f64) -> f64 {
        level * (1.0 + 0.3 * ((step * 7919 % 13) as f64 / 6.0 - 1.0))
    }

    #[test]
    fn a_noisy_loss_that_creeps_up_from_its_best_is_not_stable() {
        let level = |s: u64| if s < 50 { falling(s) } else { falling(50) + (s - 50) as f64 * 0.003 };
        let outcome = train((0..100).map(|s| noisy(s, level(s))));
        assert!(outcome.spikes.is_empty() && !outcome.stable, "{outcome:?}");
    }

    #[test]
    fn noise_around_a_level_and_small_losses_that_wander_stay_stable() {
        let flat = train((0..100).map(|s| noisy(s, falling(s).max(0.5))));
        assert!(flat.stable, "{:?}", flat.spikes);
        let small = train((0..100).map(|s| noisy(s, if s < 50 { falling(s) - 0.08 } else { 0.03 + s as f64 * 4e-4 })));
        assert!(small.stable, "{:?}", small.spikes);
    }

    #[test]
    fn skipped_steps_are_counted_apart_from_broken_ones() {
        let mut tracker = Tracker::new(100, 8, 100, detect::Context { loss_scaling: true, ..Default::default() });
        for step in 0..30 {
            let mut r = record(step + 1, falling(step));
            if step < 2 {
                (r.skipped, r.grad_norm, r.nonfinite) = (true, f64::INFINITY, 7);
            }
            tracker.push(&r);
        }
        let outcome = tracker.finish();
        assert_eq!((outcome.skipped_steps, outcome.nonfinite_steps), (2, 0));
        assert!(outcome.stable, "{:?}", outcome.spikes);
    }

    #[test]
    fn long_curves_are_kept_short_with_their_peak() {
        let mut tracker = Tracker::new(20_000, 1, 1, detect::Context::default());
        for step in 0..20_000 {
            tracker.push(&record(step + 1, if step == 7777 { 2.0 } else { 1.0 / (1.0 + step as f64) + 0.5 }));
        }
        let outcome = tracker.finish();
        assert!(outcome.curve.len() <= 600, "{}", outcome.curve.len());
        assert!(outcome.curve.iter().any(|p| p.loss == 2.0));
    }
}
