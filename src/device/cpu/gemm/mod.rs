//! Matrix products: C [m, n] = A [m, k] · B [k, n], operands rounded to a [`Compute`] format, f32 accumulation.
//!
//! Every element of C is one chain of fused multiply-adds over k in ascending order, whatever the tile, the thread or
//! the instruction set that computes it: the cut of the work (and the rows beside a row) cannot change a bit.
//! `pack` lays the operands out for the kernels, `kernel` holds the inner loops; this file cuts the work.

mod kernel;
mod pack;

pub use kernel::Kernel;
pub use pack::Matrix;

use super::CpuDevice;
use super::rounding;
use super::threads::Shared;
use super::values::{elements, expect, expect_offsets, tensor, values};
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
        let &Product { m, n, k, .. } = product;
        assert_eq!(c.len(), m * n);
        if m == 0 || n == 0 {
            return;
        }
        let kernel = Kernel::best(product.compute);
        let depth = kernel.units(k);
        let panels = m.div_ceil(kernel.rows);
        let mut packed = vec![0u32; panels * kernel.rows * depth];
        let work = m * n * k / 8;
        {
            let packed = pack::Panels::new(&mut packed, kernel.rows * depth);
            self.workers.each(panels, m * k, |panel| {
                let first = panel * kernel.rows;
                // SAFETY: one task per panel.
                let out = unsafe { packed.panel(panel) };
                pack::pack(&product.a, first..(first + kernel.rows).min(m), 0..k, kernel.rows, &kernel, out);
            });
        }
        let (row_tasks, column_tasks) = self.cut(m, n, &kernel);
        let c = Shared::new(c);
        self.workers.each(row_tasks * column_tasks, work, |task| {
            let rows = share(panels, row_tasks, task % row_tasks, kernel.rows, m);
            let columns = share(n.div_ceil(kernel.columns), column_tasks, task / row_tasks, kernel.columns, n);
            block(product, &kernel, &packed, rows, columns, &c);
        });
    }

    /// Tasks along (m, n): a few per thread, cut along n first (each task packs its own columns of B).
    fn cut(&self, m: usize, n: usize, kernel: &Kernel) -> (usize, usize) {
        let threads = self.workers.threads();
        if threads == 1 {
            return (1, 1);
        }
        let wanted = threads * 4;
        let by_columns = n.div_ceil(kernel.columns * 2).min(wanted);
        let by_rows = m.div_ceil(kernel.rows * 4).min(wanted.div_ceil(by_columns));
        (by_rows.max(1), by_columns.max(1))
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
        let mut y = vec![0f32; m * n];
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
        let mut dx = vec![0f32; m * n];
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
        let mut dw = vec![0f32; count * m * n];
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
fn share(tiles: usize, tasks: usize, index: usize, width: usize, total: usize) -> std::ops::Range<usize> {
    let edge = |i: usize| (tiles * i / tasks * width).min(total);
    edge(index)..edge(index + 1)
}

/// One task: rows × columns of C over the whole depth.
fn block(
    product: &Product<'_>,
    kernel: &Kernel,
    packed_a: &[u32],
    rows: std::ops::Range<usize>,
    columns: std::ops::Range<usize>,
    c: &Shared<'_>,
) {
    let depth = kernel.units(product.k);
    let panel_a = kernel.rows * depth;
    let mut packed_b = vec![0u32; COLUMNS.min(columns.len().next_multiple_of(kernel.columns)) * DEPTH.min(depth)];
    let mut first_column = columns.start;
    while first_column < columns.end {
        let end_column = (first_column + COLUMNS).min(columns.end);
        let mut start = 0;
        // A depth of zero still has to store zeros: the loop runs once.
        loop {
            let units = DEPTH.min(depth - start);
            let elements = start * kernel.per_unit..((start + units) * kernel.per_unit).min(product.k);
            for (panel, first) in (first_column..end_column).step_by(kernel.columns).enumerate() {
                let lanes = first..(first + kernel.columns).min(end_column);
                let out = &mut packed_b[panel * kernel.columns * units..][..kernel.columns * units];
                pack::pack(&product.b, lanes, elements.clone(), kernel.columns, kernel, out);
            }
            for row in rows.clone().step_by(kernel.rows) {
                let a = &packed_a[row / kernel.rows * panel_a + start * kernel.rows..][..units * kernel.rows];
                for (panel, column) in (first_column..end_column).step_by(kernel.columns).enumerate() {
                    let b = &packed_b[panel * kernel.columns * units..][..kernel.columns * units];
                    let tile_rows = kernel.rows.min(rows.end - row);
                    let tile_columns = kernel.columns.min(end_column - column);
                    let tile = kernel::Tile { c, at: row * product.n + column, stride: product.n };
                    kernel.tile(a, b, &tile, (tile_rows, tile_columns), start > 0);
                }
            }
            start += units;
            if start >= depth {
                break;
            }
        }
        finish(product, rows.clone(), first_column..end_column, c);
        first_column = end_column;
    }
}

/// Bias and the one rounding, on a finished block of C.
fn finish(product: &Product<'_>, rows: std::ops::Range<usize>, columns: std::ops::Range<usize>, c: &Shared<'_>) {
    if product.bias.is_none() && product.out == DType::F32 {
        return;
    }
    for row in rows {
        // SAFETY: the block belongs to this task alone, and its rows do not overlap.
        let run = unsafe { c.slice(row * product.n + columns.start, columns.len()) };
        if let Some(bias) = product.bias {
            for (y, b) in run.iter_mut().zip(&bias[columns.clone()]) {
                *y += b;
            }
        }
        rounding::round_slice(run, product.out);
    }
}
