//! Does a replay reproduce the log? Pure functions of log rows, a trace and its perturbed siblings.
//!
//! Before the log's first bump each logged value must lie on the replay's line, within what honest arithmetic may
//! differ: the envelope of perturbed replays, and a floor. Training is chaotic after a bump (PyTorch with another
//! GEMM parts from itself by percents there), so from the bump on a value must lie in the replays' band. A replay that
//! gives every bit of the log knows no chaos: as long as it does, the line counts.

use super::{StepRecord, Trace};
use crate::model::PrecisionPlan;
use crate::run::LogRow;

/// A loss this many times the minimum of the three logged values before it is a bump.
const BUMP: f64 = 1.3;
/// Perturbed replays sample honest arithmetic; their widest deviation is widened by this.
const WIDEN: f64 = 2.0;
/// Half of the last decimal of a loss rounded to four.
const ROUNDING: f64 = 5e-5;
/// Steps equal to the last bit that show that this machine computes as the trainer's did.
pub const EXACT: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reproduction {
    Reproduced,
    Departs,
    /// Nothing logged in the replayed range.
    NoLog,
}

impl Reproduction {
    /// The word of the JSON.
    pub fn word(self) -> &'static str {
        match self {
            Reproduction::Reproduced => "reproduced",
            Reproduction::Departs => "departs",
            Reproduction::NoLog => "no_log",
        }
    }
}

/// Relative deviations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Envelope {
    pub loss: f64,
    pub grad_norm: f64,
}

impl Envelope {
    /// What is allowed even where perturbed replays agree: f32 summation order, or one rounding more or less in a
    /// half dtype (contract 12).
    pub fn floor(plan: &PrecisionPlan) -> Self {
        let half = plan.base.is_half() || plan.autocast.is_some() || plan.adapter.is_half() || plan.tf32;
        if half { Self { loss: 1e-3, grad_norm: 1e-2 } } else { Self { loss: 1e-5, grad_norm: 1e-4 } }
    }
}

/// One logged step held against the replay.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    pub step: u64,
    /// As logged.
    pub logged: Values,
    pub replayed: Values,
    /// |replayed − logged| / |logged|; `None` where one of the two is absent.
    pub loss_rel: Option<f64>,
    pub grad_norm_rel: Option<f64>,
    pub learning_rate_exact: Option<bool>,
    /// Allowed deviation at this step.
    pub envelope: Envelope,
    /// Where the replays lie, perturbed ones included; `None` with only one.
    pub band: Option<Band>,
    /// At or after the first bump: the band counts, not the line.
    pub after_bump: bool,
    pub agrees: bool,
}

impl Comparison {
    /// Every logged number is the replay's to the last bit (a rounded loss: to its last decimal).
    pub fn is_exact(&self) -> bool {
        let same = |relative: Option<f64>| relative.is_none_or(|r| r == 0.0);
        same(self.loss_rel) && same(self.grad_norm_rel) && self.learning_rate_exact != Some(false)
    }
}

/// Smallest and largest value of one step among replays, NaN left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Band {
    pub loss: (f64, f64),
    pub grad_norm: (f64, f64),
}

/// What a log line says of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Values {
    pub loss: Option<f64>,
    pub grad_norm: Option<f64>,
    pub learning_rate: Option<f64>,
}

/// The comparison of a replay with the log.
#[derive(Debug, Clone, PartialEq)]
pub struct Certificate {
    pub verdict: Reproduction,
    /// First and last replayed step.
    pub from: u64,
    pub to: u64,
    /// First logged step that does not agree.
    pub departs_at: Option<u64>,
    /// First bump of the log in the replayed range.
    pub bump_at: Option<u64>,
    /// Last logged step up to which all were [exact](Comparison::is_exact), from the first on.
    pub exact_to: Option<u64>,
    /// Over the steps on the line, those before the bump.
    pub loss_max_rel: f64,
    pub grad_norm_max_rel: f64,
    /// Widest allowance used on the line.
    pub envelope: Envelope,
    pub comparisons: Vec<Comparison>,
}

/// First logged step whose loss exceeds [`BUMP`] times the minimum of the three logged losses before it, or is not
/// finite, or is the 0.0 that stands for NaN.
pub fn first_bump(rows: &[(u64, Option<f64>)]) -> Option<u64> {
    let losses: Vec<(u64, f64)> = rows.iter().filter_map(|(step, loss)| Some((*step, (*loss)?))).collect();
    losses.iter().enumerate().find_map(|(i, &(step, loss))| {
        let recent = &losses[i.saturating_sub(3)..i];
        let minimum = recent.iter().map(|(_, l)| *l).fold(f64::INFINITY, f64::min);
        let bumps = !loss.is_finite() || (i > 0 && (loss > BUMP * minimum || loss == 0.0));
        bumps.then_some(step)
    })
}

/// Holds `trace` against the log. `perturbed`: replays of the same steps with noise; `rounds`: this trainer rounds
/// logged losses to four decimals.
pub fn certify(rows: &[LogRow], rounds: bool, floor: Envelope, trace: &Trace, perturbed: &[Trace]) -> Certificate {
    let from = trace.steps.first().map_or(0, |s| s.step);
    let to = trace.steps.last().map_or(0, |s| s.step);
    let logged: Vec<(&LogRow, usize)> = trace
        .steps
        .iter()
        .enumerate()
        .filter_map(|(i, s)| Some((rows.iter().find(|r| r.attempt == s.attempt && r.step == s.step)?, i)))
        .collect();
    let bump_at = first_bump(&history(rows, &logged));
    let mut certificate = Certificate {
        verdict: Reproduction::NoLog,
        from,
        to,
        departs_at: None,
        bump_at: bump_at.filter(|b| (from..=to).contains(b)),
        exact_to: None,
        loss_max_rel: 0.0,
        grad_norm_max_rel: 0.0,
        envelope: floor,
        comparisons: Vec::new(),
    };
    let mut allowed = floor;
    let mut exact = 0;
    for (row, index) in logged {
        let replays: Vec<&StepRecord> =
            std::iter::once(trace).chain(perturbed).filter_map(|t| t.steps.get(index)).collect();
        let spread = spread(&replays);
        allowed.loss = allowed.loss.max(WIDEN * spread.loss);
        allowed.grad_norm = allowed.grad_norm.max(WIDEN * spread.grad_norm);
        let after_bump = bump_at.is_some_and(|b| row.step >= b);
        let all_exact = exact == certificate.comparisons.len();
        let on_line = !after_bump || (all_exact && exact >= EXACT);
        let comparison = compare(row, rounds, from, allowed, (after_bump, on_line), &replays);
        if all_exact && comparison.is_exact() {
            exact += 1;
            certificate.exact_to = Some(row.step);
        }
        if !after_bump {
            certificate.envelope = allowed;
            certificate.loss_max_rel = worst(certificate.loss_max_rel, comparison.loss_rel);
            certificate.grad_norm_max_rel = worst(certificate.grad_norm_max_rel, comparison.grad_norm_rel);
        }
        if !comparison.agrees && certificate.departs_at.is_none() {
            certificate.departs_at = Some(row.step);
        }
        certificate.comparisons.push(comparison);
    }
    certificate.verdict = match (certificate.comparisons.is_empty(), certificate.departs_at) {
        (true, _) => Reproduction::NoLog,
        (false, None) => Reproduction::Reproduced,
        (false, Some(_)) => Reproduction::Departs,
    };
    certificate
}

/// The logged losses of the replayed range and of the three rows before it, so that a bump at its first step shows.
fn history(rows: &[LogRow], logged: &[(&LogRow, usize)]) -> Vec<(u64, Option<f64>)> {
    let Some((first, _)) = logged.first() else { return Vec::new() };
    let mut before: Vec<&LogRow> = rows.iter().filter(|r| r.attempt <= first.attempt && r.step < first.step).collect();
    // Rows of a thrown-away end of an earlier attempt are older in the file but not in the run.
    before.sort_by_key(|r| (r.step, r.attempt));
    before.dedup_by_key(|r| r.step);
    let recent = before.len().saturating_sub(3);
    let first_recent = before[recent..].iter().map(|r| (r.step, r.loss));
    let replayed = logged.iter().map(|(r, _)| (r.step, r.loss));
    let all: Vec<_> = first_recent.chain(replayed).collect();
    let begins = first.step;
    // A bump among the rows before is not one of the replayed range.
    match first_bump(&all) {
        Some(step) if step < begins => logged.iter().map(|(r, _)| (r.step, r.loss)).collect(),
        _ => all,
    }
}

/// Widest relative deviation of the perturbed replays from the first, at one step.
fn spread(replays: &[&StepRecord]) -> Envelope {
    let own = replays[0];
    let mut widest = Envelope { loss: 0.0, grad_norm: 0.0 };
    for other in &replays[1..] {
        widest.loss = worst(widest.loss, Some(relative(loss_of(other), loss_of(own))));
        widest.grad_norm = worst(widest.grad_norm, Some(relative(other.grad_norm, own.grad_norm)));
    }
    widest
}

/// `replays`: this step of the trace itself, then of its perturbed siblings. `on_line`: it has to lie on the line.
fn compare(
    row: &LogRow,
    rounds: bool,
    from: u64,
    allowed: Envelope,
    (after_bump, on_line): (bool, bool),
    replays: &[&StepRecord],
) -> Comparison {
    let own = replays[0];
    // A logging window that began before the replay cannot be compared.
    let whole = row.step + 1 >= from + row.window;
    let logged =
        Values { loss: row.loss.filter(|_| whole), grad_norm: row.grad_norm, learning_rate: row.learning_rate };
    let replayed = Values {
        loss: Some(loss_of(own)),
        grad_norm: Some(own.grad_norm),
        learning_rate: Some(own.learning_rate_logged),
    };
    let rounding = if rounds { ROUNDING } else { 0.0 };
    let loss_rel = logged.loss.map(|l| relative_beyond(loss_of(own), l, rounding));
    let grad_norm_rel = logged.grad_norm.map(|g| relative(own.grad_norm, g));
    let learning_rate_exact = logged.learning_rate.map(|l| l.to_bits() == own.learning_rate_logged.to_bits());
    let losses = || replays.iter().map(|s| loss_of(s));
    let norms = || replays.iter().map(|s| s.grad_norm);
    let (loss_fits, norm_fits) = if on_line {
        (loss_rel.is_none_or(|r| r <= allowed.loss), grad_norm_rel.is_none_or(|r| r <= allowed.grad_norm))
    } else if replays.len() == 1 {
        // One replay is no band: nothing can be said of the loss here.
        (true, true)
    } else {
        (
            logged.loss.is_none_or(|l| in_band(l, losses(), rounding)),
            logged.grad_norm.is_none_or(|g| in_band(g, norms(), 0.0)),
        )
    };
    let agrees = loss_fits && norm_fits && learning_rate_exact != Some(false);
    Comparison {
        step: row.step,
        logged,
        replayed,
        loss_rel,
        grad_norm_rel,
        learning_rate_exact,
        envelope: allowed,
        band: (replays.len() > 1).then(|| Band { loss: range(losses()), grad_norm: range(norms()) }),
        after_bump,
        agrees,
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
}

/// What the log would show for this step.
fn loss_of(step: &StepRecord) -> f64 {
    step.loss_logged.unwrap_or(step.loss)
}

/// |a − b| / |b|: 0 for equal values, NaN with NaN included; infinite where only one is finite.
pub fn relative(a: f64, b: f64) -> f64 {
    if a == b || (a.is_nan() && b.is_nan()) {
        return 0.0;
    }
    let difference = (a - b).abs() / b.abs();
    if difference.is_nan() { f64::INFINITY } else { difference }
}

/// [`relative`] of what exceeds an absolute rounding error.
fn relative_beyond(a: f64, b: f64, rounding: f64) -> f64 {
    if (a - b).abs() <= rounding {
        return 0.0;
    }
    relative(a, b)
}

/// Whether a logged value lies among the replays' values, their spread in logarithms widened on both sides.
fn in_band(value: f64, replays: impl Iterator<Item = f64>, rounding: f64) -> bool {
    let replays: Vec<f64> = replays.collect();
    if value.is_nan() || value <= 0.0 {
        return replays.iter().any(|&r| relative_beyond(r, value, rounding) == 0.0);
    }
    let finite = replays.iter().copied().filter(|r| r.is_finite() && *r > 0.0);
    let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), r| (l.min(r.ln()), h.max(r.ln())));
    // The log is one more draw from the same chaos; with few replays the edges are poorly known.
    let margin = (WIDEN * (high - low)).max(BUMP.ln());
    value.is_finite() && value.ln() >= low - margin && value.ln() <= high + margin
}

/// The larger of two deviations; NaN counts as infinitely large.
fn worst(so_far: f64, other: Option<f64>) -> f64 {
    match other {
        None => so_far,
        Some(x) if x.is_nan() => f64::INFINITY,
        Some(x) => so_far.max(x),
    }
}
