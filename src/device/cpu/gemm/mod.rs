//! Matrix products: C [m, n] = A [m, k] · B [k, n], operands rounded to a [`Compute`] format, f32 accumulation.
//!
//! Every element of C is one chain of fused multiply-adds over k in ascending order, whatever the tile, the thread or
//! the instruction set that computes it: the cut of the work (and the rows beside a row) cannot change a bit.
//! `pack` lays the operands out for the kernels, `kernel` holds the inner loops; this file cuts the work.

mod kernel;
mod pack;

pub use kernel::Kernel;
pub use pack::Matrix;

use std::ops::Range;

use super::threads::Shared;
use super::values::{elements, expect, expect_offsets, tensor, values};
use super::{Buffer, CpuDevice};
use crate::Result;
use crate::device::{Compute, DType, Tensor};

/// Units of depth (4 bytes of each operand row) that a packed panel of A keeps in the first-level cache.
const DEPTH: usize = 384;
/// Columns of B packed at a time by one task; with [`DEPTH`] about half of a second-level cache.
const COLUMNS: usize = 256;

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
}

impl CpuDevice {
    /// Computes `product` into `c` [m, n].
    pub fn gemm(&self, product: &Product<'_>, c: &mut [f32]) {
        self.gemm_with(&Kernel::best(product.compute), product, c);
    }

    fn gemm_with(&self, kernel: &Kernel, product: &Product<'_>, c: &mut [f32]) {
        assert_eq!(c.len(), product.m * product.n);
        if c.is_empty() {
            return;
        }
        let plan = Plan::new(product, kernel);
        let mut packed = Buffer::unset(plan.panels() * kernel.rows * plan.depth);
        let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut packed);
        {
            let packed = pack::Panels::new(packed, kernel.rows * plan.depth);
            self.workers.each(plan.panels(), plan.m * product.k, |panel| {
                let first = panel * kernel.rows;
                // SAFETY: one task per panel.
                let out = unsafe { packed.panel(panel) };
                pack::pack(plan.a, first..(first + kernel.rows).min(plan.m), 0..product.k, kernel.rows, kernel, out);
            });
        }
        let (row_tasks, column_tasks) = self.cut(&plan);
        let c = Shared::new(c);
        self.workers.each(row_tasks * column_tasks, plan.m * plan.n * product.k / 8, |task| {
            let rows = share(plan.panels(), row_tasks, task % row_tasks, kernel.rows, plan.m);
            let tiles = plan.n.div_ceil(kernel.columns);
            let columns = share(tiles, column_tasks, task / row_tasks, kernel.columns, plan.n);
            block(&plan, packed, rows, columns, &c);
        });
    }

    /// Tasks along (rows, columns): a few per thread, along columns first (each task packs its own columns of B).
    fn cut(&self, plan: &Plan<'_>) -> (usize, usize) {
        let threads = self.workers.threads();
        if threads == 1 {
            return (1, 1);
        }
        let wanted = threads * 4;
        let by_columns = plan.n.div_ceil(plan.kernel.columns * 2).clamp(1, wanted);
        let by_rows = plan.m.div_ceil(plan.kernel.rows * 4).clamp(1, wanted.div_ceil(by_columns));
        (by_rows, by_columns)
    }

    pub(super) fn linear_impl(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (m, k) = (x.rows(), x.columns());
        let n = w.rows();
        expect(w.columns() == k && bias.is_none_or(|b| b.elements() == n), "linear", || {
            format!("x {:?}, w {:?}, bias {:?}", x.shape, w.shape, bias.map(|b| &b.shape))
        })?;
        let bias = bias.map(values).transpose()?;
        let mut y = Buffer::unset(m * n);
        let a = Matrix { elements: elements(x)?, at: 0, lane: k, depth: 1, dtype: x.dtype };
        let b = Matrix { elements: elements(w)?, at: 0, lane: k, depth: 1, dtype: w.dtype };
        self.gemm(&Product { m, n, k, a, b, compute, bias: bias.as_deref(), out }, &mut y);
        Ok(tensor(y, vec![m, n], out))
    }

    pub(super) fn linear_input_grad_impl(
        &self,
        dy: &Tensor,
        w: &Tensor,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (m, k) = (dy.rows(), dy.columns());
        let n = w.columns();
        expect(w.rows() == k, "linear_input_grad", || format!("dy {:?}, w {:?}", dy.shape, w.shape))?;
        let mut dx = Buffer::unset(m * n);
        let a = Matrix { elements: elements(dy)?, at: 0, lane: k, depth: 1, dtype: dy.dtype };
        let b = Matrix { elements: elements(w)?, at: 0, lane: 1, depth: n, dtype: w.dtype };
        self.gemm(&Product { m, n, k, a, b, compute, bias: None, out }, &mut dx);
        Ok(tensor(dx, vec![m, n], out))
    }

    pub(super) fn linear_weight_grad_impl(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: &[usize],
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (m, n) = (dy.columns(), x.columns());
        expect(dy.rows() == x.rows(), "linear_weight_grad", || format!("dy {:?}, x {:?}", dy.shape, x.shape))?;
        expect_offsets(units, x.rows(), "linear_weight_grad")?;
        let (a, b) = (elements(dy)?, elements(x)?);
        let count = units.len() - 1;
        let mut dw = Buffer::unset(count * m * n);
        for (unit, dw) in dw.chunks_exact_mut((m * n).max(1)).enumerate() {
            let (first, k) = (units[unit], units[unit + 1] - units[unit]);
            let a = Matrix { elements: a, at: first * m, lane: 1, depth: m, dtype: dy.dtype };
            let b = Matrix { elements: b, at: first * n, lane: 1, depth: n, dtype: x.dtype };
            self.gemm(&Product { m, n, k, a, b, compute, bias: None, out }, dw);
        }
        Ok(tensor(dw, vec![count, m, n], out))
    }
}

/// Elements of task `index` of `tasks`, when `tiles` tiles of `width` (`total` elements) are shared out evenly.
fn share(tiles: usize, tasks: usize, index: usize, width: usize, total: usize) -> Range<usize> {
    let edge = |i: usize| (tiles * i / tasks * width).min(total);
    edge(index)..edge(index + 1)
}

/// A product as the kernels see it. A narrow result (a LoRA rank) is computed transposed: the kernels waste no lanes
/// on few rows, but would on few columns. The sums are the same either way.
struct Plan<'a> {
    product: &'a Product<'a>,
    kernel: &'a Kernel,
    a: &'a Matrix<'a>,
    b: &'a Matrix<'a>,
    m: usize,
    n: usize,
    /// Elements of C between rows and between columns of this view.
    strides: (usize, usize),
    /// Units of depth.
    depth: usize,
}

impl<'a> Plan<'a> {
    fn new(product: &'a Product<'a>, kernel: &'a Kernel) -> Self {
        let depth = kernel.units(product.k);
        if product.n < kernel.columns && product.n < product.m && product.bias.is_none() {
            let (m, n) = (product.n, product.m);
            return Self { product, kernel, a: &product.b, b: &product.a, m, n, strides: (1, product.n), depth };
        }
        let (m, n) = (product.m, product.n);
        Self { product, kernel, a: &product.a, b: &product.b, m, n, strides: (n, 1), depth }
    }

    fn panels(&self) -> usize {
        self.m.div_ceil(self.kernel.rows)
    }

    /// Bias and rounding of a tile, after the last unit of depth, where there is any.
    fn finish(&self, units: usize, columns: Range<usize>) -> Option<kernel::Finish<'a>> {
        let Product { bias, out, .. } = *self.product;
        let any = bias.is_some() || out != DType::F32;
        (any && units == self.depth).then(|| kernel::Finish { bias: bias.map(|bias| &bias[columns]), out })
    }

    /// The depth in even parts of at most [`DEPTH`] units; one empty part if there is none, which stores zeros.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let (depth, parts) = (self.depth, self.depth.div_ceil(DEPTH).max(1));
        (0..parts).map(move |i| depth * i / parts..depth * (i + 1) / parts)
    }
}

/// One task: rows × columns of C over the whole depth.
fn block(plan: &Plan<'_>, packed_a: &[u32], rows: Range<usize>, columns: Range<usize>, c: &Shared<'_>) {
    let kernel = plan.kernel;
    let most = plan.parts().map(|part| part.len()).max().unwrap_or(0);
    let mut packed_b = Buffer::unset(COLUMNS.min(columns.len().next_multiple_of(kernel.columns)) * most);
    let packed_b: &mut [u32] = bytemuck::cast_slice_mut(&mut packed_b);
    for first_column in columns.clone().step_by(COLUMNS) {
        let end_column = (first_column + COLUMNS).min(columns.end);
        for part in plan.parts() {
            let units = part.len();
            let elements = part.start * kernel.per_unit..(part.end * kernel.per_unit).min(plan.product.k);
            let tiles = || (first_column..end_column).step_by(kernel.columns).enumerate();
            for (panel, first) in tiles() {
                let lanes = first..(first + kernel.columns).min(end_column);
                let out = &mut packed_b[panel * kernel.columns * units..][..kernel.columns * units];
                pack::pack(plan.b, lanes, elements.clone(), kernel.columns, kernel, out);
            }
            for row in rows.clone().step_by(kernel.rows) {
                let a = &packed_a[row * plan.depth + part.start * kernel.rows..][..units * kernel.rows];
                for (panel, column) in tiles() {
                    let tile = kernel::Tile {
                        c,
                        at: row * plan.strides.0 + column * plan.strides.1,
                        strides: plan.strides,
                        rows: kernel.rows.min(rows.end - row),
                        columns: kernel.columns.min(end_column - column),
                    };
                    let b = &packed_b[panel * kernel.columns * units..][..kernel.columns * units];
                    let finish = plan.finish(part.end, column..column + tile.columns);
                    kernel.tile(a, b, &tile, part.start > 0, finish);
                }
            }
        }
    }
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
        let product = Product { m, n, k, a: view(&a), b: view(&b), compute, bias: None, out: DType::F32 };
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
