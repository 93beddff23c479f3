//! Classes of elements by the bits of |x|, so that NaN and the ends of a dtype's range need no care, and the pass that
//! counts them all, in f64.

use super::math::LANES;
use super::measure::{Rows, length};
use super::simd::vectorised;
use crate::device::{DType, Statistics};

/// Bits of |x|: infinity; above it NaN.
const INFINITY: u32 = 0x7f80_0000;

/// Bits of |x|.
#[inline(always)]
pub fn magnitude(x: f32) -> u32 {
    x.to_bits() & 0x7fff_ffff
}

/// Ends of a dtype's range as bits of f32 magnitudes.
#[derive(Clone, Copy)]
pub struct Range {
    /// Smallest normal.
    pub normal: u32,
    /// Largest magnitude that rounds to zero.
    pub vanishing: u32,
    /// Smallest magnitude that rounds to infinity.
    pub infinite: u32,
}

impl Range {
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self { normal: 0x0080_0000, vanishing: 0, infinite: INFINITY },
            // Half of the smallest subnormal 2^-133 ties to zero; half an ulp past the largest ties to infinity.
            DType::BF16 => Self { normal: 0x0080_0000, vanishing: 0x0000_8000, infinite: 0x7f7f_8000 },
            // 2^-14; 2^-25; 65520.
            DType::F16 => Self { normal: 0x3880_0000, vanishing: 0x3300_0000, infinite: 0x477f_f000 },
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
        }
    }
}

/// Statistics with every count, for elements with surprises.
#[inline(never)]
pub fn measure_all<'a>(rows: impl Rows<'a>, range: Range) -> Statistics {
    vectorised(
        #[inline(always)]
        || count(rows, range),
    )
}

#[inline(always)]
fn count<'a>(rows: impl Rows<'a>, range: Range) -> Statistics {
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
    };
    for i in 0..rows.count() {
        for chunk in rows.row(i).chunks(LANES) {
            counts.take(chunk, range);
        }
    }
    let total = |lanes: &[u32; LANES]| lanes.iter().map(|&c| c as u64).sum::<u64>();
    let smallest = counts.smallest.iter().min().map_or(u32::MAX, |&s| s).wrapping_add(1);
    Statistics {
        elements: length(rows),
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
    }
}
