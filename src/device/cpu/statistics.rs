//! What a probe measures about a tensor, in one pass over it, and norms as PyTorch reports them.
//!
//! Classes are decided on the bits of |x|, so that NaN and the ends of the target's range need no care. Sums are f64;
//! where no square can leave f32's range, [`NEIGHBOURS`] of a lane are added in f32 first, as on CUDA.

use super::CpuDevice;
use super::math::{LANES, VectorNorm};
use super::simd::vectorised;
use super::values::{Elements, elements, expect_offsets};
use crate::Result;
use crate::device::{DType, Statistics, Tensor};

/// Bits of |x|: infinity; above it NaN.
const INFINITY: u32 = 0x7f80_0000;

/// Bits of |x|.
#[inline(always)]
fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Ends of a dtype's range as bits of f32 magnitudes.
#[derive(Clone, Copy)]
struct Range {
    /// Smallest normal.
    normal: u32,
    /// Largest magnitude that rounds to zero.
    vanishing: u32,
    /// Smallest magnitude that rounds to infinity.
    infinite: u32,
}

impl Range {
    fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self { normal: 0x0080_0000, vanishing: 0, infinite: INFINITY },
            // Half of the smallest subnormal 2^-133 ties to zero; half an ulp past the largest ties to infinity.
            DType::BF16 => Self { normal: 0x0080_0000, vanishing: 0x0000_8000, infinite: 0x7f7f_8000 },
            // 2^-14; 2^-25; 65520.
            DType::F16 => Self { normal: 0x3880_0000, vanishing: 0x3300_0000, infinite: 0x477f_f000 },
        }
    }
}

/// Elements a piece: counts of a piece fit u32 lanes, its second pass finds it in the cache, and taking the next one
/// costs little beside it.
const PIECE: usize = 1 << 14;

impl CpuDevice {
    pub(super) fn statistics_impl(&self, x: &Tensor, units: &[usize], target: DType) -> Result<Vec<Statistics>> {
        expect_offsets(units, x.rows(), "statistics")?;
        let source = elements(x)?;
        let range = Range::of(target);
        let pieces = pieces(units, x.columns());
        let parts = self.workers.map(pieces.len(), x.elements(), |i| {
            let (_, at, n) = pieces[i];
            with_values(&source, at, n, |values| {
                vectorised(
                    #[inline(always)]
                    || measure(values, range),
                )
            })
        });
        let mut result = vec![Statistics::default(); units.len() - 1];
        for ((unit, ..), part) in pieces.iter().zip(&parts) {
            merge(&mut result[*unit], part);
        }
        Ok(result)
    }

    pub(super) fn norms_impl(&self, x: &Tensor, units: &[usize]) -> Result<Vec<(f32, u64)>> {
        expect_offsets(units, x.rows(), "norms")?;
        let source = elements(x)?;
        Ok(self.workers.map(units.len() - 1, x.elements(), |unit| {
            let (mut at, end) = (units[unit] * x.columns(), units[unit + 1] * x.columns());
            let (mut norm, mut nonfinite) = (VectorNorm::default(), 0);
            while at < end {
                let n = PIECE.min(end - at);
                nonfinite += with_values(&source, at, n, |values| {
                    vectorised(
                        #[inline(always)]
                        || {
                            norm.add(values);
                            values.iter().map(|x| u64::from(!x.is_finite())).sum::<u64>()
                        },
                    )
                });
                at += n;
            }
            (norm.finish(), nonfinite)
        }))
    }
}

/// (unit, first element, elements) of each piece, in order; pieces do not straddle units.
fn pieces(units: &[usize], columns: usize) -> Vec<(usize, usize, usize)> {
    let mut pieces = Vec::new();
    for (unit, pair) in units.windows(2).enumerate() {
        let (mut at, end) = (pair[0] * columns, pair[1] * columns);
        while at < end {
            let n = PIECE.min(end - at);
            pieces.push((unit, at, n));
            at += n;
        }
    }
    pieces
}

/// Shows `f` at most [`PIECE`] elements as f32: in place where they are, else a copy.
fn with_values<R>(source: &Elements<'_>, at: usize, n: usize, f: impl FnOnce(&[f32]) -> R) -> R {
    match *source {
        Elements::Wide(values) => f(&values[at..at + n]),
        Elements::Packed(..) => {
            let mut scratch = [0f32; PIECE];
            source.read(at, &mut scratch[..n]);
            f(&scratch[..n])
        }
    }
}

/// Lanes of running counts and sums.
struct Counts {
    nan: [u32; LANES],
    pos_inf: [u32; LANES],
    neg_inf: [u32; LANES],
    zero: [u32; LANES],
    subnormal: [u32; LANES],
    underflow: [u32; LANES],
    overflow: [u32; LANES],
    largest: [u32; LANES],
    smallest: [u32; LANES],
    squares: [f64; LANES],
    sum: [f64; LANES],
}

impl Counts {
    #[inline(always)]
    fn take(&mut self, chunk: &[f32], range: Range) {
        for (l, &x) in chunk.iter().enumerate() {
            let (bits, magnitude) = (x.to_bits(), magnitude(x));
            let finite = magnitude < INFINITY;
            let nonzero = magnitude != 0;
            self.nan[l] += (magnitude > INFINITY) as u32;
            self.pos_inf[l] += (bits == INFINITY) as u32;
            self.neg_inf[l] += (bits == (INFINITY | 0x8000_0000)) as u32;
            self.zero[l] += !nonzero as u32;
            self.subnormal[l] += (nonzero & (magnitude < range.normal)) as u32;
            self.underflow[l] += (nonzero & (magnitude <= range.vanishing)) as u32;
            self.overflow[l] += (finite & (magnitude >= range.infinite)) as u32;
            self.largest[l] = self.largest[l].max(if finite { magnitude } else { 0 });
            // Zero wraps to the largest number and so never is the smallest; NaN cannot be below a finite one.
            self.smallest[l] = self.smallest[l].min(magnitude.wrapping_sub(1));
            let value = if finite { x as f64 } else { 0.0 };
            self.squares[l] = value.mul_add(value, self.squares[l]);
            self.sum[l] += value;
        }
    }
}

/// Lanes of what every piece needs.
struct Ordinary {
    largest: [u32; LANES],
    smallest: [u32; LANES],
    squares: [f64; LANES],
    sum: [f64; LANES],
}

/// Elements of a lane that are added in f32 before they join the f64 sums.
const NEIGHBOURS: usize = 8;

/// Bits of the magnitudes from 2^-50 to 2^60, whose squares f32 sums: eight of the largest do not overflow, and what the squares of much smaller ones
/// lose below f32's normal range is nothing beside the square of one that is not.
const SQUARABLE: std::ops::Range<u32> = (127 - 50) << 23..(127 + 60) << 23;

impl Ordinary {
    /// At most NEIGHBOURS · LANES elements.
    #[inline(always)]
    fn take(&mut self, run: &[f32]) {
        let (mut squares, mut sum) = ([0f32; LANES], [0f32; LANES]);
        let mut chunks = run.chunks_exact(LANES);
        for chunk in &mut chunks {
            self.add(chunk, &mut squares, &mut sum);
        }
        self.add(chunks.remainder(), &mut squares, &mut sum);
        for l in 0..LANES {
            self.squares[l] += f64::from(squares[l]);
            self.sum[l] += f64::from(sum[l]);
        }
    }

    #[inline(always)]
    fn add(&mut self, chunk: &[f32], squares: &mut [f32; LANES], sum: &mut [f32; LANES]) {
        for (l, &x) in chunk.iter().enumerate() {
            let magnitude = magnitude(x);
            self.largest[l] = self.largest[l].max(magnitude);
            self.smallest[l] = self.smallest[l].min(magnitude);
            squares[l] = x.mul_add(x, squares[l]);
            sum[l] += x;
        }
    }
}

/// One pass for what every tensor has; zeros and what lies beyond the target's normal range are counted in a second one,
/// and a piece with surprises (something non-finite, squares beyond f32) is measured anew with all counts.
#[inline(always)]
fn measure(values: &[f32], range: Range) -> Statistics {
    let mut lanes =
        Ordinary { largest: [0; LANES], smallest: [u32::MAX; LANES], squares: [0.0; LANES], sum: [0.0; LANES] };
    let mut runs = values.chunks_exact(NEIGHBOURS * LANES);
    for run in &mut runs {
        lanes.take(run);
    }
    lanes.take(runs.remainder());
    let Ordinary { largest, smallest, squares, sum } = lanes;
    let largest = largest.iter().fold(0, |a, &b| a.max(b));
    let smallest = smallest.iter().fold(u32::MAX, |a, &b| a.min(b));
    if largest != 0 && !SQUARABLE.contains(&largest) {
        return measure_all(values, range);
    }
    let mut found = Statistics {
        elements: values.len() as u64,
        max_abs: f32::from_bits(largest),
        min_abs: f32::from_bits(smallest),
        sum_squares: squares.iter().sum(),
        sum: sum.iter().sum(),
        ..Statistics::default()
    };
    if largest >= range.infinite || smallest < range.normal {
        outside(values, range, &mut found);
    }
    found
}

/// Counts zeros and what lies outside the target's normal range; finite elements only.
#[inline(always)]
fn outside(values: &[f32], range: Range, found: &mut Statistics) {
    // Zero wraps to the largest number, which no end of the range reaches.
    let above_zero = || values.iter().map(|x| magnitude(*x).wrapping_sub(1));
    let below = |end: u32| u64::from(above_zero().map(|x| u32::from(x < end)).sum::<u32>());
    found.zero = found.elements - below(u32::MAX);
    found.subnormal = below(range.normal - 1);
    found.underflow = below(range.vanishing);
    found.overflow = found.elements - found.zero - below(range.infinite - 1);
    found.min_abs = f32::from_bits(above_zero().fold(u32::MAX, u32::min).wrapping_add(1));
}

/// The same with every count.
#[inline(never)]
fn measure_all(values: &[f32], range: Range) -> Statistics {
    vectorised(
        #[inline(always)]
        || count(values, range),
    )
}

#[inline(always)]
fn count(values: &[f32], range: Range) -> Statistics {
    let none = [0u32; LANES];
    let mut counts = Counts {
        nan: none,
        pos_inf: none,
        neg_inf: none,
        zero: none,
        subnormal: none,
        underflow: none,
        overflow: none,
        largest: none,
        smallest: [u32::MAX; LANES],
        squares: [0.0; LANES],
        sum: [0.0; LANES],
    };
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        counts.take(chunk, range);
    }
    counts.take(chunks.remainder(), range);
    let total = |lanes: &[u32; LANES]| lanes.iter().map(|&c| c as u64).sum::<u64>();
    let smallest = counts.smallest.iter().min().map_or(u32::MAX, |&s| s).wrapping_add(1);
    Statistics {
        elements: values.len() as u64,
        nan: total(&counts.nan),
        pos_inf: total(&counts.pos_inf),
        neg_inf: total(&counts.neg_inf),
        zero: total(&counts.zero),
        subnormal: total(&counts.subnormal),
        underflow: total(&counts.underflow),
        overflow: total(&counts.overflow),
        max_abs: f32::from_bits(counts.largest.iter().max().map_or(0, |&l| l)),
        min_abs: if smallest < INFINITY { f32::from_bits(smallest) } else { 0.0 },
        sum_squares: counts.squares.iter().sum(),
        sum: counts.sum.iter().sum(),
    }
}

/// Adds a later piece of the same unit.
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
