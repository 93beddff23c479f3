//! The inner loops: one tile of C from one panel of A and one of B.

use crate::device::Compute;
use crate::device::cpu::simd::vectorised;
use crate::device::cpu::threads::Shared;

/// Most rows and columns of any kernel's tile.
const MAX_TILE: usize = 14 * 32;

/// One kernel: its tile, and how it wants its operands.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub compute: Compute,
    pub rows: usize,
    pub columns: usize,
    /// Elements of depth in 4 bytes: 1 (f32) or 2 (bf16).
    pub per_unit: usize,
}

/// Where a tile of C lies.
pub struct Tile<'a> {
    pub c: &'a Shared<'a>,
    pub at: usize,
    pub stride: usize,
}

impl Kernel {
    /// The fastest kernel of this processor for `compute`.
    pub fn best(compute: Compute) -> Self {
        Self { compute, rows: 4, columns: 32, per_unit: 1 }
    }

    /// Units of depth that hold k elements.
    pub fn units(&self, k: usize) -> usize {
        k.div_ceil(self.per_unit)
    }

    /// Puts one operand element into a packed panel.
    #[inline(always)]
    pub fn store(&self, out: &mut [u32], width: usize, lane: usize, p: usize, x: f32) {
        out[p * width + lane] = x.to_bits();
    }

    /// C tile = (C tile if `accumulate`) + A panel · B panel; only `size` (rows, columns) of it exist in C.
    pub fn tile(&self, a: &[u32], b: &[u32], tile: &Tile<'_>, size: (usize, usize), accumulate: bool) {
        let mut buffer = [0f32; MAX_TILE];
        for row in 0..size.0 {
            // SAFETY: the tile belongs to the calling task alone; rows do not overlap.
            let run = unsafe { tile.c.slice(tile.at + row * tile.stride, size.1) };
            if accumulate {
                buffer[row * self.columns..][..size.1].copy_from_slice(run);
            }
        }
        vectorised(|| portable(a, b, &mut buffer));
        for row in 0..size.0 {
            // SAFETY: as above.
            let run = unsafe { tile.c.slice(tile.at + row * tile.stride, size.1) };
            run.copy_from_slice(&buffer[row * self.columns..][..size.1]);
        }
    }
}

/// 4 × 32 in plain Rust, compiled per instruction set.
#[inline(always)]
fn portable(a: &[u32], b: &[u32], c: &mut [f32; MAX_TILE]) {
    let mut sums = [[0f32; 32]; 4];
    for (row, sums) in sums.iter_mut().enumerate() {
        sums.copy_from_slice(&c[row * 32..][..32]);
    }
    for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(32)) {
        for (sums, &a) in sums.iter_mut().zip(a) {
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum = f32::from_bits(a).mul_add(f32::from_bits(b), *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        c[row * 32..][..32].copy_from_slice(sums);
    }
}
