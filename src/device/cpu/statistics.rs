//! What a probe measures about a tensor, in one pass over it, and norms as PyTorch reports them.
//!
//! Classes are decided on the bits of |x|, so that NaN and the ends of the target's range need no care; sums are f64.

use super::CpuDevice;
use super::math::{LANES, VectorNorm};
use super::simd::vectorised;
use super::values::{Elements, elements, expect_offsets};
use crate::Result;
use crate::device::{DType, Statistics, Tensor};

/// Bits of |x|: infinity; above it NaN.
const INFINITY: u32 = 0x7f80_0000;

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

/// Elements a piece: counts of a piece fit u32 lanes, and its f32 copy fits the cache.
const PIECE: usize = 1 << 12;

impl CpuDevice {
    pub(super) fn statistics_impl(&self, x: &Tensor, units: &[usize], target: DType) -> Result<Vec<Statistics>> {
        expect_offsets(units, x.rows(), "statistics")?;
        let source = elements(x)?;
        let range = Range::of(target);
        let pieces = pieces(units, x.columns());
        let parts = self.workers.map(pieces.len(), x.elements(), |i| {
            let (_, at, n) = pieces[i];
            let mut scratch = [0f32; PIECE];
            let values = borrow(&source, at, n, &mut scratch);
            vectorised(
                #[inline(always)]
                || measure(values, range),
            )
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
            let mut scratch = [0f32; PIECE];
            while at < end {
                let n = PIECE.min(end - at);
                let values = borrow(&source, at, n, &mut scratch);
                nonfinite += vectorised(
                    #[inline(always)]
                    || {
                        norm.add(values);
                        values.iter().map(|x| u64::from(!x.is_finite())).sum::<u64>()
                    },
                );
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

/// Elements as f32: in place where they are, else copied to `scratch`.
fn borrow<'a>(source: &Elements<'a>, at: usize, n: usize, scratch: &'a mut [f32; PIECE]) -> &'a [f32] {
    match *source {
        Elements::Wide(values) => &values[at..at + n],
        Elements::Packed(..) => {
            source.read(at, &mut scratch[..n]);
            &scratch[..n]
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
            let bits = x.to_bits();
            let magnitude = bits & 0x7fff_ffff;
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

/// Lanes of what an ordinary piece needs.
struct Ordinary {
    largest: [u32; LANES],
    smallest: [u32; LANES],
    zero: [u32; LANES],
    squares: [f64; LANES],
    sum: [f64; LANES],
}

impl Ordinary {
    #[inline(always)]
    fn take(&mut self, chunk: &[f32]) {
        for (l, &x) in chunk.iter().enumerate() {
            let magnitude = x.to_bits() & 0x7fff_ffff;
            self.largest[l] = self.largest[l].max(magnitude);
            // Zero wraps to the largest number and so never is the smallest.
            self.smallest[l] = self.smallest[l].min(magnitude.wrapping_sub(1));
            self.zero[l] += (magnitude == 0) as u32;
            let wide = x as f64;
            self.squares[l] = wide.mul_add(wide, self.squares[l]);
            self.sum[l] += wide;
        }
    }
}

/// A piece without surprises (nothing non-finite, nothing outside the target's normal range but zeros) needs a third
/// of the operations: everything is decided by the largest and the smallest magnitude.
#[inline(always)]
fn measure(values: &[f32], range: Range) -> Statistics {
    let mut lanes = Ordinary {
        largest: [0; LANES],
        smallest: [u32::MAX; LANES],
        zero: [0; LANES],
        squares: [0.0; LANES],
        sum: [0.0; LANES],
    };
    let mut chunks = values.chunks_exact(LANES);
    for chunk in &mut chunks {
        lanes.take(chunk);
    }
    lanes.take(chunks.remainder());
    let Ordinary { largest, smallest, zero, squares, sum } = lanes;
    let largest = largest.iter().fold(0, |a, &b| a.max(b));
    let smallest = smallest.iter().fold(u32::MAX, |a, &b| a.min(b)).wrapping_add(1);
    if largest >= range.infinite.min(INFINITY) || (smallest != 0 && smallest < range.normal) {
        return measure_all(values, range);
    }
    Statistics {
        elements: values.len() as u64,
        zero: zero.iter().map(|&c| c as u64).sum(),
        max_abs: f32::from_bits(largest),
        min_abs: f32::from_bits(smallest),
        sum_squares: squares.iter().sum(),
        sum: sum.iter().sum(),
        ..Statistics::default()
    }
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
