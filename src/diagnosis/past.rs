//! What the rows before a row say of it: how much a log's loss moves by itself, and from where a rise is measured.

use super::detect::Context;

/// A single row must rise by this factor at least: a leaked window of evenly memorised data doubles the loss
/// (contract 15.2), and half of that is already visible to a reader of the curve.
pub(super) const MIN_JUMP: f64 = 1.5;
/// With fewer than [`ENOUGH`] step-to-step differences the noise is unknown: only a clear rise counts.
const MIN_JUMP_SHORT: f64 = 3.0;
/// Above what a pretrained model starts from by [`MIN_JUMP`], this factor is clear enough: rows differ less.
const MIN_JUMP_PAST_START: f64 = 2.0;
/// A loss that falls by more than this (in ln) from row to row is in its fast descent.
const DESCENT: f64 = 0.1;
/// A rise that stays: every one of its rows is this factor above the low of the [`LONG`] rows before. Staying says
/// more than height: little noise keeps four rows up.
pub(super) const MIN_DIVERGENCE: f64 = 1.7;
/// … and this factor (in ln) above the highest such rise seen before: sources and lengths that come in groups.
const BEYOND_USUAL: f64 = 1.5;
/// With so few differences nothing that rises by this factor is called noise: a bad row may be in every other line of a
/// short log.
pub(super) const STEEP: f64 = 8.0;
/// Rows that stay up and, the more they are the fewer, by so many standard deviations: that the lowest of n normal values
/// beats the low of those before it by this much happens by chance in none of a million rows.
pub(super) const STAYING: [(usize, f64); 4] = [(SUSTAIN, 5.0), (8, 3.5), (16, 2.0), (32, 1.5)];
pub(super) const ENOUGH: usize = 6;
pub(super) const SUSTAIN: usize = 4;
/// Rows that make the minimum a jump is measured from.
pub(super) const RECENT: usize = 3;
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

/// Rows without any noise that say that the noise of the rows before them is over …
const CALM: usize = 8;
/// … when the wildest of them stays this many times below the rises there were, of some four deviations: by chance, in
/// none of a million stretches.
const CALMER: f64 = 24.0;
/// A rise counts as usual in a calm when it came out of one, no more than this many times as restless.
const LIKEWISE: f64 = 2.0;
/// Rows that a row of a window of few rows has to stand out of …
const AROUND: usize = 8;
/// … by so many of their standard deviations, and above all of so many more. In ln such a log is all depths: an easy row
/// makes the next one a rise.
const OUTSTANDING: f64 = 5.0;
const ABOVE: usize = 24;

/// The unflagged rows before the current one.
#[derive(Default)]
pub(super) struct Past {
    losses: Vec<f64>,
    /// ln loss.
    logs: Vec<f64>,
    /// Δ ln loss between neighbours.
    moves: Vec<f64>,
    /// ln(loss / minimum of the [`RECENT`] rows before), of every row that has one, and [`Past::calm`] before it.
    rises: Vec<(f64, f64)>,
    /// ln(lowest of so many rows / low of the [`LONG`] rows before them), of every row that begins so many: for each of
    /// [`STAYING`].
    stays: [Vec<f64>; STAYING.len()],
    /// The last row is the mean of many samples.
    many: bool,
    /// The rows before the current one, those included that are no noise and no spike.
    around: Vec<f64>,
    /// An episode lies between the last value and the next one: their difference is not noise.
    pub gap: bool,
}

impl Past {
    /// `many`: so many samples make the row that no kind of rows is alone in it.
    pub fn push(&mut self, loss: f64, many: bool) {
        if let (Some(&last), false) = (self.losses.last(), self.gap) {
            self.moves.push((loss / last).ln());
        }
        if let Some(recent) = self.minimum(RECENT) {
            self.rises.push(((loss / recent).ln(), self.calm()));
            self.many = many;
        }
        self.gap = false;
        self.around.push(loss);
        self.losses.push(loss);
        self.logs.push(loss.ln());
        for (stays, (count, _)) in self.stays.iter_mut().zip(STAYING) {
            if let Some(first) = self.logs.len().checked_sub(count).filter(|first| *first > 0) {
                let lowest = self.logs[first..].iter().copied().fold(f64::INFINITY, f64::min);
                stays.push(lowest - low(&self.logs[..first]));
            }
        }
    }
    /// A row too high for noise that is no spike either.
    pub fn skip(&mut self, loss: f64) {
        self.around.push(loss);
        self.gap = true;
    }
    /// The larger of an estimate over the last [`STEADY`] rows and one over [`LONG`], once there are [`SETTLED`]: few
    /// rows of noise look quiet by chance now and then.
    fn widest(&self, estimate: impl Fn(&[f64]) -> f64) -> f64 {
        let recent = estimate(tail(&self.logs, STEADY));
        if self.logs.len() < SETTLED { recent } else { recent.max(estimate(tail(&self.logs, LONG))) }
    }
    /// Standard deviation of ln loss about its local line: the median second difference of white noise is
    /// 0.6745 √6 = 1.652 standard deviations. Robust against jumps, blind to a steady descent.
    pub fn deviation(&self) -> f64 {
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
    /// The deviation that would explain the wildest of the last [`CALM`] rows.
    fn calm(&self) -> f64 {
        if self.logs.len() < CALM {
            return f64::INFINITY;
        }
        let second = tail(&self.logs, CALM).windows(3).map(|w| (w[2] - 2.0 * w[1] + w[0]).abs());
        second.fold(0.0, f64::max) / f64::sqrt(6.0)
    }
    /// The rise that noise makes now and then: the second largest of the longer past. Where rows have calmed down, only
    /// those count that came out of a calm as well: before it was an instability that has died down.
    fn usual(&self) -> f64 {
        let second = |likewise: f64| {
            let rises = tail(&self.rises, LONG).iter().filter(|(_, calm)| *calm <= likewise);
            sorted(rises.map(|(rise, _)| -rise)).get(1).map_or(0.0, |rise| -rise)
        };
        let (all, calm) = (second(f64::INFINITY), self.calm());
        if self.many && CALMER * calm <= all { second(LIKEWISE * calm) } else { all }
    }
    /// What a rise that stays is measured from.
    pub fn low(&self) -> Option<f64> {
        (!self.logs.is_empty()).then(|| low(&self.logs).exp())
    }
    pub fn minimum(&self, rows: usize) -> Option<f64> {
        let from = self.losses.len().saturating_sub(rows);
        self.losses[from..].iter().copied().filter(|&l| l > 0.0).reduce(f64::min)
    }
    pub fn maximum(&self, rows: usize) -> f64 {
        tail(&self.losses, rows).iter().copied().fold(0.0, f64::max)
    }
    /// Least ln-rise of a single row that noise does not explain: the second largest rise of the longer past covers
    /// a batch that is easy now and then, the largest moves upwards batches that differ, the deviations white noise.
    /// Moves count about their trend, large ones only upwards: the descent itself is no noise.
    pub fn noise(&self) -> f64 {
        let moves = sorted(tail(&self.moves, MOVES).iter().copied());
        let trend = quantile(&moves, 0.5);
        let about = sorted(moves.iter().map(|m| (m - trend).abs()));
        let upwards = sorted(moves.iter().map(|m| m.max(0.0)));
        let usual = BEYOND_USUAL * self.usual();
        let steady = DEVIATIONS * self.deviation();
        (4.0 * quantile(&about, 0.5)).max(1.6 * quantile(&upwards, 0.9)).max(usual).max(steady)
    }
    /// A loss that falls fast also bounces, so that only a clear rise counts there, as where the noise is unknown.
    pub fn threshold(&self) -> f64 {
        let moves = sorted(tail(&self.moves, MOVES).iter().copied());
        let unsure = !self.knows_noise() || quantile(&moves, 0.5) < -DESCENT;
        let floor = if unsure { MIN_JUMP_SHORT } else { MIN_JUMP };
        let noise = if self.knows_noise() { self.noise() } else { self.noise().min(STEEP.ln()) };
        floor.ln().max(noise)
    }
    pub fn knows_noise(&self) -> bool {
        self.moves.len() >= ENOUGH
    }
    /// Least ln-rise of the rows of `STAYING[which]` together, the lowest of them `lowest`, that noise does not explain.
    /// Where the noise is unknown the rows must pass what the run started from, or rise as clearly as a
    /// single one.
    pub fn divergence_threshold(&self, lowest: f64, which: usize) -> f64 {
        let deviations = STAYING[which].1;
        let usual = tail(&self.stays[which], LONG).iter().copied().fold(0.0, f64::max);
        let known = self.knows_noise() || lowest >= self.start();
        let floor = if known { MIN_DIVERGENCE } else { MIN_JUMP_SHORT };
        floor.ln().max(deviations * self.upward_deviation()).max(BEYOND_USUAL * usual)
    }
    /// A row that passes what the run started from, far above what it had come down to: no descent explains it,
    /// whatever its own steps were.
    pub fn passes_the_start(&self, loss: f64, rise: f64) -> bool {
        let floor = if loss >= MIN_JUMP * self.start() { MIN_JUMP_PAST_START } else { MIN_JUMP_SHORT };
        let least = floor.ln().max(DEVIATIONS * self.upward_deviation());
        self.losses.len() >= RECENT && loss >= self.start() && rise >= least
    }
    /// Of a log whose rows are the losses of few samples: as a loss, not only as a ratio, it is beyond those before it.
    pub fn stands_out(&self, loss: f64) -> bool {
        let around = tail(&self.around, AROUND);
        if around.len() < AROUND {
            return true;
        }
        let mean = around.iter().sum::<f64>() / around.len() as f64;
        let squares = around.iter().map(|l| (l - mean).powi(2)).sum::<f64>();
        let deviation = (squares / (AROUND - 1) as f64).sqrt();
        let highest = tail(&self.around, ABOVE).iter().copied().fold(0.0, f64::max);
        loss >= highest.max(mean + OUTSTANDING * deviation)
    }
    /// Highest of the first rows.
    fn start(&self) -> f64 {
        self.losses.iter().take(RECENT).copied().fold(0.0, f64::max)
    }
    pub fn may_round_to_zero(&self, context: &Context) -> bool {
        context.rounds_loss && self.losses.last().is_some_and(|&last| last < 1e-3)
    }
}

/// Of the last [`LONG`] ln losses the lowest but one in twenty.
fn low(logs: &[f64]) -> f64 {
    let recent = sorted(tail(logs, LONG).iter().copied());
    recent.get(recent.len() / 20).copied().unwrap_or(f64::NAN)
}

fn tail<T>(values: &[T], count: usize) -> &[T] {
    &values[values.len().saturating_sub(count)..]
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Of ascending values; 0 of none.
pub(super) fn quantile(sorted: &[f64], q: f64) -> f64 {
    let at = ((sorted.len() as f64 - 1.0).max(0.0) * q).round() as usize;
    sorted.get(at).copied().unwrap_or(0.0)
}
