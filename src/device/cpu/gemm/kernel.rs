//! The inner loops: one tile of C from one panel of A and one of B, per instruction set.
//!
//! A tile keeps its sums in registers: up to 14 rows × 32 columns of AVX-512 (28 of 32 registers), 6 × 16 of AVX2
//! (12 of 16). The rows of A are broadcast, the columns of B are loaded. All f32 kernels do the same fused
//! multiply-adds in the same order and so give the same bits.

use super::finish::Finish;
use super::order::Chain;
use crate::device::Compute;
use crate::device::cpu::measure;
use crate::device::cpu::simd::{self, Level};
use crate::device::cpu::threads::Shared;

/// Most rows of any tile.
pub const ROWS: usize = 14;
/// Most columns of any tile.
pub const COLUMNS: usize = 32;

/// (units of depth, A panel, B panel, C tile, elements between rows of C, add to C instead of overwriting it). The sums
/// begin at zero and meet C at the end, as MKL and oneDNN add their blocks of depth.
/// The number of rows is the function's own.
type TileFunction = unsafe fn(usize, *const u32, *const u32, *mut f32, usize, bool);

/// One kernel: its tile, and how it wants its operands.
#[derive(Clone, Copy)]
pub struct Kernel {
    pub compute: Compute,
    /// Lanes of a packed panel of A.
    pub rows: usize,
    /// Lanes of a packed panel of B.
    pub columns: usize,
    /// Elements of depth in 4 bytes: 1 (f32) or 2 (bf16 pairs).
    pub per_unit: usize,
    /// By rows − 1.
    tiles: &'static [TileFunction],
}

/// A tile of C: where it lies and how much of it exists.
pub struct Tile<'a> {
    pub c: &'a Shared<'a>,
    pub at: usize,
    /// Elements of C from one row (lane of A) to the next, and from one column to the next; one of them is 1.
    pub strides: (usize, usize),
    pub rows: usize,
    pub columns: usize,
}

impl Kernel {
    /// The fastest kernel of this processor for `compute`.
    pub fn best(compute: Compute) -> Self {
        Self::at(simd::level(), compute)
    }

    /// The kernel for a level, which the processor must have.
    pub fn at(level: Level, compute: Compute) -> Self {
        #[cfg(target_arch = "x86_64")]
        match level {
            Level::Avx512Bf16 if compute == Compute::Bf16 => {
                return Self { compute, rows: 14, columns: 32, per_unit: 2, tiles: &x86::AVX512_BF16 };
            }
            Level::Avx512 | Level::Avx512Bf16 => {
                return Self { compute, rows: 14, columns: 32, per_unit: 1, tiles: &x86::AVX512 };
            }
            Level::Avx2 => return Self { compute, rows: 6, columns: 16, per_unit: 1, tiles: &x86::AVX2 },
            Level::Baseline => {}
        }
        let _ = level;
        Self { compute, rows: 4, columns: 16, per_unit: 1, tiles: &PORTABLE }
    }

    /// Units of depth that hold k elements.
    pub fn units(&self, k: usize) -> usize {
        k.div_ceil(self.per_unit)
    }

    /// C tile = A panel · B panel, added to C tile but for the first part of the depth; the last part ends with `finish`.
    pub fn tile(
        &self,
        (a, b): (&[u32], &[u32]),
        tile: &Tile<'_>,
        sums: Sums<'_>,
        finish: Option<&Finish<'_>>,
        scratch: &mut Scratch,
    ) {
        if let Sums::Part { first } = sums {
            if finish.is_none() && tile.columns == self.columns && tile.strides.1 == 1 {
                let last = tile.at + (tile.rows - 1) * tile.strides.0;
                let c = tile.c.pointer(tile.at, last + self.columns);
                // SAFETY: C's rows lie inside its buffer (checked by `pointer`) and belong to this task.
                unsafe { self.product((a, b), tile.rows, c, tile.strides.0, !first) };
                return;
            }
            if !first {
                tile.load(&mut scratch.sums);
            }
        }
        self.sums((a, b), tile.rows, sums, &mut scratch.sums, &mut scratch.stack);
        match finish {
            None => tile.store(&scratch.sums),
            Some(finish) => finish.tile(tile, scratch),
        }
    }

    /// `rows` rows of A panel · B panel, in or onto `out`; `stack` is scratch.
    pub fn sums(
        &self,
        (a, b): (&[u32], &[u32]),
        rows: usize,
        sums: Sums<'_>,
        out: &mut [f32; ROWS * COLUMNS],
        stack: &mut [[f32; ROWS * COLUMNS]; STACK],
    ) {
        let chains = match sums {
            Sums::Part { first } => {
                // SAFETY: the buffer holds the largest tile.
                return unsafe { self.product((a, b), rows, out.as_mut_ptr(), COLUMNS, !first) };
            }
            Sums::Chains(chains) => chains,
        };
        let live = rows * COLUMNS;
        out[..live].fill(0.0);
        // Sums that wait: `out`, then those of the stack.
        let mut waiting = 0;
        for Chain { elements, additions } in chains {
            let a = &a[elements.start * self.rows..elements.end * self.rows];
            let b = &b[elements.start * self.columns..elements.end * self.columns];
            // The first addition is the kernel's own.
            let onto = *additions > 0;
            waiting += usize::from(!onto);
            let top = if waiting == 1 { &mut *out } else { &mut stack[waiting - 2] };
            // SAFETY: as above.
            unsafe { self.product((a, b), rows, top.as_mut_ptr(), COLUMNS, onto) };
            for _ in 1..*additions {
                let (below, above) = stack.split_at_mut(waiting - 2);
                let below = below.last_mut().unwrap_or(out);
                below[..live].iter_mut().zip(&above[0][..live]).for_each(|(below, above)| *below += above);
                waiting -= 1;
            }
        }
    }

    /// `rows` rows of C = (C if `accumulate`) + A panel · B panel.
    ///
    /// # Safety
    /// C has `rows` rows of `self.columns` elements, `stride` apart, that nobody else has.
    pub unsafe fn product(&self, (a, b): (&[u32], &[u32]), rows: usize, c: *mut f32, stride: usize, accumulate: bool) {
        let units = b.len() / self.columns;
        assert!(a.len() == units * self.rows && b.len() == units * self.columns);
        // SAFETY: the panels hold `units` units (asserted); C by the caller's promise; `at` chose functions for
        // instructions that the processor has.
        unsafe { self.tiles[rows - 1](units, a.as_ptr(), b.as_ptr(), c, stride, accumulate) };
    }
}

/// What the panels of a tile hold, in depth.
#[derive(Clone, Copy)]
pub enum Sums<'a> {
    /// A part of it, in one chain.
    Part { first: bool },
    /// All of it.
    Chains(&'a [Chain]),
}

/// Most sums of a tile that wait for others, but for one.
const STACK: usize = 5;

/// Sums of one tile, of its low-rank term, and those that wait to be added to either, in rows of [`COLUMNS`].
#[repr(align(64))]
pub struct Scratch {
    pub sums: [f32; ROWS * COLUMNS],
    pub branch: [f32; ROWS * COLUMNS],
    pub stack: [[f32; ROWS * COLUMNS]; STACK],
}

impl Scratch {
    pub fn new() -> Self {
        let zeros = [0.0; ROWS * COLUMNS];
        Self { sums: zeros, branch: zeros, stack: [zeros; STACK] }
    }
}

impl Tile<'_> {
    /// Copies what exists of C to rows of [`COLUMNS`].
    fn load(&self, buffer: &mut [f32; ROWS * COLUMNS]) {
        for (row, out) in buffer.chunks_exact_mut(COLUMNS).take(self.rows).enumerate() {
            if self.strides.1 == 1 {
                let c = self.row(row);
                match (out.first_chunk_mut::<COLUMNS>(), c.first_chunk()) {
                    (Some(out), Some(whole)) => *out = *whole,
                    _ => out[..c.len()].copy_from_slice(c),
                }
                continue;
            }
            for (column, x) in out[..self.columns].iter_mut().enumerate() {
                *x = self.c.get(self.at + row * self.strides.0 + column * self.strides.1);
            }
        }
    }

    /// The reverse.
    pub fn store(&self, buffer: &[f32; ROWS * COLUMNS]) {
        if self.strides.1 == 1 {
            for (row, values) in buffer.chunks_exact(COLUMNS).take(self.rows).enumerate() {
                self.row(row).copy_from_slice(&values[..self.columns]);
            }
            return;
        }
        for column in 0..self.columns {
            let at = self.at + column * self.strides.1;
            // SAFETY: the tile belongs to the calling task, which holds no other slice of it.
            let out = unsafe { self.c.slice(at, (self.rows - 1) * self.strides.0 + 1) };
            for (row, x) in out.iter_mut().step_by(self.strides.0).enumerate() {
                *x = buffer[row * COLUMNS + column];
            }
        }
    }

    /// One column of C where its rows are contiguous.
    #[allow(clippy::mut_from_ref)] // as `row`
    pub fn column(&self, column: usize) -> &mut [f32] {
        // SAFETY: the tile belongs to the calling task, which holds no other slice of it.
        unsafe { self.c.slice(self.at + column * self.strides.1, self.rows) }
    }

    /// One row of C where its columns are contiguous.
    #[allow(clippy::mut_from_ref)] // as `Shared::slice`, whose promise a tile carries
    pub fn row(&self, row: usize) -> &mut [f32] {
        // SAFETY: the tile belongs to the calling task, which holds no other slice of it.
        unsafe { self.c.slice(self.at + row * self.strides.0, self.columns) }
    }
}

impl<'t> measure::Rows<'t> for &'t Tile<'_> {
    fn count(&self) -> usize {
        self.rows
    }
    #[inline(always)]
    fn row(&self, i: usize) -> &'t [f32] {
        Tile::row(self, i)
    }
}

/// R × 16 in plain Rust.
unsafe fn portable<const R: usize>(
    units: usize,
    a: *const u32,
    b: *const u32,
    c: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    // SAFETY: the caller passes panels of `units` units, 4 and 16 lanes wide.
    let (a, b) = unsafe { (std::slice::from_raw_parts(a, units * 4), std::slice::from_raw_parts(b, units * 16)) };
    let mut sums = [[0f32; 16]; R];
    for (a, b) in a.chunks_exact(4).zip(b.chunks_exact(16)) {
        for (sums, &a) in sums.iter_mut().zip(a) {
            for (sum, &b) in sums.iter_mut().zip(b) {
                *sum = f32::from_bits(a).mul_add(f32::from_bits(b), *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        // SAFETY: the caller passes R rows of 16 elements, `stride` apart, that nobody else has.
        let c = unsafe { std::slice::from_raw_parts_mut(c.add(r * stride), 16) };
        for (c, sum) in c.iter_mut().zip(sums) {
            *c = if accumulate { *c + sum } else { *sum };
        }
    }
}

const PORTABLE: [TileFunction; 4] = [portable::<1>, portable::<2>, portable::<3>, portable::<4>];

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::TileFunction;

    /// R × 32, f32. Panels: A [units][14], B [units][32].
    #[target_feature(enable = "avx512f")]
    unsafe fn avx512<const R: usize>(
        units: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
        // SAFETY: the caller passes panels of `units` units and a tile of R rows of 32 elements, `stride` apart.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            for _ in 0..units {
                let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
                for (r, sum) in sums.iter_mut().enumerate() {
                    let a = _mm512_set1_ps(*a.add(r));
                    sum[0] = _mm512_fmadd_ps(a, b0, sum[0]);
                    sum[1] = _mm512_fmadd_ps(a, b1, sum[1]);
                }
                (a, b) = (a.add(14), b.add(32));
            }
            store512(sums, c, stride, accumulate);
        }
    }

    /// R × 32, pairs of bf16: each sum adds two products a unit. Panels as above, two elements a unit.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn avx512_bf16<const R: usize>(
        units: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        let (mut a, mut b) = (a.cast::<i32>(), b.cast::<i32>());
        // SAFETY: as for `avx512`; the transmutes only rename the type of a register.
        unsafe {
            let pairs = |x: __m512i| std::mem::transmute::<__m512i, __m512bh>(x);
            let mut sums = [[_mm512_setzero_ps(); 2]; R];
            for _ in 0..units {
                let b0 = pairs(_mm512_loadu_si512(b.cast()));
                let b1 = pairs(_mm512_loadu_si512(b.add(16).cast()));
                for (r, sum) in sums.iter_mut().enumerate() {
                    let a = pairs(_mm512_set1_epi32(*a.add(r)));
                    sum[0] = _mm512_dpbf16_ps(sum[0], a, b0);
                    sum[1] = _mm512_dpbf16_ps(sum[1], a, b1);
                }
                (a, b) = (a.add(14), b.add(32));
            }
            store512(sums, c, stride, accumulate);
        }
    }

    /// C = (C if `accumulate`) + sums.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store512<const R: usize>(sums: [[__m512; 2]; R], c: *mut f32, stride: usize, accumulate: bool) {
        for (r, sum) in sums.into_iter().enumerate() {
            for (half, sum) in sum.into_iter().enumerate() {
                // SAFETY: the caller passes R rows of 32 elements, `stride` apart, that nobody else has.
                unsafe {
                    let c = c.add(r * stride + 16 * half);
                    _mm512_storeu_ps(c, if accumulate { _mm512_add_ps(_mm512_loadu_ps(c), sum) } else { sum });
                }
            }
        }
    }

    /// R × 16, f32. Panels: A [units][6], B [units][16].
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2<const R: usize>(
        units: usize,
        a: *const u32,
        b: *const u32,
        c: *mut f32,
        stride: usize,
        accumulate: bool,
    ) {
        let (mut a, mut b) = (a.cast::<f32>(), b.cast::<f32>());
        // SAFETY: the caller passes panels of `units` units and a tile of R rows of 16 elements, `stride` apart.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; R];
            for _ in 0..units {
                let (b0, b1) = (_mm256_loadu_ps(b), _mm256_loadu_ps(b.add(8)));
                for (r, sum) in sums.iter_mut().enumerate() {
                    let a = _mm256_set1_ps(*a.add(r));
                    sum[0] = _mm256_fmadd_ps(a, b0, sum[0]);
                    sum[1] = _mm256_fmadd_ps(a, b1, sum[1]);
                }
                (a, b) = (a.add(6), b.add(16));
            }
            for (r, sum) in sums.into_iter().enumerate() {
                for (half, sum) in sum.into_iter().enumerate() {
                    let c = c.add(r * stride + 8 * half);
                    _mm256_storeu_ps(c, if accumulate { _mm256_add_ps(_mm256_loadu_ps(c), sum) } else { sum });
                }
            }
        }
    }

    pub const AVX2: [TileFunction; 6] = [avx2::<1>, avx2::<2>, avx2::<3>, avx2::<4>, avx2::<5>, avx2::<6>];
    pub const AVX512: [TileFunction; 14] = [
        avx512::<1>,
        avx512::<2>,
        avx512::<3>,
        avx512::<4>,
        avx512::<5>,
        avx512::<6>,
        avx512::<7>,
        avx512::<8>,
        avx512::<9>,
        avx512::<10>,
        avx512::<11>,
        avx512::<12>,
        avx512::<13>,
        avx512::<14>,
    ];
    pub const AVX512_BF16: [TileFunction; 14] = [
        avx512_bf16::<1>,
        avx512_bf16::<2>,
        avx512_bf16::<3>,
        avx512_bf16::<4>,
        avx512_bf16::<5>,
        avx512_bf16::<6>,
        avx512_bf16::<7>,
        avx512_bf16::<8>,
        avx512_bf16::<9>,
        avx512_bf16::<10>,
        avx512_bf16::<11>,
        avx512_bf16::<12>,
        avx512_bf16::<13>,
        avx512_bf16::<14>,
    ];
}
