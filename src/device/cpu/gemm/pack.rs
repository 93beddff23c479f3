//! Operands laid out for the kernels: panels of lanes, rounded to the compute format, depth-major.

use std::ops::Range;

use super::kernel::Kernel;
use crate::device::DType;
use crate::device::cpu::rounding;
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
        let count = if panel == 0 { 0 } else { buffer.len() / panel };
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

/// Writes lanes × depth of `matrix` to `out` [units of depth][width], zeros where lanes or depth run out.
pub fn pack(
    matrix: &Matrix<'_>,
    lanes: Range<usize>,
    depth: Range<usize>,
    width: usize,
    kernel: &Kernel,
    out: &mut [u32],
) {
    if lanes.len() < width || !depth.len().is_multiple_of(kernel.per_unit) {
        out.fill(0);
    }
    let exact = rounding::is_exact_in(matrix.dtype, kernel.compute);
    let mut scratch = [0f32; 512];
    let load = |at: usize, run: &mut [f32]| {
        matrix.elements.read(at, run);
        if !exact {
            rounding::round_operand(run, kernel.compute);
        }
    };
    if matrix.depth == 1 {
        for (lane, l) in lanes.enumerate() {
            let mut p = 0;
            while p < depth.len() {
                let run = &mut scratch[..512.min(depth.len() - p)];
                load(matrix.at + l * matrix.lane + depth.start + p, run);
                for (i, &x) in run.iter().enumerate() {
                    kernel.store(out, width, lane, p + i, x);
                }
                p += run.len();
            }
        }
    } else {
        for (p, d) in depth.enumerate() {
            let run = &mut scratch[..lanes.len()];
            load(matrix.at + d * matrix.depth + lanes.start, run);
            for (lane, &x) in run.iter().enumerate() {
                kernel.store(out, width, lane, p, x);
            }
        }
    }
}
