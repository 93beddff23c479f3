//! Spikes in a log: which rows stand out from their recent past, and by how much.
//!
//! Pure functions of log rows. Whether a spike is reproduced, harmful or explained is decided elsewhere. Every rule
//! compares with the recent past of the same log: absolute levels differ between models, data and trainers.

use super::SpikeKind;
use crate::run::LogRow;

/// Heights are natural logarithms, bounded here: beyond e⁶ ≈ 400× more height means nothing more.
pub const MAX_HEIGHT: f64 = 6.0;
/// A single row must rise by this factor at least: a leaked window of evenly memorised data doubles the loss
/// (contract 15.2), and half of that is already visible to a reader of the curve.
const MIN_JUMP: f64 = 1.5;
/// With fewer than [`ENOUGH`] step-to-step differences the noise is unknown: only a clear rise counts.
const MIN_JUMP_SHORT: f64 = 3.0;
/// A rise that stays: every one of [`SUSTAIN`] rows is this factor above the minimum of [`LONG`] rows. Staying says
/// more than height: no noise keeps four rows up.
const MIN_DIVERGENCE: f64 = 1.7;
/// A pre-clip norm wanders by factors of a few in healthy runs; an explosion is an order of magnitude.
const MIN_EXPLOSION: f64 = 10.0;
/// A peak at every epoch boundary counts from this factor on.
const MIN_BOUNDARY: f64 = 1.25;
/// A jump stands above the highest of the recent rows by this factor.
const CLEAR: f64 = 1.2;
const ENOUGH: usize = 6;
const SUSTAIN: usize = 4;
/// Rows that make the minimum a jump is measured from.
const RECENT: usize = 3;
/// Rows that make the minimum a divergence is measured from.
const LONG: usize = 48;
/// Step-to-step differences that make the noise of the loss now; more would still hold the fast descent of the start.
const MOVES: usize = 8;
/// Rows that make the standard deviation of the loss.
const STEADY: usize = 24;
/// The highest of some hundred normal values lies 3 deviations above their mean and the lowest of three 1 below;
/// the deviation itself is known to a third.
const DEVIATIONS: f64 = 6.0;
/// The same for the gradient norm, which wanders more.
const NOISE: usize = 16;
/// Rows from the onset on among which the peak is taken: how sharp it rose, not how high it drifted later.
const PEAK: usize = 3;
/// A rise that lasts longer than this many rows did not come back by itself.
const LASTING: usize = 8;
/// GradScaler doubles its scale after so many good steps and halves it at the skip that follows (torch default).
const GROWTH_INTERVAL: u64 = 2000;

/// What the log alone does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Context {
    /// Dynamic loss scaling is on: skipped steps are possible, and normal while the scale calibrates.
    pub loss_scaling: bool,
    /// The logged loss is rounded to 4 decimals: 0.0 may be a small number.
    pub rounds_loss: bool,
    /// Entropy of a uniform guess is ln of it.
    pub vocab_size: Option<usize>,
    pub accumulation: usize,
}

/// One episode of the log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Index of the first row, into the rows given.
    pub index: usize,
    pub step: u64,
    pub until: u64,
    pub kind: SpikeKind,
    /// Recent minimum of the loss (median of the gradient norm for an explosion).
    pub before: Option<f64>,
    pub at: f64,
    pub height: f64,
}

/// ln(at / before), 0 when it did not rise, at most [`MAX_HEIGHT`]. Anything not finite is the full height.
pub fn height(at: f64, before: f64) -> f64 {
    let ratio = (at / before).ln();
    if ratio.is_nan() || ratio > MAX_HEIGHT { MAX_HEIGHT } else { ratio.max(0.0) }
}

/// All spikes, ascending by step. Rows of one history: each step once, ascending (see [`effective`]).
pub fn spikes(rows: &[LogRow], context: &Context) -> Vec<Found> {
    let mut found = loss_spikes(rows, context);
    found.extend(boundary_spikes(rows, &found));
    found.extend(gradient_spikes(rows, context, &found));
    found.extend(level(rows, context));
    found.sort_by_key(|f| f.step);
    found
}

/// The history that led to the final weights: of rows logged twice, those of the later attempt.
pub fn effective(rows: &[LogRow]) -> Vec<LogRow> {
    let mut kept: Vec<LogRow> = Vec::with_capacity(rows.len());
    for row in rows {
        while kept.last().is_some_and(|last| last.step >= row.step && last.attempt < row.attempt) {
            kept.pop();
        }
        kept.push(row.clone());
    }
    kept
}

fn loss_spikes(rows: &[LogRow], context: &Context) -> Vec<Found> {
    let mut found: Vec<Found> = Vec::new();
    let mut past = Past::default();
    let mut index = 0;
    while index < rows.len() {
        let Some(loss) = rows[index].loss else {
            index += 1;
            continue;
        };
        let episode = if !loss.is_finite() {
            Some(broken_episode(rows, index, SpikeKind::Nan))
        } else if loss == 0.0 && !past.may_round_to_zero(context) {
            Some(broken_episode(rows, index, SpikeKind::MaskedNan))
        } else {
            rise(rows, index, &past)
        };
        match episode {
            Some(episode) => {
                index = rows[index..].iter().position(|r| r.step > episode.until).map_or(rows.len(), |n| index + n);
                found.push(episode);
                past.gap = true;
            }
            None => {
                past.push(loss);
                index += 1;
            }
        }
    }
    without_oscillation(merged(found), rows.len())
}

/// The unflagged rows before the current one.
#[derive(Default)]
struct Past {
    losses: Vec<f64>,
    /// ln loss.
    logs: Vec<f64>,
    /// |Δ ln loss| between neighbours.
    moves: Vec<f64>,
    /// ln(loss / minimum of the [`RECENT`] rows before), of every row that has one.
    rises: Vec<f64>,
    /// An episode lies between the last value and the next one: their difference is not noise.
    gap: bool,
}

impl Past {
    fn push(&mut self, loss: f64) {
        if let (Some(&last), false) = (self.losses.last(), self.gap) {
            self.moves.push((loss / last).ln().abs());
        }
        if let Some(recent) = self.minimum(RECENT) {
            self.rises.push((loss / recent).ln());
        }
        self.gap = false;
        self.losses.push(loss);
        self.logs.push(loss.ln());
    }
    /// Standard deviation of ln loss about its local line: the median second difference of white noise is
    /// 0.6745 √6 = 1.652 standard deviations. Robust against jumps, blind to a steady descent.
    fn deviation(&self) -> f64 {
        let mut second: Vec<f64> =
            tail(&self.logs, STEADY).windows(3).map(|w| (w[2] - 2.0 * w[1] + w[0]).abs()).collect();
        second.sort_by(f64::total_cmp);
        quantile(&second, 0.5) / 1.652
    }
    fn minimum(&self, rows: usize) -> Option<f64> {
        let from = self.losses.len().saturating_sub(rows);
        self.losses[from..].iter().copied().filter(|&l| l > 0.0).reduce(f64::min)
    }
    fn maximum(&self, rows: usize) -> f64 {
        tail(&self.losses, rows).iter().copied().fold(0.0, f64::max)
    }
    /// Least ln-rise of a single row that noise does not explain. Moves are not centred: a loss that falls by half at every
    /// step may also bounce by half. The 90th percentile covers batches that differ now and then, the second
    /// largest rise of the longer past a batch that is easy now and then.
    fn noise(&self) -> f64 {
        let mut moves = tail(&self.moves, MOVES).to_vec();
        let mut rises = tail(&self.rises, LONG).to_vec();
        moves.sort_by(f64::total_cmp);
        rises.sort_by(|a, b| b.total_cmp(a));
        let usual = rises.get(1).map_or(0.0, |rise| 1.5 * rise);
        let steady = DEVIATIONS * self.deviation();
        (4.0 * quantile(&moves, 0.5)).max(1.6 * quantile(&moves, 0.9)).max(usual).max(steady)
    }
    fn threshold(&self) -> f64 {
        let floor = if self.moves.len() < ENOUGH { MIN_JUMP_SHORT } else { MIN_JUMP };
        floor.ln().max(self.noise())
    }
    fn divergence_threshold(&self) -> f64 {
        MIN_DIVERGENCE.ln().max(0.75 * self.noise())
    }
    fn may_round_to_zero(&self, context: &Context) -> bool {
        context.rounds_loss && self.losses.last().is_some_and(|&last| last < 1e-3)
    }
}

fn tail(values: &[f64], count: usize) -> &[f64] {
    &values[values.len().saturating_sub(count)..]
}

/// Of ascending values; 0 of none.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = ((sorted.len() as f64 - 1.0).max(0.0) * q).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}

/// A jump or a divergence that starts at `index`, where the loss is finite.
fn rise(rows: &[LogRow], index: usize, past: &Past) -> Option<Found> {
    let loss = rows[index].loss?;
    let recent = past.minimum(RECENT)?;
    let long = past.minimum(LONG)?;
    let ahead: Vec<f64> = rows[index..].iter().filter_map(|r| r.loss).take(SUSTAIN).collect();
    let lowest = ahead.iter().copied().fold(f64::INFINITY, f64::min);
    let threshold = past.threshold();
    let stays = ahead.len() >= 2 && (lowest / long).ln() >= past.divergence_threshold();
    // Above the easy row before it is not enough: it must stand above the hard ones too.
    let jumps = (loss / recent).ln() >= threshold && loss >= CLEAR * past.maximum(RECENT);
    if !stays && !jumps {
        return None;
    }
    let before = if jumps { recent } else { long };
    let back = before * (threshold / 2.0).exp().min(1.5);
    let mut end = episode_end(rows, index, |row| row.loss.is_some_and(|l| l > 0.0 && l <= back));
    // A loss of 0.0 or NaN does not end a rise; it is an episode of its own.
    if let Some(broken) = rows[index..end].iter().position(|r| r.loss.is_some_and(|l| l == 0.0 || !l.is_finite())) {
        end = index + broken;
    }
    Some(measured(rows, index, end, before, threshold, stays))
}

/// Height, peak and step of the episode `index..end`.
///
/// The height is that of its sharpest rise: over `before` within [`PEAK`] rows of the onset, or over the minimum of
/// the [`RECENT`] rows before any of its rows. Its step is the first that shows half of it, so that a slow bump
/// ahead of the runaway does not count as the spike.
fn measured(rows: &[LogRow], index: usize, end: usize, before: f64, threshold: f64, stays: bool) -> Found {
    let loss_at = |i: usize| rows[i].loss.unwrap_or(f64::NAN);
    let base = |i: usize| {
        let recent = (i.saturating_sub(RECENT)..i).map(loss_at).filter(|l| *l > 0.0).fold(f64::INFINITY, f64::min);
        if i < index + PEAK { before.min(recent) } else { recent }
    };
    let rise = |i: usize| height(loss_at(i), base(i));
    let sharpest = (index..end).filter(|&i| rows[i].loss.is_some()).max_by(|&a, &b| rise(a).total_cmp(&rise(b)));
    let top = sharpest.unwrap_or(index);
    let enough = threshold.min(rise(top)).max(rise(top) / 2.0);
    let first = (index..=top).find(|&i| rows[i].loss.is_some() && rise(i) >= enough).unwrap_or(index);
    let lasting = stays || end - first > LASTING;
    Found {
        index: first,
        step: rows[first].step,
        until: rows[end - 1].step,
        kind: if lasting { SpikeKind::Divergence } else { SpikeKind::Jump },
        before: Some(base(top)),
        at: loss_at(top),
        height: rise(top),
    }
}

/// One past the last row of an episode: up to the first row that is `back`, or the end of the log.
fn episode_end(rows: &[LogRow], index: usize, back: impl Fn(&LogRow) -> bool) -> usize {
    rows[index + 1..].iter().position(back).map_or(rows.len(), |n| index + 1 + n)
}

/// NaN, infinity or 0.0, until the loss is a positive number again.
fn broken_episode(rows: &[LogRow], index: usize, kind: SpikeKind) -> Found {
    let end = episode_end(rows, index, |row| row.loss.is_some_and(|l| l.is_finite() && l != 0.0));
    let before = rows[..index].iter().rev().filter_map(|r| r.loss).filter(|l| l.is_finite() && *l > 0.0).take(RECENT);
    Found {
        index,
        step: rows[index].step,
        until: rows[end - 1].step,
        kind,
        before: before.reduce(f64::min),
        at: rows[index].loss.unwrap_or(f64::NAN),
        height: 1.0,
    }
}

/// Rises at most two rows apart, the later one lasting, are one: it went up in steps.
fn merged(found: Vec<Found>) -> Vec<Found> {
    let rising = |kind| matches!(kind, SpikeKind::Jump | SpikeKind::Divergence);
    let mut out: Vec<Found> = Vec::new();
    for next in found {
        match out.last_mut() {
            Some(last) if rising(last.kind) && next.kind == SpikeKind::Divergence && next.step <= last.until + 2 => {
                let (before, at, height) = if next.height > last.height {
                    (next.before, next.at, next.height)
                } else {
                    (last.before, last.at, last.height)
                };
                *last = Found { until: next.until, kind: next.kind, before, at, height, ..*last };
            }
            _ => out.push(next),
        }
    }
    out
}

/// A log in which a quarter of all rows "jump" by similar factors oscillates: lengths or sources alternate.
fn without_oscillation(found: Vec<Found>, rows: usize) -> Vec<Found> {
    let mut heights: Vec<f64> = found.iter().filter(|f| f.kind == SpikeKind::Jump).map(|f| f.height).collect();
    if heights.len() * 4 < rows || heights.len() < 4 {
        return found;
    }
    heights.sort_by(f64::total_cmp);
    let usual = heights[heights.len() / 2] * 1.5;
    found.into_iter().filter(|f| f.kind != SpikeKind::Jump || f.height > usual).collect()
}

/// Rises that recur in the first row of every epoch: too low each to stand out of a descent, but no chance together
/// (contract 3.4: a leaked window). At least two boundaries, each a peak over both of its neighbours.
fn boundary_spikes(rows: &[LogRow], taken: &[Found]) -> Vec<Found> {
    let crosses = |w: &[LogRow]| match (w[0].epoch, w[1].epoch) {
        (Some(before), Some(at)) => before.ceil() < at.ceil() && before > 0.0,
        _ => false,
    };
    let mut past = Past::default();
    let mut peaks = Vec::new();
    let mut boundaries = 0;
    for (i, w) in rows.windows(3).enumerate() {
        let (Some(before), Some(at), Some(after)) = (w[0].loss, w[1].loss, w[2].loss) else { continue };
        if before.is_finite() && before > 0.0 {
            past.push(before);
        }
        if !crosses(w) {
            continue;
        }
        boundaries += 1;
        if (at / before.max(after)).ln() >= MIN_BOUNDARY.ln().max(3.0 * past.deviation()) {
            let before = past.minimum(RECENT);
            let height = before.map_or(0.0, |b| height(at, b));
            let step = w[1].step;
            peaks.push(Found { index: i + 1, step, until: step, kind: SpikeKind::Jump, before, at, height });
        }
    }
    if peaks.len() < 2 || peaks.len() < boundaries {
        return Vec::new();
    }
    peaks.retain(|p| !taken.iter().any(|t| (t.step..=t.until).contains(&p.step)));
    peaks
}

/// Skipped steps and explosions of the gradient norm outside the loss spikes.
fn gradient_spikes(rows: &[LogRow], context: &Context, taken: &[Found]) -> Vec<Found> {
    let covered = |step: u64| taken.iter().any(|f| step + 1 >= f.step && step <= f.until + 2);
    let mut found = Vec::new();
    let mut past: Vec<f64> = Vec::new();
    let mut last_skip = 0;
    for (index, row) in rows.iter().enumerate() {
        let (Some(norm), Some(loss)) = (row.grad_norm, row.loss) else { continue };
        if !norm.is_finite() {
            // Before the first finite norm the scale calibrates; after GROWTH_INTERVAL good steps it probes upwards.
            let calibrating = context.loss_scaling && (past.is_empty() || row.step >= last_skip + GROWTH_INTERVAL);
            last_skip = row.step;
            if !calibrating && loss.is_finite() && loss != 0.0 && !covered(row.step) {
                found.push(gradient_found(rows, index, SpikeKind::SkippedStep, &past));
            }
            continue;
        }
        if norm > 0.0 && !covered(row.step) && explodes(norm, &past) {
            found.push(gradient_found(rows, index, SpikeKind::GradientExplosion, &past));
        } else if norm > 0.0 {
            past.push(norm);
        }
    }
    found
}

fn explodes(norm: f64, past: &[f64]) -> bool {
    let recent = &past[past.len().saturating_sub(NOISE)..];
    if recent.len() <= ENOUGH {
        return false;
    }
    let mut moves: Vec<f64> = recent.windows(2).map(|w| (w[1] / w[0]).ln().abs()).collect();
    moves.sort_by(f64::total_cmp);
    let threshold = MIN_EXPLOSION.ln().max(4.0 * moves[moves.len() / 2]).max(1.6 * moves[moves.len() * 9 / 10]);
    (norm / middle(recent)).ln() >= threshold
}

/// Median of the last eight.
fn middle(norms: &[f64]) -> f64 {
    let mut recent = norms[norms.len().saturating_sub(8)..].to_vec();
    recent.sort_by(f64::total_cmp);
    recent.get(recent.len() / 2).copied().unwrap_or(f64::NAN)
}

fn gradient_found(rows: &[LogRow], index: usize, kind: SpikeKind, past: &[f64]) -> Found {
    let at = rows[index].grad_norm.unwrap_or(f64::NAN);
    let before = Some(middle(past)).filter(|b| b.is_finite());
    let height = if at.is_finite() { before.map_or(1.0, |b| height(at, b)) } else { 1.0 };
    Found { index, step: rows[index].step, until: rows[index].step, kind, before, at, height }
}

/// A log whose first loss is far above the entropy of a uniform guess is a multiple of the loss: nothing that was
/// pretrained starts there. Only an accumulation factor multiplies (contract 15.7).
fn level(rows: &[LogRow], context: &Context) -> Option<Found> {
    let first = rows.first()?;
    let uniform = (context.vocab_size? as f64).ln();
    let loss = first.loss?;
    if context.accumulation < 2 || first.step > first.window || !(loss.is_finite() && loss > 1.5 * uniform) {
        return None;
    }
    Some(Found {
        index: 0,
        step: first.step,
        until: rows.last()?.step,
        kind: SpikeKind::Level,
        before: Some(loss / context.accumulation as f64),
        at: loss,
        height: (context.accumulation as f64).ln(),
    })
}
