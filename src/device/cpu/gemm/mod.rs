//! Matrix products: C [m, n] = A [m, k] · B [k, n], operands rounded to a [`Compute`] format, f32 accumulation.
//!
//! Every element of C is the sum of a few chains of fused multiply-adds over k, cut by `depth_block` or interleaved by
//! `order` as PyTorch's libraries have them, whatever the tile, the thread or the instruction set that computes it: the
//! cut of the work (and the rows beside a row) cannot change a bit. With AVX512-BF16 the chains go over pairs of bf16.
//! These are PyTorch's own bits on a processor for which its libraries choose the same kernels (AMD Zen 4 was measured).
//! `linear` holds the device's own products, `plan` a product as the kernels see it, `order` the chains of fp16, `task`
//! one thread's share of a product; `pack` lays the operands out for the kernels, `kernel` holds the inner loops,
//! `narrow` what MKL does for a LoRA rank of 8 or less, `checks` sums what is checked; this file cuts the work.

mod checks;
mod finish;
mod kernel;
mod linear;
mod narrow;
mod order;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_avx512;
mod plan;
mod task;

pub use finish::{LowRank, Then};
pub use kernel::{COLUMNS as TILE_COLUMNS, Kernel, Tile};
pub use pack::Matrix;
pub use plan::mkl_block;

use std::ops::Range;

use self::checks::{Checks, Packed, Room, Summed};
use self::pack::Layout;
use self::plan::{Plan, Term};
use self::task::Task;
use super::meter::Cells;
use super::threads::Shared;
use super::{Buffer, CpuDevice};
use crate::device::checks::ProductSums;
use crate::device::{Compute, DType};

/// Panels of rows that go to one task, and are measured, together.
const PANELS: usize = 8;

/// One product and what happens to its result.
pub struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// m lanes of depth k.
    pub a: Matrix<'a>,
    /// n lanes of depth k.
    pub b: Matrix<'a>,
    pub compute: Compute,
    /// n values added to each row before the one rounding.
    pub bias: Option<&'a [f32]>,
    pub out: DType,
    pub then: Then<'a>,
    /// Where to put what is measured of the result.
    pub cells: Option<&'a Cells>,
}

impl CpuDevice {
    /// Computes `product` into `c` [m, n]; returns its checksums, if they are expected.
    pub fn gemm(&self, product: &Product<'_>, c: &mut [f32]) -> Option<ProductSums> {
        self.gemm_with(&Kernel::best(product.compute), product, c)
    }

    fn gemm_with(&self, kernel: &Kernel, product: &Product<'_>, c: &mut [f32]) -> Option<ProductSums> {
        assert_eq!(c.len(), product.m * product.n);
        if c.is_empty() {
            return None;
        }
        let plan = Plan::new(product, kernel);
        let (row_tasks, column_tasks) = self.cut(&plan);
        let checks = Checks::expected(&plan).filter(|_| plan.order.is_none());
        let by_rows = checks.as_ref().is_some_and(Checks::by_rows);
        let mut room = checks.as_ref().map(|checks| {
            let shares = if by_rows { column_tasks } else { row_tasks };
            Room::new(checks.shape(&plan), checks.has_term(), shares)
        });
        let places = room.as_mut().map(Room::places);
        let summed = |share| {
            let (checks, places) = checks.as_ref().zip(places.as_ref())?;
            Some(Summed { checks, places, start: 0, share })
        };
        let mut packed = Buffer::unset(plan.panels() * kernel.rows * plan.depth);
        let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut packed);
        let layout = Layout { kernel, width: kernel.rows, order: plan.order.as_ref() };
        self.pack_rows((plan.a, product.k), plan.m, &layout, packed, summed(0).map(|summed| (summed, false)));
        let mut term = plan.term();
        if let Some(Term { of: LowRank { a, rank, .. }, kernel, order, a: packed }) = &mut term {
            let layout = Layout { kernel, width: kernel.rows, order: order.as_ref() };
            let packed = bytemuck::cast_slice_mut(packed);
            self.pack_rows((a, *rank), plan.m, &layout, packed, summed(0).map(|summed| (summed, true)));
        }
        let c = Shared::new(c);
        self.workers.each(row_tasks * column_tasks, plan.m * plan.n * product.k / 8, |task| {
            let rows = share(plan.panels().div_ceil(PANELS), row_tasks, task % row_tasks, kernel.rows * PANELS, plan.m);
            let tiles = plan.n.div_ceil(kernel.columns);
            let columns = share(tiles, column_tasks, task / row_tasks, kernel.columns, plan.n);
            let summed = summed(if by_rows { task / row_tasks } else { task % row_tasks });
            Task { plan: &plan, a: packed, term: term.as_ref(), rows, columns, c: &c, start: 0, summed }.run();
        });
        room.map(Room::finish)
    }

    /// Lays out all of an operand's m lanes, a panel after another, and sums them (`true`: as the low-rank term's).
    fn pack_rows(
        &self,
        (matrix, depth): (&Matrix<'_>, usize),
        m: usize,
        layout: &Layout<'_>,
        packed: &mut [u32],
        summed: Option<(Summed<'_>, bool)>,
    ) {
        let Layout { kernel, width, .. } = *layout;
        let panels = m.div_ceil(width);
        let panel = width * kernel.units(depth);
        let packed = pack::Panels::new(packed, panel);
        // A few tasks per thread.
        let tasks = panels.min(self.workers.threads() * 4);
        self.workers.each(tasks, m * depth / 2, |task| {
            let mine = panels * task / tasks..panels * (task + 1) / tasks;
            let rows = mine.start * width..(mine.end * width).min(m);
            // SAFETY: every panel belongs to one task.
            let out = unsafe { packed.panels(mine) };
            pack::pack(matrix, rows.clone(), 0..depth, layout, out);
            if let Some((summed, term)) = summed
                && summed.checks.by_rows()
            {
                let packed = Packed { panels: out, width, panel };
                // SAFETY: every panel belongs to one task.
                unsafe { summed.predict(term, (rows.start, rows.len()), 0, kernel.per_unit, &packed) };
            }
        });
    }

    /// Tasks along (rows, columns): a few per thread, along columns first (each task packs its own columns of B), of
    /// one size where the tiles divide so.
    fn cut(&self, plan: &Plan<'_>) -> (usize, usize) {
        let threads = self.workers.threads();
        if threads == 1 {
            return (1, 1);
        }
        let tiles = plan.n.div_ceil(plan.kernel.columns);
        let wanted = (tiles / 6).clamp(threads * 3, threads * 16);
        let even = |&tasks: &usize| tasks.is_multiple_of(threads) && tiles.is_multiple_of(tasks);
        if let Some(even) = (threads * 2..=wanted).rev().find(even) {
            return (1, even);
        }
        let by_columns = tiles.div_ceil(2).clamp(1, wanted);
        let by_rows = plan.m.div_ceil(plan.kernel.rows * PANELS).clamp(1, wanted.div_ceil(by_columns));
        (by_rows, by_columns)
    }

    /// Many products of few rows or columns (a LoRA rank), one task each or a part of one: sharing out each by itself
    /// would cost more than the product. Returns their checksums, if such are expected.
    fn narrow_products<'a>(
        &self,
        kernel: &Kernel,
        count: usize,
        product: impl Fn(usize) -> Product<'a> + Sync + Send,
        c: &mut [f32],
    ) -> Option<ProductSums> {
        let size = c.len() / count.max(1);
        if size == 0 {
            return None;
        }
        let shape = {
            let first = product(0);
            let plan = Plan::new(&first, kernel);
            (plan.n, plan.m)
        };
        let mut room = super::checks::expected().is_some().then(|| Room::new((count * shape.0, shape.1), false, 1));
        let places = room.as_mut().map(Room::places);
        // Depths differ; the mean is good enough to decide by.
        let work = (0..count).map(|unit| product(unit).k).sum::<usize>() * size / 8;
        let c = Shared::new(c);
        let parts = (self.workers.threads() * 4).div_ceil(count);
        self.workers.each(count * parts, work, |task| {
            let unit = task / parts;
            let product = product(unit);
            let plan = Plan::new(&product, kernel);
            let checks = places.as_ref().map(|_| Checks::new(&plan, false, None));
            let mut packed = Buffer::unset(plan.panels() * kernel.rows * plan.depth);
            let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut packed);
            let layout = Layout { kernel, width: kernel.rows, order: plan.order.as_ref() };
            pack::pack(plan.a, 0..plan.m, 0..product.k, &layout, packed);
            let tiles = plan.n.div_ceil(kernel.columns);
            let columns = share(tiles, parts, task % parts, kernel.columns, plan.n);
            let summed = checks.as_ref().zip(places.as_ref());
            let summed = summed.map(|(checks, places)| Summed { checks, places, start: unit * shape.0, share: 0 });
            Task { plan: &plan, a: packed, term: None, rows: 0..plan.m, columns, c: &c, start: unit * size, summed }
                .run();
        });
        room.map(Room::finish)
    }
}

/// Elements of task `index` of `tasks`, when `tiles` tiles of `width` (`total` elements) are shared out evenly.
fn share(tiles: usize, tasks: usize, index: usize, width: usize, total: usize) -> Range<usize> {
    let edge = |i: usize| (tiles * i / tasks * width).min(total);
    edge(index)..edge(index + 1)
}

#[cfg(test)]
mod tests {
    use super::super::rounding;
    use super::super::simd::{Level, level};
    use super::super::values::Elements;
    use super::*;
    use crate::device::noise::symmetric;

    /// C of a product at a level, over values rounded to bf16.
    fn at(level: Level, compute: Compute, (m, n, k): (usize, usize, usize)) -> Vec<f32> {
        let device = CpuDevice::new(Some(2)).expect("two threads");
        let draw = |n: usize, seed| (0..n).map(|i| rounding::bf16(symmetric(seed, 0, i as u64))).collect::<Vec<f32>>();
        let (a, b) = (draw(m * k, 1), draw(n * k, 2));
        let view = |x| Matrix { elements: Elements::Wide(x), at: 0, lane: k, depth: 1, dtype: DType::BF16 };
        let product = Product {
            m,
            n,
            k,
            a: view(&a),
            b: view(&b),
            compute,
            bias: None,
            out: DType::F32,
            then: Then::Nothing,
            cells: None,
        };
        let mut c = vec![f32::NAN; m * n];
        device.gemm_with(&Kernel::at(level, compute), &product, &mut c);
        c
    }

    const SHAPES: [(usize, usize, usize); 6] =
        [(1, 1, 0), (1, 1, 1), (7, 65, 33), (65, 7, 900), (100, 300, 1000), (14, 32, 384)];

    #[test]
    fn every_instruction_set_gives_the_same_f32_bits() {
        for shape in SHAPES {
            let plain = at(Level::Baseline, Compute::F32, shape);
            for better in [Level::Avx2, Level::Avx512, Level::Avx512Bf16].into_iter().filter(|&l| l <= level()) {
                let fast = at(better, Compute::F32, shape);
                let same = plain.iter().zip(&fast).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{shape:?} at {}", better.name());
            }
        }
    }

    #[test]
    fn pairs_of_bf16_sum_as_accurately_as_f32() {
        if level() < Level::Avx512Bf16 {
            println!("skipped: this processor has no AVX512-BF16");
            return;
        }
        for shape in SHAPES {
            let plain = at(Level::Baseline, Compute::Bf16, shape);
            let pairs = at(Level::Avx512Bf16, Compute::Bf16, shape);
            // Both orders are within k·2^-24·Σ|a·b| of the exact sum, and Σ|a·b| ≤ k.
            let most = 2.0 * (shape.2 * shape.2) as f32 * f32::EPSILON / 2.0;
            let close = plain.iter().zip(&pairs).all(|(a, b)| (a - b).abs() <= most);
            assert!(close, "{shape:?}");
        }
    }
}
