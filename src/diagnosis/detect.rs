//! Spikes in a log: which rows stand out from their recent past, and by how much.
//!
//! Pure functions of log rows. Whether a spike is reproduced, harmful or explained is decided elsewhere. Every rule
//! compares with the recent past of the same log: absolute levels differ between models, data and trainers.

use super::SpikeKind;
use super::explosion::gradient_spikes;
use super::past::{MIN_DIVERGENCE, MIN_JUMP, Past, RECENT, STAYING, STEEP, SUSTAIN, quantile};
use crate::run::LogRow;

/// Heights are natural logarithms, bounded here: beyond e⁶ ≈ 400× more height means nothing more.
pub const MAX_HEIGHT: f64 = 6.0;
/// A peak at every epoch boundary counts from this factor on.
const MIN_BOUNDARY: f64 = 1.25;
/// A jump stands above the highest of the recent rows by this factor.
const CLEAR: f64 = 1.2;
/// Rises that alternate are no higher than this factor …
const MAX_OSCILLATION: f64 = 4.0;
/// … and are called so from this many on.
const OFTEN: usize = 8;
/// The same for the gradient norm, which wanders more.
pub(super) const NOISE: usize = 16;
/// Rows from the onset on among which the peak is taken: how sharp it rose, not how high it drifted later.
const PEAK: usize = 3;
/// A rise that lasts longer than this many rows did not come back by itself.
const LASTING: usize = 8;
/// Samples that average out what single ones differ by: the accumulation of LLaMA-Factory's examples.
const MANY: usize = 8;

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
    /// Samples whose mean is a row's loss; 0: not known.
    pub samples: usize,
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
    // Rises that are none by themselves, each at most two rows after the one before, as in [`merged`].
    let mut shallow: Vec<Found> = Vec::new();
    let within = |shallow: &[Found], step: u64, after: u64| shallow.last().is_some_and(|s| step <= s.until + after);
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
            let few = few(context, &rows[index]);
            match rise(rows, index, &past, few) {
                Some((found, stays)) if !stays && few && !past.stands_out(loss) => {
                    if !within(&shallow, found.step, 2) {
                        shallow.clear();
                    }
                    if !within(&shallow, found.step, 0) {
                        shallow.push(found);
                    }
                    None
                }
                rise => rise.map(|(found, _)| found),
            }
        };
        match episode {
            Some(episode) => {
                index = rows[index..].iter().position(|r| r.step > episode.until).map_or(rows.len(), |n| index + n);
                // What stays begins with the rises from which the loss hardly came back.
                if episode.kind == SpikeKind::Divergence && within(&shallow, episode.step, 2) {
                    found.append(&mut shallow);
                }
                shallow.clear();
                found.push(episode);
                past.gap = true;
            }
            None if within(&shallow, rows[index].step, 0) => {
                past.skip(loss);
                index += 1;
            }
            None => {
                past.push(loss, samples(context, &rows[index]) >= MANY);
                index += 1;
            }
        }
    }
    without_oscillation(merged(found), rows)
}

/// Where few samples make a row, one that is easy for once makes the next one a jump: it is one if it stands out of more
/// rows than that, or begins what stays.
fn few(context: &Context, row: &LogRow) -> bool {
    (1..MANY).contains(&samples(context, row))
}

fn samples(context: &Context, row: &LogRow) -> usize {
    context.samples.saturating_mul(usize::try_from(row.window.max(1)).unwrap_or(usize::MAX))
}

/// A jump or a divergence that starts at `index`, where the loss is finite, and whether it or a part of it stays.
fn rise(rows: &[LogRow], index: usize, past: &Past, few: bool) -> Option<(Found, bool)> {
    let loss = rows[index].loss?;
    let recent = past.minimum(RECENT)?;
    let long = past.low()?;
    let lowest = |from: usize, rows_ahead: usize| {
        let ahead = rows[from..].iter().filter_map(|r| r.loss).take(rows_ahead);
        ahead.fold((0, f64::INFINITY), |(count, least), loss| (count + 1, least.min(loss)))
    };
    let climbs = (loss / recent).ln();
    // Most rows do neither; what noise explains need not be known for them.
    if climbs < MIN_JUMP.ln() && (lowest(index, SUSTAIN).1 / long).ln() < MIN_DIVERGENCE.ln() {
        return None;
    }
    let threshold = past.threshold();
    let staying = |from: usize| {
        STAYING.iter().enumerate().find_map(|(which, &(count, _))| {
            let (there, least) = lowest(from, count);
            // Two samples that end a log may be two hard ones.
            let long_enough = there == count || (count == SUSTAIN && there >= 2 && !few);
            // A rise that is none needs no noise.
            let climbs = (least / long).ln();
            let enough =
                (long_enough && climbs >= MIN_DIVERGENCE.ln()).then(|| past.divergence_threshold(least, which))?;
            (climbs >= enough).then_some(enough)
        })
    };
    let stays = staying(index);
    // Above the easy row before it is not enough: it must stand above the hard ones too.
    let clear = loss >= CLEAR * past.maximum(RECENT) || (!past.knows_noise() && climbs >= STEEP.ln());
    let jumps = clear && (climbs >= threshold || past.passes_the_start(loss, climbs));
    if stays.is_none() && !jumps {
        return None;
    }
    let before = if jumps { recent } else { long };
    let back = before * (past.noise() / 2.0).exp().clamp(MIN_JUMP.sqrt(), MIN_JUMP);
    let mut end = episode_end(rows, index, |row| row.loss.is_some_and(|l| l > 0.0 && l <= back));
    // A loss of 0.0 or NaN does not end a rise; it is an episode of its own.
    if let Some(broken) = rows[index..end].iter().position(|r| r.loss.is_some_and(|l| l == 0.0 || !l.is_finite())) {
        end = index + broken;
    }
    let found = measured(rows, index, end, before, stays.unwrap_or(threshold).min(threshold), stays.is_some());
    Some((found, stays.is_some() || (index + 1..end).any(|from| staying(from).is_some())))
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
            past.push(before, false);
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
