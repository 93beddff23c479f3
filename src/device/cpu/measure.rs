//! What a probe measures about some elements that lie in the cache, in one pass over them.
//!
//! Σx² is f64; where no square can leave f32's range, [`NEIGHBOURS`] of a lane are added in f32 first, as on CUDA.

use super::classes::{Range, magnitude, measure_all};
use super::math::LANES;
use super::simd::{Level, level, vectorised};
use crate::device::{DType, Statistics};

/// What every tensor needs.
#[derive(Clone, Copy)]
pub(super) struct Ordinary {
    pub largest: u32,
    /// Of magnitudes − 1, where zero wraps to the largest number.
    pub smallest: u32,
    pub zero: u32,
    pub squares: f64,
}

impl Ordinary {
    fn and(self, other: Self) -> Self {
        Self {
            largest: self.largest.max(other.largest),
            smallest: self.smallest.min(other.smallest),
            zero: self.zero + other.zero,
            squares: self.squares + other.squares,
        }
    }
}

/// The same of each lane.
struct Lanes {
    largest: [u32; LANES],
    smallest: [u32; LANES],
    zero: [u32; LANES],
    squares: [f64; LANES],
}

/// Elements of a lane whose squares are added in f32 before they join the f64 sums.
const NEIGHBOURS: usize = 8;

/// Bits of the magnitudes from 2^-50 to 2^60, whose squares f32 sums: sixteen of the largest do not overflow, and what the
/// squares of much smaller ones lose below f32's normal range is nothing beside the square of one that is not.
const SQUARABLE: std::ops::Range<u32> = (127 - 50) << 23..(127 + 60) << 23;

/// As many elements of this dtype as make whole groups, in rows of W; says how many rows that is.
#[inline(always)]
fn of_groups<'a, const W: usize>(rows: impl Rows<'a>, dtype: DType) -> (usize, Ordinary) {
    let groups = whole_rows::<W>(rows) / (RUN / W);
    #[cfg(target_arch = "x86_64")]
    {
        use super::{measure_avx512, measure_bf16};
        // SAFETY: each is called where the processor has its instructions.
        match level() {
            Level::Avx512Bf16 if dtype == DType::BF16 => unsafe {
                let (double, rest) = (groups / 2, groups / 2 * 2..groups);
                let most = measure_bf16::of_groups::<W>(rows, double);
                let all = if rest.is_empty() { most } else { most.and(measure_avx512::of_groups::<W>(rows, rest)) };
                return (groups * (RUN / W), all);
            },
            Level::Avx512 | Level::Avx512Bf16 => unsafe {
                return (groups * (RUN / W), measure_avx512::of_groups::<W>(rows, 0..groups));
            },
            _ => {}
        }
    }
    let mut lanes = Lanes::nothing();
    for group in 0..groups {
        let mut squares = [0f32; LANES];
        for i in 0..RUN / W {
            for chunk in rows.row(group * (RUN / W) + i).as_chunks::<LANES>().0 {
                lanes.add(chunk, &mut squares);
            }
        }
        lanes.join(squares);
    }
    (groups * (RUN / W), lanes.fold())
}

impl Lanes {
    fn nothing() -> Self {
        Self { largest: [0; LANES], smallest: [u32::MAX; LANES], zero: [0; LANES], squares: [0.0; LANES] }
    }

    /// At most [`RUN`] elements.
    #[inline(always)]
    fn take(&mut self, run: &[f32]) {
        let mut squares = [0f32; LANES];
        for chunk in run.chunks(LANES) {
            self.add(chunk, &mut squares);
        }
        self.join(squares);
    }

    #[inline(always)]
    fn add(&mut self, chunk: &[f32], squares: &mut [f32; LANES]) {
        for (l, &x) in chunk.iter().enumerate() {
            let magnitude = magnitude(x);
            self.largest[l] = self.largest[l].max(magnitude);
            self.smallest[l] = self.smallest[l].min(magnitude.wrapping_sub(1));
            self.zero[l] += u32::from(magnitude == 0);
            squares[l] = x.mul_add(x, squares[l]);
        }
    }

    #[inline(always)]
    fn join(&mut self, squares: [f32; LANES]) {
        for (sum, squares) in self.squares.iter_mut().zip(squares) {
            *sum += f64::from(squares);
        }
    }

    /// Sums of squares half and half, as registers are added.
    #[inline(always)]
    fn fold(&self) -> Ordinary {
        let s = &self.squares;
        let eight: [f64; 8] = std::array::from_fn(|i| s[i] + s[i + 8]);
        let four: [f64; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        Ordinary {
            largest: self.largest.iter().fold(0, |a, &b| a.max(b)),
            smallest: self.smallest.iter().fold(u32::MAX, |a, &b| a.min(b)),
            zero: self.zero.iter().sum(),
            squares: (four[0] + four[2]) + (four[1] + four[3]),
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

/// Elements of all lanes together whose squares are added in f32.
pub(super) const RUN: usize = NEIGHBOURS * LANES;
/// The same of bf16, of which a lane adds two at a time.
pub(super) const PAIRED: usize = 2 * RUN;

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

/// Statistics of a run of elements, all of them of `dtype`, against the range of `target`.
pub fn of_run(values: &[f32], dtype: DType, target: DType) -> Statistics {
    vectorised(
        #[inline(always)]
        || measure::<RUN>(Run(values), dtype, Range::of(target)),
    )
}

/// The same of rows of at most W elements each.
pub fn of_rows<'a, const W: usize>(rows: impl Rows<'a>, dtype: DType, target: DType) -> Statistics {
    vectorised(
        #[inline(always)]
        || measure::<W>(rows, dtype, Range::of(target)),
    )
}

/// One pass for what every tensor has; what lies beyond the target's normal range is counted in a second one, and
/// elements with surprises (something non-finite, squares beyond f32) are measured anew with all counts.
#[inline(always)]
fn measure<'a, const W: usize>(rows: impl Rows<'a>, dtype: DType, range: Range) -> Statistics {
    let (taken, mut all) = of_groups::<W>(rows, dtype);
    if taken < rows.count() {
        let mut lanes = Lanes::nothing();
        for i in taken..rows.count() {
            lanes.take(rows.row(i));
        }
        all = all.and(lanes.fold());
    }
    let (largest, smallest) = (all.largest, all.smallest.wrapping_add(1));
    if largest != 0 && !SQUARABLE.contains(&largest) {
        return measure_all(rows, range);
    }
    let mut found = Statistics {
        elements: length(rows),
        zero: all.zero.into(),
        max_abs: f32::from_bits(largest),
        min_abs: f32::from_bits(smallest),
        sum_squares: all.squares,
        ..Statistics::default()
    };
    if largest >= range.infinite || smallest < range.normal && smallest != 0 {
        outside(rows, range, &mut found);
    }
    found
}

/// How many rows, from the first on, are W long.
#[inline(always)]
fn whole_rows<'a, const W: usize>(rows: impl Rows<'a>) -> usize {
    // All rows but the last are as long as the first.
    match rows.count() {
        0 => 0,
        n if rows.row(n - 1).len() == W => n,
        n if rows.row(0).len() == W => n - 1,
        _ => 0,
    }
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
}
