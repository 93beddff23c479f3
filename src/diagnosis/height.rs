//! How high a spike stands in a series of steps, logged or replayed, and whether it did harm.

use std::ops::RangeInclusive;

use super::SpikeKind;
use super::detect::{self, Found, MAX_HEIGHT};
use crate::replay::StepRecord;
use crate::run::LogRow;

/// Rows before a step that make its base: the same as in detection.
const RECENT: usize = 3;
/// Rows after an episode that tell whether it did harm.
const AFTER: usize = 4;
/// Later loss above the one before by more than this factor is damage.
const DAMAGE: f64 = 1.1;

/// One step of a series.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    pub step: u64,
    pub loss: f64,
    pub grad_norm: f64,
    /// The optimizer did not step: the scaler found a gradient that is not finite.
    pub skipped: bool,
    /// Nothing is predicted in this window; its loss means nothing.
    pub unlabelled: bool,
}

impl Point {
    pub fn logged(row: &LogRow) -> Option<Self> {
        let grad_norm = row.grad_norm.unwrap_or(f64::NAN);
        let skipped = row.grad_norm.is_some_and(|norm| !norm.is_finite());
        Some(Self { step: row.step, loss: row.loss?, grad_norm, skipped, unlabelled: false })
    }
    /// What the log would show of it, the mean over the logging window included; but a NaN stays one where the trainer's
    /// filter leaves nothing of the step.
    pub fn comparable(record: &StepRecord) -> Self {
        let own = Self::replayed(record);
        let shown = record.loss_logged.unwrap_or(record.loss);
        let left = own.loss.is_finite() || (shown.is_finite() && shown != 0.0);
        Self { loss: if left { shown } else { own.loss }, ..own }
    }
    /// This step's own unfiltered loss: a NaN stays one instead of 0.0.
    pub fn replayed(record: &StepRecord) -> Self {
        let unlabelled = record.micro_batches.iter().all(|m| m.label_tokens == 0);
        let loss = if unlabelled { 0.0 } else { record.loss_raw };
        let skipped = record.skipped || record.nonfinite > 0 || !record.grad_norm.is_finite();
        Self { step: record.step, loss, grad_norm: record.grad_norm, skipped, unlabelled }
    }
}

/// Height of a spike of `kind` within `range` of `series`; steps that the series lacks are taken from `history`
/// (what happened before it starts). Ascending by step both. NaN when the series has no step in the range.
pub fn of(kind: SpikeKind, series: &[Point], history: &[Point], range: RangeInclusive<u64>) -> f64 {
    let first = series.first().map_or(u64::MAX, |p| p.step);
    let all: Vec<Point> = history.iter().filter(|p| p.step < first).chain(series).copied().collect();
    let heights = all
        .iter()
        .enumerate()
        .filter(|(_, p)| range.contains(&p.step) && p.step >= first)
        .map(|(i, p)| point_height(kind, &all[..i], p));
    heights.fold(f64::NAN, f64::max)
}

fn point_height(kind: SpikeKind, before: &[Point], point: &Point) -> f64 {
    let broken = !point.loss.is_finite() || point.loss == 0.0;
    match kind {
        SpikeKind::Nan | SpikeKind::MaskedNan => f64::from(u8::from(broken)),
        SpikeKind::SkippedStep => f64::from(u8::from(point.skipped || broken)),
        SpikeKind::GradientExplosion => {
            let mut norms: Vec<f64> =
                before.iter().rev().map(|p| p.grad_norm).filter(|n| n.is_finite() && *n > 0.0).take(8).collect();
            norms.sort_by(f64::total_cmp);
            norms.get(norms.len() / 2).map_or(0.0, |&base| detect::height(point.grad_norm, base))
        }
        SpikeKind::Jump | SpikeKind::Divergence | SpikeKind::Stall | SpikeKind::Level => {
            if point.unlabelled {
                return 0.0;
            }
            if broken {
                return MAX_HEIGHT;
            }
            let losses = before.iter().rev().map(|p| p.loss).filter(|l| l.is_finite() && *l > 0.0).take(RECENT);
            losses.reduce(f64::min).map_or(0.0, |base| detect::height(point.loss, base))
        }
    }
}

/// How large an episode looks to a reader of the curve: halfway between how sharply it rose ([`Found::height`]) and how
/// far, its highest loss over the lowest of the [`RECENT`] rows before it. A rise in many small steps counts, and so
/// does a jump to a lower height.
pub fn size(rows: &[LogRow], found: &Found) -> f64 {
    if !matches!(found.kind, SpikeKind::Jump | SpikeKind::Divergence) {
        return found.height;
    }
    let usable = |row: &LogRow| row.loss.filter(|loss| loss.is_finite() && *loss > 0.0);
    let before = rows[..found.index].iter().rev().filter_map(usable).take(RECENT).reduce(f64::min);
    let within = rows[found.index..].iter().take_while(|row| row.step <= found.until);
    let peak = within.filter_map(usable).reduce(f64::max);
    let far = before.zip(peak).map_or(found.height, |(before, peak)| detect::height(peak, before));
    (found.height + far) / 2.0
}

/// The later loss does not come back to what it was before: `before` the spike, `after` its last step.
///
/// A log that ends within the episode counts as harm, unless the episode is a single row that ends it.
pub fn harmful(series: &[Point], step: u64, until: u64, before: Option<f64>) -> bool {
    let Some(before) = before.filter(|b| b.is_finite() && *b > 0.0) else { return true };
    let after: Vec<f64> = series.iter().filter(|p| p.step > until).map(|p| p.loss).take(AFTER).collect();
    match after.iter().copied().filter(|l| *l > 0.0).reduce(f64::min) {
        Some(best) => best > DAMAGE * before || after.iter().any(|l| !l.is_finite()),
        None => until > step,
    }
}

/// Share of the loss's way down that a run lost against another: mean of ln(loss / other) over the last half of
/// the steps both have.
pub fn lost_progress(series: &[Point], other: &[Point]) -> f64 {
    let pairs: Vec<f64> = series
        .iter()
        .filter_map(|p| {
            let q = other.binary_search_by_key(&p.step, |q| q.step).ok().map(|i| other[i])?;
            Some((p.loss / q.loss).ln())
        })
        .collect();
    let last = &pairs[pairs.len() / 2..];
    if last.is_empty() { f64::NAN } else { last.iter().sum::<f64>() / last.len() as f64 }
}
