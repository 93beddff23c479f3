//! Operands laid out for the kernels: panels of lanes, rounded to the compute format, depth-major.

use std::ops::Range;

use super::kernel::Kernel;
use super::order::Order;
use crate::device::DType;
use crate::device::cpu::rounding;
use crate::device::cpu::simd::{self, Level, vectorised};
use crate::device::cpu::values::Elements;

/// A strided view of an operand: element (lane l, depth p) is `elements[at + l·lane + p·depth]`. Lanes are rows of A
/// or columns of B. One of the two strides is 1.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub elements: Elements<'a>,
    pub at: usize,
    pub lane: usize,
    pub depth: usize,
    pub dtype: DType,
}

/// Panels of one packed operand, filled by several tasks.
pub struct Panels<'a> {
    start: *mut u32,
    panel: usize,
    count: usize,
    owner: std::marker::PhantomData<&'a mut [u32]>,
}

// SAFETY: `panel` hands out disjoint slices to callers that promise one task each.
unsafe impl Sync for Panels<'_> {}
// SAFETY: as above.
unsafe impl Send for Panels<'_> {}

impl<'a> Panels<'a> {
    pub fn new(buffer: &'a mut [u32], panel: usize) -> Self {
        let count = buffer.len().checked_div(panel).unwrap_or(0);
        Self { start: buffer.as_mut_ptr(), panel, count, owner: std::marker::PhantomData }
    }

    /// # Safety
    /// Each index is in use by one task at a time.
    #[allow(clippy::mut_from_ref)] // the point of this type; the caller promises disjointness
    pub unsafe fn panels(&self, indices: Range<usize>) -> &mut [u32] {
        assert!(indices.start <= indices.end && (indices.end <= self.count || self.panel == 0));
        // SAFETY: inside the buffer by the assertion; exclusive by the caller's promise.
        unsafe {
            std::slice::from_raw_parts_mut(self.start.add(indices.start * self.panel), indices.len() * self.panel)
        }
    }
}

/// How an operand is laid out.
pub struct Layout<'a> {
    pub kernel: &'a Kernel,
    /// Lanes of a panel.
    pub width: usize,
    /// Of the whole depth, if its elements do not lie in their own; the kernel has one element a unit then.
    pub order: Option<&'a Order>,
}

/// Units of depth laid out at a time.
const STRIP: usize = 32;
/// Most lanes of any panel.
const LANES: usize = 32;

/// Writes lanes × depth of `matrix` to panels of `width` lanes, each [units of depth][width], zeros where lanes or depth
/// run out.
pub fn pack(matrix: &Matrix<'_>, lanes: Range<usize>, depth: Range<usize>, layout: &Layout<'_>, out: &mut [u32]) {
    let Layout { kernel, width, order } = *layout;
    let exact = rounding::is_exact_in(matrix.dtype, kernel.compute);
    #[cfg(target_arch = "x86_64")]
    if exact
        && order.is_none()
        && simd::level() >= Level::Avx512
        && super::pack_avx512::pack(matrix, lanes.clone(), depth.clone(), width, kernel, out)
    {
        return;
    }
    let convert = Convert { matrix, kernel, exact, places: order.map(|order| order.places.as_slice()) };
    let panel = (kernel.units(depth.len()) * width).max(1);
    for (first, out) in lanes.clone().step_by(width).zip(out.chunks_exact_mut(panel)) {
        convert.panel(first..(first + width).min(lanes.end), depth.clone(), width, out);
    }
}

/// Loading an operand, rounded and in units: f32 bits, or two bf16 (the earlier in depth in the low half).
struct Convert<'a> {
    matrix: &'a Matrix<'a>,
    kernel: &'a Kernel,
    exact: bool,
    places: Option<&'a [usize]>,
}

impl Convert<'_> {
    /// One panel, a strip of units at a time.
    fn panel(&self, lanes: Range<usize>, depth: Range<usize>, width: usize, out: &mut [u32]) {
        let per_unit = self.kernel.per_unit;
        let mut strip = [[0u32; LANES]; STRIP];
        for first in (0..out.len() / width).step_by(STRIP) {
            let start = depth.start + first * per_unit;
            let elements = start..(start + STRIP * per_unit).min(depth.end);
            if self.matrix.depth == 1 {
                self.across(lanes.clone(), elements, &mut strip);
            } else {
                self.along(lanes.clone(), elements, &mut strip);
            }
            let Some(places) = self.places else {
                for (out, units) in out[first * width..].chunks_exact_mut(width).zip(&strip) {
                    out.copy_from_slice(&units[..width]);
                }
                continue;
            };
            for (place, units) in places[first..].iter().zip(&strip) {
                out[place * width..][..width].copy_from_slice(&units[..width]);
            }
        }
    }

    #[inline]
    fn load(&self, at: usize, run: &mut [f32]) {
        self.matrix.elements.read(at, run);
        if !self.exact {
            rounding::round_operand(run, self.kernel.compute);
        }
    }

    /// Lanes that are contiguous in depth: rows of units, then transposed.
    fn across(&self, lanes: Range<usize>, depth: Range<usize>, strip: &mut [[u32; LANES]; STRIP]) {
        let mut rows = [[0u32; STRIP]; LANES];
        let mut run = [0f32; 2 * STRIP];
        for (row, lane) in rows.iter_mut().zip(lanes) {
            self.load(self.matrix.at + lane * self.matrix.lane + depth.start, &mut run[..depth.len()]);
            if self.kernel.per_unit == 1 {
                for (unit, x) in row.iter_mut().zip(&run) {
                    *unit = x.to_bits();
                }
            } else {
                vectorised(
                    #[inline(always)]
                    || {
                        for (unit, pair) in row.iter_mut().zip(run.chunks_exact(2)) {
                            *unit = join(pair[0], pair[1]);
                        }
                    },
                );
            }
        }
        transpose(&rows, strip);
    }

    /// Lanes that are contiguous at each depth.
    fn along(&self, lanes: Range<usize>, depth: Range<usize>, strip: &mut [[u32; LANES]; STRIP]) {
        let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
        let n = lanes.len();
        let load = |d: usize, run: &mut [f32; LANES]| {
            if depth.contains(&d) {
                self.load(self.matrix.at + d * self.matrix.depth + lanes.start, &mut run[..n]);
            } else {
                *run = [0f32; LANES];
            }
        };
        for (i, units) in strip.iter_mut().enumerate() {
            let d = depth.start + i * self.kernel.per_unit;
            if d >= depth.end {
                break;
            }
            load(d, &mut low);
            if self.kernel.per_unit == 1 {
                *units = low.map(f32::to_bits);
            } else {
                load(d + 1, &mut high);
                vectorised(
                    #[inline(always)]
                    || {
                        for ((unit, low), high) in units.iter_mut().zip(&low).zip(&high) {
                            *unit = join(*low, *high);
                        }
                    },
                );
            }
        }
    }
}

#[inline(always)]
fn join(low: f32, high: f32) -> u32 {
    (low.to_bits() >> 16) | (high.to_bits() & 0xffff_0000)
}

/// out[unit][lane] = rows[lane][unit].
fn transpose(rows: &[[u32; STRIP]; LANES], out: &mut [[u32; LANES]; STRIP]) {
    #[cfg(target_arch = "x86_64")]
    if simd::level() >= Level::Avx2 {
        for lane in (0..LANES).step_by(8) {
            for unit in (0..STRIP).step_by(8) {
                // SAFETY: AVX2 was detected; the 8 × 8 block lies inside both arrays.
                unsafe { transpose_8x8(rows, out, lane, unit) };
            }
        }
        return;
    }
    for (unit, out) in out.iter_mut().enumerate() {
        for (x, row) in out.iter_mut().zip(rows) {
            *x = row[unit];
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn transpose_8x8(rows: &[[u32; STRIP]; LANES], out: &mut [[u32; LANES]; STRIP], lane: usize, unit: usize) {
    use std::arch::x86_64::*;
    let mut r = [_mm256_setzero_ps(); 8];
    for (i, r) in r.iter_mut().enumerate() {
        // SAFETY: the caller keeps the block inside the arrays.
        *r = unsafe { _mm256_loadu_ps(rows[lane + i][unit..].as_ptr().cast()) };
    }
    // Pairs of rows interleaved, then pairs of pairs, then the halves of the registers exchanged.
    let mut t = [_mm256_setzero_ps(); 8];
    for i in 0..4 {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for half in 0..2 {
        let q = 4 * half;
        r[q] = _mm256_shuffle_ps::<0x44>(t[q], t[q + 2]);
        r[q + 1] = _mm256_shuffle_ps::<0xee>(t[q], t[q + 2]);
        r[q + 2] = _mm256_shuffle_ps::<0x44>(t[q + 1], t[q + 3]);
        r[q + 3] = _mm256_shuffle_ps::<0xee>(t[q + 1], t[q + 3]);
    }
    for i in 0..4 {
        t[i] = _mm256_permute2f128_ps::<0x20>(r[i], r[i + 4]);
        t[i + 4] = _mm256_permute2f128_ps::<0x31>(r[i], r[i + 4]);
    }
    for (i, t) in t.iter().enumerate() {
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(out[unit + i][lane..].as_mut_ptr().cast(), *t) };
    }
}
