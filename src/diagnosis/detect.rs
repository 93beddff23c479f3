//! Spikes in a log: which rows stand out from their recent past, and by how much.
//!
//! Pure functions of log rows. Whether a spike is reproduced, harmful or explained is decided elsewhere. Every rule
//! compares with the recent past of the same log: absolute levels differ between models, data and trainers.

use super::SpikeKind;
use super::explosion::gradient_spikes;
use crate::run::LogRow;

/// Heights are natural logarithms, bounded here: beyond e⁶ ≈ 400× more height means nothing more.
pub const MAX_HEIGHT: f64 = 6.0;
/// A single row must rise by this factor at least: a leaked window of evenly memorised data doubles the loss
/// (contract 15.2), and half of that is already visible to a reader of the curve.
const MIN_JUMP: f64 = 1.5;
/// With fewer than [`ENOUGH`] step-to-step differences the noise is unknown: only a clear rise counts.
const MIN_JUMP_SHORT: f64 = 3.0;
/// Above what a pretrained model starts from by [`MIN_JUMP`], this factor is clear enough: rows differ less.
const MIN_JUMP_PAST_START: f64 = 2.0;
/// A loss that falls by more than this (in ln) from row to row is in its fast descent.
const DESCENT: f64 = 0.1;
/// A rise that stays: every one of [`SUSTAIN`] rows is this factor above the low of the [`LONG`] rows before. Staying says
/// more than height: little noise keeps four rows up.
const MIN_DIVERGENCE: f64 = 1.7;
/// … and, the more rows stay up the fewer, so many standard deviations: that the lowest of n normal values beats
/// the low of those before it by this much happens by chance in none of a million rows.
const STAYING: [(usize, f64); 3] = [(SUSTAIN, 5.0), (8, 3.5), (16, 2.5)];
/// … and this factor (in ln) above the highest such rise seen before: sources and lengths that come in groups.
const BEYOND_USUAL: f64 = 1.5;
/// A peak at every epoch boundary counts from this factor on.
const MIN_BOUNDARY: f64 = 1.25;
/// A jump stands above the highest of the recent rows by this factor.
const CLEAR: f64 = 1.2;
/// With so few differences nothing that rises by this factor is called noise: a bad row may be in every other line of a
/// short log.
const STEEP: f64 = 8.0;
/// Rises that alternate are no higher than this factor …
const MAX_OSCILLATION: f64 = 4.0;
/// … and are called so from this many on.
const OFTEN: usize = 8;
pub(super) const ENOUGH: usize = 6;
const SUSTAIN: usize = 4;
/// Rows that make the minimum a jump is measured from.
const RECENT: usize = 3;
/// Rows that make the low a divergence is measured from.
const LONG: usize = 96;
/// Step-to-step differences that make the noise of the loss now; more would still hold the fast descent of the start.
const MOVES: usize = 8;
/// Rows that make the standard deviation of the loss.
const STEADY: usize = 24;
/// Rows after which the noise of the longer past ([`LONG`]) is known too.
const SETTLED: usize = 36;
/// The highest of some hundred normal values lies 3 deviations above their mean and the lowest of three 1 below;
/// the deviation itself is known to a third.
const DEVIATIONS: f64 = 6.0;
/// The same for the gradient norm, which wanders more.
pub(super) const NOISE: usize = 16;
/// Rows from the onset on among which the peak is taken: how sharp it rose, not how high it drifted later.
const PEAK: usize = 3;
/// A rise that lasts longer than this many rows did not come back by itself.
const LASTING: usize = 8;

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
    without_oscillation(merged(found), rows)
}

/// The unflagged rows before the current one.
#[derive(Default)]
struct Past {
    losses: Vec<f64>,
    /// ln loss.
    logs: Vec<f64>,
    /// Δ ln loss between neighbours.
    moves: Vec<f64>,
    /// ln(loss / minimum of the [`RECENT`] rows before), of every row that has one.
    rises: Vec<f64>,
    /// ln(lowest of [`SUSTAIN`] rows / low of the [`LONG`] rows before them), of every row that begins so many.
    stays: Vec<f64>,
    /// An episode lies between the last value and the next one: their difference is not noise.
    gap: bool,
}

impl Past {
    fn push(&mut self, loss: f64) {
        if let (Some(&last), false) = (self.losses.last(), self.gap) {
            self.moves.push((loss / last).ln());
        }
        if let Some(recent) = self.minimum(RECENT) {
            self.rises.push((loss / recent).ln());
        }
        self.gap = false;
        self.losses.push(loss);
        self.logs.push(loss.ln());
        if let Some(first) = self.logs.len().checked_sub(SUSTAIN).filter(|first| *first > 0) {
            let lowest = self.logs[first..].iter().copied().fold(f64::INFINITY, f64::min);
            self.stays.push(lowest - low(&self.logs[..first]));
        }
    }
    /// The larger of an estimate over the last [`STEADY`] rows and one over [`LONG`], once there are [`SETTLED`]: few
    /// rows of noise look quiet by chance now and then.
    fn widest(&self, estimate: impl Fn(&[f64]) -> f64) -> f64 {
        let recent = estimate(tail(&self.logs, STEADY));
        if self.logs.len() < SETTLED { recent } else { recent.max(estimate(tail(&self.logs, LONG))) }
    }
    /// Standard deviation of ln loss about its local line: the median second difference of white noise is
    /// 0.6745 √6 = 1.652 standard deviations. Robust against jumps, blind to a steady descent.
    fn deviation(&self) -> f64 {
        self.widest(|logs| {
            let second = sorted(logs.windows(3).map(|w| (w[2] - 2.0 * w[1] + w[0]).abs()));
            quantile(&second, 0.5) / 1.652
        })
    }
    /// Standard deviation of ln loss by its upward residuals alone: how far rows lie above the line between their
    /// neighbours. White noise of deviation σ has residuals of deviation σ √1.5, half of them upward. A descent that
    /// flattens has none, however steep; it is no noise.
    fn upward_deviation(&self) -> f64 {
        self.widest(|logs| {
            let squares = logs.windows(3).map(|w| (w[1] - 0.5 * (w[0] + w[2])).max(0.0).powi(2));
            let rows = logs.len().saturating_sub(2).max(1);
            (squares.sum::<f64>() / rows as f64 / 0.75).sqrt()
        })
    }
    /// What a rise that stays is measured from.
    fn low(&self) -> Option<f64> {
        (!self.logs.is_empty()).then(|| low(&self.logs).exp())
    }
    fn minimum(&self, rows: usize) -> Option<f64> {
        let from = self.losses.len().saturating_sub(rows);
        self.losses[from..].iter().copied().filter(|&l| l > 0.0).reduce(f64::min)
    }
    fn maximum(&self, rows: usize) -> f64 {
        tail(&self.losses, rows).iter().copied().fold(0.0, f64::max)
    }
    /// Least ln-rise of a single row that noise does not explain: the second largest rise of the longer past covers
    /// a batch that is easy now and then, the largest moves upwards batches that differ, the deviations white noise.
    /// Moves count about their trend, large ones only upwards: the descent itself is no noise.
    fn noise(&self) -> f64 {
        let moves = sorted(tail(&self.moves, MOVES).iter().copied());
        let trend = quantile(&moves, 0.5);
        let about = sorted(moves.iter().map(|m| (m - trend).abs()));
        let upwards = sorted(moves.iter().map(|m| m.max(0.0)));
        let rises = sorted(tail(&self.rises, LONG).iter().map(|rise| -rise));
        let usual = rises.get(1).map_or(0.0, |rise| -BEYOND_USUAL * rise);
        let steady = DEVIATIONS * self.deviation();
        (4.0 * quantile(&about, 0.5)).max(1.6 * quantile(&upwards, 0.9)).max(usual).max(steady)
    }
    /// A loss that falls fast also bounces, so that only a clear rise counts there, as where the noise is unknown.
    fn threshold(&self) -> f64 {
        let moves = sorted(tail(&self.moves, MOVES).iter().copied());
        let unsure = !self.knows_noise() || quantile(&moves, 0.5) < -DESCENT;
        let floor = if unsure { MIN_JUMP_SHORT } else { MIN_JUMP };
        let noise = if self.knows_noise() { self.noise() } else { self.noise().min(STEEP.ln()) };
        floor.ln().max(noise)
    }
    fn knows_noise(&self) -> bool {
        self.moves.len() >= ENOUGH
    }
    /// Least ln-rise of rows together, the lowest of them `lowest`, that noise of so many `deviations` does not
    /// explain. Where the noise is unknown the rows must pass what the run started from, or rise as clearly as a
    /// single one.
    fn divergence_threshold(&self, lowest: f64, deviations: f64) -> f64 {
        let usual = tail(&self.stays, LONG).iter().copied().fold(0.0, f64::max);
        let known = self.knows_noise() || lowest >= self.start();
        let floor = if known { MIN_DIVERGENCE } else { MIN_JUMP_SHORT };
        floor.ln().max(deviations * self.upward_deviation()).max(BEYOND_USUAL * usual)
    }
    /// A row that passes what the run started from, far above what it had come down to: no descent explains it,
    /// whatever its own steps were.
    fn passes_the_start(&self, loss: f64, rise: f64) -> bool {
        let floor = if loss >= MIN_JUMP * self.start() { MIN_JUMP_PAST_START } else { MIN_JUMP_SHORT };
        let least = floor.ln().max(DEVIATIONS * self.upward_deviation());
        self.losses.len() >= RECENT && loss >= self.start() && rise >= least
    }
    /// Highest of the first rows.
    fn start(&self) -> f64 {
        self.losses.iter().take(RECENT).copied().fold(0.0, f64::max)
    }
    fn may_round_to_zero(&self, context: &Context) -> bool {
        context.rounds_loss && self.losses.last().is_some_and(|&last| last < 1e-3)
    }
}

/// Of the last [`LONG`] ln losses the lowest but one in twenty.
fn low(logs: &[f64]) -> f64 {
    let recent = sorted(tail(logs, LONG).iter().copied());
    recent.get(recent.len() / 20).copied().unwrap_or(f64::NAN)
}

fn tail(values: &[f64], count: usize) -> &[f64] {
    &values[values.len().saturating_sub(count)..]
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
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
    let long = past.low()?;
    let lowest = |rows_ahead: usize| {
        let ahead = rows[index..].iter().filter_map(|r| r.loss).take(rows_ahead);
        ahead.fold((0, f64::INFINITY), |(count, least), loss| (count + 1, least.min(loss)))
    };
    let climbs = (loss / recent).ln();
    // Most rows do neither; what noise explains need not be known for them.
    if climbs < MIN_JUMP.ln() && (lowest(SUSTAIN).1 / long).ln() < MIN_DIVERGENCE.ln() {
        return None;
    }
    let threshold = past.threshold();
    let staying = STAYING.iter().find_map(|&(count, deviations)| {
        let (there, least) = lowest(count);
        let enough = past.divergence_threshold(least, deviations);
        let long_enough = there == count || (count == SUSTAIN && there >= 2);
        (long_enough && (least / long).ln() >= enough).then_some(enough)
    });
    let stays = staying.is_some();
    // Above the easy row before it is not enough: it must stand above the hard ones too.
    let clear = loss >= CLEAR * past.maximum(RECENT) || (!past.knows_noise() && climbs >= STEEP.ln());
    let jumps = clear && (climbs >= threshold || past.passes_the_start(loss, climbs));
    if !stays && !jumps {
        return None;
    }
    let before = if jumps { recent } else { long };
    let back = before * (past.noise() / 2.0).exp().clamp(MIN_JUMP.sqrt(), MIN_JUMP);
    let mut end = episode_end(rows, index, |row| row.loss.is_some_and(|l| l > 0.0 && l <= back));
    // A loss of 0.0 or NaN does not end a rise; it is an episode of its own.
    if let Some(broken) = rows[index..end].iter().position(|r| r.loss.is_some_and(|l| l == 0.0 || !l.is_finite())) {
        end = index + broken;
    }
    Some(measured(rows, index, end, before, staying.unwrap_or(threshold).min(threshold), stays))
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

/// Lengths or sources that alternate make a log oscillate: moderate rises of similar height, again and again, each
/// of which comes back. One bad row comes once an epoch, a bookkeeping fault at its boundary; instability grows.
fn without_oscillation(found: Vec<Found>, rows: &[LogRow]) -> Vec<Found> {
    let last = rows.last().map_or(0, |r| r.step);
    let epochs = rows.iter().filter_map(|r| r.epoch).fold(1.0, f64::max);
    let comes_back = |f: &Found| match f.kind {
        SpikeKind::Jump | SpikeKind::Divergence => f.height <= MAX_OSCILLATION.ln() && f.until < last,
        _ => false,
    };
    let mut heights: Vec<f64> = found.iter().filter(|f| comes_back(f)).map(|f| f.height).collect();
    let often = heights.len() >= OFTEN && heights.len() as f64 > 2.0 * epochs;
    let covered = found.iter().filter(|f| comes_back(f)).map(|f| rows_within(rows, f)).sum::<usize>();
    if heights.len() < 3 || !(often || covered * 4 >= rows.len()) {
        return found;
    }
    heights.sort_by(f64::total_cmp);
    let (lower, usual, upper) = (quantile(&heights, 0.25), quantile(&heights, 0.5), quantile(&heights, 0.75));
    if upper - lower > 0.4 * usual {
        return found;
    }
    let benign = |f: &Found| {
        matches!(f.kind, SpikeKind::Jump | SpikeKind::Divergence) && f.height <= (1.5 * usual).max(usual + 0.3)
    };
    found.into_iter().filter(|f| !benign(f)).collect()
}

fn rows_within(rows: &[LogRow], found: &Found) -> usize {
    rows[found.index..].iter().take_while(|r| r.step <= found.until).count()
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
