//! The baseline replay against the log: does it match before the spike, and does it part at the spike?
//!
//! Differences are |ln(replayed / logged)|: equal for a factor up and down, and without unit.

use super::Envelope;
use super::evidence::Match;
use super::height::Point;
use crate::replay::EXACT;

/// Logged and replayed value of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    pub step: u64,
    pub loss: f64,
    /// NaN where the log has no gradient norm.
    pub grad_norm: f64,
}

/// A departure is at least this factor beyond everything seen before it …
const BEYOND: f64 = 10.0;
/// … and beyond this, so that a drift that grows by small factors is none.
const LEAST: f64 = 0.2;
/// In ln of the loss: beyond it, two runs share no more than the order of magnitude.
const BAND: f64 = 0.5;
/// In ln of the gradient norm, over the last steps before the spike: beyond it the run is already parting. Norms
/// part before losses do where a run sits on the edge of stability.
const NORM_BAND: f64 = 0.35;
/// What one rounding done differently moves within a step, in ln: the largest seen is 4e-4 in loss and 6e-3 in norm.
const ROUNDING: Envelope = Envelope { loss: 0.01, grad_norm: 0.1 };
/// Steps before the spike whose norms have to agree.
const LAST: usize = 2;
/// Steps that show whether a replay computes what the run computed: wrong inputs part at the first.
pub const BEGINNING: usize = 3;
/// Drift of honest arithmetic over the steps since the start point: the floor of design 5.2 times this.
const DRIFT: f64 = 30.0;

/// |ln(a / b)|; 0 when both are NaN, both 0, or the same infinity; infinite when only one of them is a positive
/// finite number.
pub fn distance(a: f64, b: f64) -> f64 {
    if a == b || (a.is_nan() && b.is_nan()) {
        return 0.0;
    }
    let ratio = (a / b).ln().abs();
    if ratio.is_nan() { f64::INFINITY } else { ratio }
}

/// Step by step; `replayed` and `logged` ascending. `rounded`: half a unit of the log's last decimal (0 unrounded).
///
/// A logged 0.0 stands for NaN when its gradient norm is not finite, and equals a window without labels.
pub fn differences(replayed: &[Point], logged: &[Point], rounded: f64) -> Vec<Difference> {
    let pair = |r: &Point| {
        let l = logged.binary_search_by_key(&r.step, |l| l.step).ok().map(|i| logged[i])?;
        let both_broken = (l.loss == 0.0 || !l.loss.is_finite()) && (r.unlabelled || !r.loss.is_finite());
        let within_rounding = (r.loss - l.loss).abs() <= rounded;
        let loss = if both_broken || within_rounding { 0.0 } else { distance(r.loss, l.loss) };
        let grad_norm = match (l.grad_norm.is_nan() && !l.skipped, l.skipped && r.skipped) {
            (true, _) => f64::NAN,
            (_, true) => 0.0,
            _ => distance(r.grad_norm, l.grad_norm),
        };
        Some(Difference { step: r.step, loss, grad_norm })
    };
    replayed.iter().filter_map(pair).collect()
}

/// How the steps before `spike` match.
pub fn before(differences: &[Difference], spike: u64, floor: Envelope) -> Match {
    let mut losses: Vec<f64> = differences.iter().filter(|d| d.step < spike).map(|d| d.loss).collect();
    if losses.is_empty() {
        return Match::Nothing;
    }
    losses.sort_by(f64::total_cmp);
    let (middle, worst) = (losses[losses.len() / 2], losses[losses.len() - 1]);
    let last = differences.iter().rev().filter(|d| d.step < spike && !d.grad_norm.is_nan()).take(LAST);
    let norms = last.map(|d| d.grad_norm).fold(0.0, f64::max);
    if worst <= DRIFT * floor.loss && norms <= NORM_BAND {
        Match::Close
    } else if middle <= BAND {
        Match::Band
    } else {
        Match::Off
    }
}

/// The replay parts from the log at `spike`: loss or gradient norm differ there far more than ever before and than
/// perturbed replays differ at that step (`spread`; 0: none made), while the steps before show only noise.
pub fn departs_at(differences: &[Difference], spike: u64, spread: Envelope) -> bool {
    let Some(at) = differences.iter().find(|d| d.step == spike) else { return false };
    let earlier = || differences.iter().filter(|d| d.step < spike);
    let noise = earlier().map(|d| d.loss).fold(0.0, f64::max);
    let norm_noise = earlier().map(|d| d.grad_norm).filter(|n| !n.is_nan()).fold(0.0, f64::max);
    let loss = at.loss > LEAST.max(BEYOND * noise).max(BEYOND * spread.loss);
    let norm = at.grad_norm > (5.0 * LEAST).max(BEYOND * norm_noise).max(BEYOND * spread.grad_norm);
    // Where perturbed norms scatter widely, and as far as the log's lies, its loss is one more draw from the same chaos,
    // unless no perturbed loss moved by a hundredth of that.
    let chaotic =
        spread.grad_norm > LEAST && at.grad_norm <= 3.0 * spread.grad_norm && at.loss <= BEYOND * BEYOND * spread.loss;
    (loss && !chaotic) || (norm && noise < LEAST)
}

impl Difference {
    /// Every logged number is the replay's to the last bit.
    pub fn is_none(&self) -> bool {
        self.loss == 0.0 && (self.grad_norm == 0.0 || self.grad_norm.is_nan())
    }

    /// No more than a rounding done differently may move.
    pub fn is_rounding(&self) -> bool {
        let within = |difference: f64, most: f64| difference.is_nan() || difference <= most;
        within(self.loss, ROUNDING.loss) && within(self.grad_norm, ROUNDING.grad_norm)
    }
}

/// Enough steps, all equal to the last bit.
pub fn is_exact(differences: &[Difference]) -> bool {
    differences.len() >= EXACT && differences.iter().all(Difference::is_none)
}

/// The step at or before `spike` at which a replay that gave every bit of the log parts from it, by more than a rounding
/// that this program does differently could move one step. `None` where the steps before are not all equal: then chaos
/// is another explanation, here it is none.
pub fn parts_exactly(differences: &[Difference], spike: u64) -> Option<u64> {
    let first = first_after_exact(differences).filter(|d| d.step <= spike)?;
    (!first.is_rounding()).then_some(first.step)
}

/// The first step that differs at all after [`EXACT`] or more that were equal to the last bit.
pub fn first_after_exact(differences: &[Difference]) -> Option<&Difference> {
    let exact = differences.iter().take_while(|d| d.is_none()).count();
    differences.get(exact).filter(|_| exact >= EXACT)
}

/// The step at which a spike of `step` began to break: a gradient norm that is finite in the replay and not in the log
/// comes one step before the loss that its update ruins.
pub fn broken_from(differences: &[Difference], step: u64) -> u64 {
    let broken = |at: u64| differences.iter().any(|d| d.step == at && d.grad_norm == f64::INFINITY);
    (1..step).rev().take_while(|&at| broken(at)).last().unwrap_or(step)
}

/// The first steps lie on the log's line.
pub fn begins_close(differences: &[Difference], floor: Envelope) -> bool {
    let first = &differences[..differences.len().min(BEGINNING)];
    first.len() == BEGINNING && first.iter().all(|d| d.loss <= DRIFT * floor.loss)
}

/// First step whose difference is beyond `envelope` widened by the drift since the start.
pub fn first_beyond(differences: &[Difference], envelope: Envelope) -> Option<u64> {
    let beyond = |d: &&Difference| d.loss > DRIFT * envelope.loss || d.grad_norm > DRIFT * envelope.grad_norm;
    differences.iter().find(beyond).map(|d| d.step)
}

/// From `step` on (a fresh start at a checkpoint) loss and log agree within the floor.
pub fn matches(differences: &[Difference], floor: Envelope) -> bool {
    !differences.is_empty() && differences.iter().all(|d| d.loss <= DRIFT * floor.loss)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BF16: Envelope = Envelope { loss: 1e-3, grad_norm: 1e-2 };

    const NONE: Envelope = Envelope { loss: 0.0, grad_norm: 0.0 };

    fn series(losses: &[f64]) -> Vec<Point> {
        let point = |(i, &loss): (usize, &f64)| Point {
            step: i as u64 + 1,
            loss,
            grad_norm: 1.0,
            skipped: false,
            unlabelled: false,
        };
        losses.iter().enumerate().map(point).collect()
    }

    #[test]
    fn a_sudden_difference_after_equal_steps_is_a_departure() {
        let d = differences(&series(&[1.0, 0.9, 0.8, 0.7]), &series(&[1.0, 0.9001, 0.8001, 5.0]), 0.0);
        assert_eq!(before(&d, 4, BF16), Match::Close);
        assert!(departs_at(&d, 4, NONE));
        assert_eq!(first_beyond(&d, BF16), Some(4));
    }

    #[test]
    fn a_drift_that_grows_step_by_step_is_chaos_and_no_departure() {
        let d = differences(&series(&[1.0, 0.9, 0.8, 0.7]), &series(&[1.0, 0.91, 0.9, 1.6]), 0.0);
        assert!(!departs_at(&d, 4, NONE));
    }

    #[test]
    fn what_perturbed_replays_also_show_is_no_departure() {
        let d = differences(&series(&[1.0, 0.9, 0.8, 0.7]), &series(&[1.0, 0.9, 0.8, 2.0]), 0.0);
        assert!(departs_at(&d, 4, NONE));
        assert!(!departs_at(&d, 4, Envelope { loss: 0.3, grad_norm: 0.3 }));
    }

    #[test]
    fn norms_that_part_before_the_spike_are_no_match() {
        let mut replayed = series(&[1.0, 0.9, 0.8, 0.7]);
        replayed[2].grad_norm = 3.0;
        let d = differences(&replayed, &series(&[1.0, 0.9, 0.8, 5.0]), 0.0);
        assert_eq!(before(&d, 4, BF16), Match::Band);
    }

    #[test]
    fn a_loss_that_parts_where_perturbed_norms_scatter_as_far_is_chaos() {
        let mut logged = series(&[1.0, 0.9, 0.8, 5.0]);
        logged[3].grad_norm = 80.0;
        let d = differences(&series(&[1.0, 0.9, 0.8, 0.7]), &logged, 0.0);
        assert!(departs_at(&d, 4, Envelope { loss: 0.05, grad_norm: 0.05 }));
        assert!(!departs_at(&d, 4, Envelope { loss: 0.05, grad_norm: 2.6 }));
        assert!(departs_at(&d, 4, Envelope { loss: 0.005, grad_norm: 2.6 }), "perturbed losses hardly move");
    }

    #[test]
    fn a_norm_that_breaks_in_the_log_alone_is_where_a_broken_loss_began() {
        let mut logged = series(&[1.0, 0.9, 0.8, 0.0]);
        (logged[2].grad_norm, logged[2].skipped) = (f64::NAN, true);
        let d = differences(&series(&[1.0, 0.9, 0.8, 0.7]), &logged, 0.0);
        assert_eq!(broken_from(&d, 4), 3);
        assert_eq!((before(&d, 3, BF16), departs_at(&d, 3, NONE)), (Match::Close, true));
        assert_eq!(broken_from(&differences(&series(&[1.0, 0.9]), &series(&[1.0, 5.0]), 0.0), 2), 2);
    }

    #[test]
    fn after_bits_that_were_all_equal_a_small_difference_dates_a_later_spike() {
        let logged = [1.0, 0.9, 0.8, 0.75, 5.0];
        let parts = |replayed: &[f64]| parts_exactly(&differences(&series(replayed), &series(&logged), 0.0), 5);
        assert_eq!(parts(&[1.0, 0.9, 0.8, 0.7, 0.65]), Some(4));
        assert_eq!(parts(&[1.0, 0.9, 0.8, 0.7501, 0.65]), None, "a rounding can move so much");
        assert_eq!(parts(&[1.0, 0.9000001, 0.8, 0.7, 0.65]), None, "arithmetic that differs may be chaos");
        assert_eq!(parts(&[1.0, 0.95, 0.8, 0.7, 0.65]), None, "one step says nothing of the arithmetic");
        assert_eq!(parts(&logged), None);
    }

    #[test]
    fn a_rounding_after_equal_bits_is_seen_and_called_one() {
        let first = |replayed: &[f64]| {
            first_after_exact(&differences(&series(replayed), &series(&[1.0, 0.9, 0.8, 0.75]), 0.0)).copied()
        };
        let little = first(&[1.0, 0.9, 0.8, 0.7501]).expect("step 4 differs");
        assert!(little.step == 4 && little.is_rounding());
        assert!(!first(&[1.0, 0.9, 0.8, 0.7]).expect("step 4 differs").is_rounding());
        assert_eq!(first(&[1.0, 0.9, 0.8, 0.75]), None);
        assert_eq!(first(&[1.0, 0.9, 0.7, 0.75]), None, "two equal steps say nothing of the arithmetic");
    }

    #[test]
    fn nan_in_one_of_them_is_infinitely_far_and_in_both_is_equal() {
        assert_eq!(distance(f64::NAN, 1.0), f64::INFINITY);
        assert_eq!(distance(0.0, 1.0), f64::INFINITY);
        assert_eq!(distance(f64::NAN, f64::NAN), 0.0);
        assert_eq!(distance(f64::INFINITY, f64::NEG_INFINITY), f64::INFINITY);
    }

    #[test]
    fn a_replay_that_begins_on_the_line_is_the_run_and_one_that_parts_at_once_is_not() {
        let logged = [1.0, 0.9, 0.8, 3.0, 6.0];
        let begins = |replayed: &[f64]| begins_close(&differences(&series(replayed), &series(&logged), 0.0), BF16);
        assert!(begins(&[1.001, 0.9, 0.799, 0.7, 0.6]));
        assert!(!begins(&[1.0, 0.8, 0.8, 3.0, 6.0]));
        assert!(!begins(&[1.0, 0.9]));
        assert!(!begins(&[f64::NAN, 0.9, 0.8]));
    }

    #[test]
    fn rounding_of_the_log_is_no_difference() {
        let d = differences(&series(&[0.04904]), &series(&[0.049]), 5e-5);
        assert_eq!(d[0].loss, 0.0);
    }
}
