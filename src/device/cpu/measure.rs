//! What a probe measures about some elements that lie in the cache, in one pass over them.
//!
//! Sums are f64; where no square can leave f32's range, [`NEIGHBOURS`] of a lane are added in f32 first, as on CUDA.

use super::classes::{Range, magnitude, measure_all};
use super::math::LANES;
use super::simd::{Level, level, vectorised};
use crate::device::{DType, Statistics};

/// Lanes of what every tensor needs.
pub(super) struct Ordinary {
    pub largest: [u32; LANES],
    /// Of magnitudes − 1, where zero wraps to the largest number.
    pub smallest: [u32; LANES],
    pub zero: [u32; LANES],
    pub squares: [f64; LANES],
    pub sum: [f64; LANES],
}

/// Elements of a lane that are added in f32 before they join the f64 sums.
const NEIGHBOURS: usize = 8;

/// Bits of the magnitudes from 2^-50 to 2^60, whose squares f32 sums: eight of the largest do not overflow, and what the
/// squares of much smaller ones lose below f32's normal range is nothing beside the square of one that is not.
const SQUARABLE: std::ops::Range<u32> = (127 - 50) << 23..(127 + 60) << 23;

impl Ordinary {
    /// The first `groups` · [`RUN`] elements, in rows of W.
    #[inline(always)]
    fn take_groups<'a, const W: usize>(&mut self, rows: impl Rows<'a>, groups: usize) {
        #[cfg(target_arch = "x86_64")]
        if level() >= Level::Avx512 {
            // SAFETY: the processor has AVX-512 F.
            return unsafe { super::measure_avx512::take::<W>(self, rows, groups) };
        }
        for group in 0..groups {
            let (mut squares, mut sum) = ([0f32; LANES], [0f32; LANES]);
            for i in 0..RUN / W {
                for chunk in rows.row(group * (RUN / W) + i).as_chunks::<LANES>().0 {
                    self.add(chunk, &mut squares, &mut sum);
                }
            }
            self.join(squares, sum);
        }
    }

    /// At most [`RUN`] elements.
    #[inline(always)]
    fn take(&mut self, run: &[f32]) {
        let (mut squares, mut sum) = ([0f32; LANES], [0f32; LANES]);
        for chunk in run.chunks(LANES) {
            self.add(chunk, &mut squares, &mut sum);
        }
        self.join(squares, sum);
    }

    #[inline(always)]
    fn add(&mut self, chunk: &[f32], squares: &mut [f32; LANES], sum: &mut [f32; LANES]) {
        for (l, &x) in chunk.iter().enumerate() {
            let magnitude = magnitude(x);
            self.largest[l] = self.largest[l].max(magnitude);
            self.smallest[l] = self.smallest[l].min(magnitude.wrapping_sub(1));
            self.zero[l] += u32::from(magnitude == 0);
            squares[l] = x.mul_add(x, squares[l]);
            sum[l] += x;
        }
    }

    #[inline(always)]
    fn join(&mut self, squares: [f32; LANES], sum: [f32; LANES]) {
        for l in 0..LANES {
            self.squares[l] += f64::from(squares[l]);
            self.sum[l] += f64::from(sum[l]);
        }
    }
}

/// Elements in rows of one length; the last may be shorter.
pub trait Rows<'a>: Copy {
    fn count(&self) -> usize;
    fn row(&self, i: usize) -> &'a [f32];
}

/// One run of elements, as rows of [`RUN`].
#[derive(Clone, Copy)]
struct Run<'a>(&'a [f32]);

/// Elements of all lanes together that are added in f32.
pub(super) const RUN: usize = NEIGHBOURS * LANES;

impl<'a> Rows<'a> for Run<'a> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.0.len().div_ceil(RUN)
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &'a [f32] {
        &self.0[i * RUN..self.0.len().min((i + 1) * RUN)]
    }
}

/// Statistics of a run of elements against the range of `target`.
pub fn of_run(values: &[f32], target: DType) -> Statistics {
    vectorised(
        #[inline(always)]
        || measure::<RUN>(Run(values), Range::of(target)),
    )
}

/// The same of rows of at most W elements each.
pub fn of_rows<'a, const W: usize>(rows: impl Rows<'a>, target: DType) -> Statistics {
    vectorised(
        #[inline(always)]
        || measure::<W>(rows, Range::of(target)),
    )
}

/// One pass for what every tensor has; what lies beyond the target's normal range is counted in a second one, and
/// elements with surprises (something non-finite, squares beyond f32) are measured anew with all counts.
#[inline(always)]
fn measure<'a, const W: usize>(rows: impl Rows<'a>, range: Range) -> Statistics {
    let (none, sums) = ([0u32; LANES], [0f64; LANES]);
    let mut lanes = Ordinary { largest: none, smallest: [u32::MAX; LANES], zero: none, squares: sums, sum: sums };
    let whole = whole_groups::<W>(rows);
    lanes.take_groups::<W>(rows, whole);
    for i in whole * (RUN / W)..rows.count() {
        lanes.take(rows.row(i));
    }
    let largest = lanes.largest.iter().fold(0, |a, &b| a.max(b));
    let smallest = lanes.smallest.iter().fold(u32::MAX, |a, &b| a.min(b)).wrapping_add(1);
    if largest != 0 && !SQUARABLE.contains(&largest) {
        return measure_all(rows, range);
    }
    let mut found = Statistics {
        elements: length(rows),
        zero: lanes.zero.iter().map(|&count| u64::from(count)).sum(),
        max_abs: f32::from_bits(largest),
        min_abs: f32::from_bits(smallest),
        sum_squares: lanes.squares.iter().sum(),
        sum: lanes.sum.iter().sum(),
        ..Statistics::default()
    };
    if largest >= range.infinite || smallest < range.normal && smallest != 0 {
        outside(rows, range, &mut found);
    }
    found
}

/// Whole [`RUN`]s of rows that are W long.
#[inline(always)]
fn whole_groups<'a, const W: usize>(rows: impl Rows<'a>) -> usize {
    let mut whole = rows.count();
    while whole > 0 && rows.row(whole - 1).len() != W {
        // All rows but the last are as long as the first.
        whole = if rows.row(0).len() == W { whole - 1 } else { 0 };
    }
    whole / (RUN / W)
}

#[inline(always)]
pub fn length<'a>(rows: impl Rows<'a>) -> u64 {
    match rows.count() {
        0 => 0,
        n => ((n - 1) * rows.row(0).len() + rows.row(n - 1).len()) as u64,
    }
}

/// Counts what lies outside the target's normal range; finite elements only.
#[inline(always)]
fn outside<'a>(rows: impl Rows<'a>, range: Range, found: &mut Statistics) {
    // Zero wraps to the largest number, which the ends below it do not reach.
    let ends = [range.normal - 1, range.vanishing, range.infinite - 1];
    let mut below = [[0u32; LANES]; 3];
    for i in 0..rows.count() {
        for chunk in rows.row(i).chunks(LANES) {
            for (below, end) in below.iter_mut().zip(ends) {
                for (below, &x) in below.iter_mut().zip(chunk) {
                    *below += u32::from(magnitude(x).wrapping_sub(1) < end);
                }
            }
        }
    }
    let [subnormal, underflow, finite] = below.map(|lanes| lanes.iter().map(|&count| u64::from(count)).sum::<u64>());
    found.subnormal = subnormal;
    found.underflow = underflow;
    found.overflow = found.elements - found.zero - finite;
}

/// The statistics of each unit from those of its parts, (unit, part) in order.
pub fn merged<'a>(units: usize, parts: impl Iterator<Item = (usize, &'a Statistics)>) -> Vec<Statistics> {
    let mut result = vec![Statistics::default(); units];
    for (unit, part) in parts {
        merge(&mut result[unit], part);
    }
    result
}

/// Adds a later part of the same unit.
fn merge(whole: &mut Statistics, part: &Statistics) {
    whole.elements += part.elements;
    whole.nan += part.nan;
    whole.pos_inf += part.pos_inf;
    whole.neg_inf += part.neg_inf;
    whole.zero += part.zero;
    whole.subnormal += part.subnormal;
    whole.underflow += part.underflow;
    whole.overflow += part.overflow;
    whole.max_abs = whole.max_abs.max(part.max_abs);
    if part.min_abs > 0.0 && (whole.min_abs == 0.0 || part.min_abs < whole.min_abs) {
        whole.min_abs = part.min_abs;
    }
    whole.sum_squares += part.sum_squares;
    whole.sum += part.sum;
}
