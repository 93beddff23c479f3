//! Operands laid out for the kernels: panels of lanes, rounded to the compute format, depth-major.

use std::ops::Range;

use super::kernel::Kernel;
use crate::device::DType;
use crate::device::cpu::rounding;
use crate::device::cpu::simd::vectorised;
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
    pub unsafe fn panel(&self, index: usize) -> &mut [u32] {
        assert!(index < self.count || self.panel == 0);
        // SAFETY: inside the buffer by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.panel), self.panel) }
    }
}

/// Elements of depth that are gathered at a time before they are laid across the lanes; even.
const STRIP: usize = 32;
/// Most lanes of any panel.
const LANES: usize = 32;

/// Writes lanes × depth of `matrix` to `out` [units of depth][width], zeros where lanes or depth run out.
pub fn pack(
    matrix: &Matrix<'_>,
    lanes: Range<usize>,
    depth: Range<usize>,
    width: usize,
    kernel: &Kernel,
    out: &mut [u32],
) {
    let convert = Convert { matrix, kernel, exact: rounding::is_exact_in(matrix.dtype, kernel.compute) };
    let mut strip = [[0f32; LANES]; STRIP];
    let mut start = depth.start;
    while start < depth.end {
        let count = STRIP.min(depth.end - start);
        if matrix.depth == 1 {
            convert.across(lanes.clone(), start, count, &mut strip);
        } else {
            for (p, row) in strip[..count].iter_mut().enumerate() {
                let at = matrix.at + (start + p) * matrix.depth + lanes.start;
                convert.load(at, &mut row[..lanes.len()]);
            }
        }
        if !count.is_multiple_of(kernel.per_unit) {
            strip[count] = [0f32; LANES];
        }
        let units = count.div_ceil(kernel.per_unit);
        let first = (start - depth.start) / kernel.per_unit;
        write(&strip, width, kernel.per_unit, &mut out[first * width..][..units * width]);
        start += count;
    }
}

/// Loading runs of an operand, rounded.
struct Convert<'a> {
    matrix: &'a Matrix<'a>,
    kernel: &'a Kernel,
    exact: bool,
}

impl Convert<'_> {
    #[inline]
    fn load(&self, at: usize, run: &mut [f32]) {
        self.matrix.elements.read(at, run);
        if !self.exact {
            rounding::round_operand(run, self.kernel.compute);
        }
    }

    /// strip[p][l] = element (lanes.start + l, start + p), from rows that are contiguous in depth.
    fn across(&self, lanes: Range<usize>, start: usize, count: usize, strip: &mut [[f32; LANES]; STRIP]) {
        let mut rows = [[0f32; STRIP]; LANES];
        for (row, l) in rows.iter_mut().zip(lanes.clone()) {
            self.load(self.matrix.at + l * self.matrix.lane + start, &mut row[..count]);
        }
        let lanes = lanes.len();
        vectorised(|| {
            for (p, out) in strip[..count].iter_mut().enumerate() {
                for (x, row) in out[..lanes].iter_mut().zip(&rows) {
                    *x = row[p];
                }
            }
        });
    }
}

/// Lays a strip out in units: f32 bits, or two bf16 (the earlier in depth in the low half).
fn write(strip: &[[f32; LANES]; STRIP], width: usize, per_unit: usize, out: &mut [u32]) {
    vectorised(|| {
        if per_unit == 1 {
            for (out, row) in out.chunks_exact_mut(width).zip(strip) {
                for (unit, x) in out.iter_mut().zip(row) {
                    *unit = x.to_bits();
                }
            }
        } else {
            for (out, pair) in out.chunks_exact_mut(width).zip(strip.chunks_exact(2)) {
                for ((unit, low), high) in out.iter_mut().zip(&pair[0]).zip(&pair[1]) {
                    *unit = (low.to_bits() >> 16) | (high.to_bits() & 0xffff_0000);
                }
            }
        }
    });
}
