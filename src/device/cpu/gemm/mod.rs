//! Matrix products: C [m, n] = A [m, k] · B [k, n], operands rounded to a [`Compute`] format, f32 accumulation.
//!
//! Every element of C is the sum of a few chains of fused multiply-adds over k in ascending order, cut by [`depth_block`]
//! where PyTorch's libraries cut them, whatever the tile, the thread or the instruction set that computes it: the cut of
//! the work (and the rows beside a row) cannot change a bit. With AVX512-BF16 the chains go over pairs of bf16. These are
//! PyTorch's own bits on a processor for which its libraries choose the same kernels (AMD Zen 4 was measured).
//! `pack` lays the operands out for the kernels, `kernel` holds the inner loops, `narrow` what MKL does for a LoRA rank
//! of 8 or less; this file cuts the work.

mod finish;
mod kernel;
mod narrow;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_avx512;

pub use finish::{LowRank, Then};
pub use kernel::{COLUMNS as TILE_COLUMNS, Kernel, Tile};
pub use pack::Matrix;

use std::ops::Range;

use super::meter::Cells;
use super::rounding;
use super::threads::Shared;
use super::values::{elements, expect, expect_offsets, tensor, values};
use super::{Buffer, CpuDevice};
use crate::Result;
use crate::device::{self, Compute, DType, Tensor};

/// Columns of B packed at a time by one task; with a [`depth_block`] at most half of a second-level cache.
const COLUMNS: usize = 256;
/// Panels of rows that go to one task, and are measured, together.
const PANELS: usize = 4;

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
        self.pack_rows((plan.a, product.k), plan.m, kernel, packed);
        let mut term = plan.term();
        if let Some(term) = &mut term {
            let LowRank { a, rank, .. } = *term.of;
            self.pack_rows((&a, rank), plan.m, &term.kernel, bytemuck::cast_slice_mut(&mut term.a));
        }
        let (row_tasks, column_tasks) = self.cut(&plan);
        let c = Shared::new(c);
        self.workers.each(row_tasks * column_tasks, plan.m * plan.n * product.k / 8, |task| {
            let rows = share(plan.panels().div_ceil(PANELS), row_tasks, task % row_tasks, kernel.rows * PANELS, plan.m);
            let tiles = plan.n.div_ceil(kernel.columns);
            let columns = share(tiles, column_tasks, task / row_tasks, kernel.columns, plan.n);
            block(&plan, (packed, term.as_ref()), rows, columns, (&c, 0));
        });
    }

    /// Lays out all of an operand's m lanes, a panel of `kernel.rows` lanes after another.
    fn pack_rows(&self, (matrix, depth): (&Matrix<'_>, usize), m: usize, kernel: &Kernel, packed: &mut [u32]) {
        let panels = m.div_ceil(kernel.rows);
        let packed = pack::Panels::new(packed, kernel.rows * kernel.units(depth));
        // A few tasks per thread.
        let tasks = panels.min(self.workers.threads() * 4);
        self.workers.each(tasks, m * depth / 2, |task| {
            let mine = panels * task / tasks..panels * (task + 1) / tasks;
            let rows = mine.start * kernel.rows..(mine.end * kernel.rows).min(m);
            // SAFETY: every panel belongs to one task.
            let out = unsafe { packed.panels(mine) };
            pack::pack(matrix, rows, 0..depth, kernel.rows, kernel, out);
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

    pub(super) fn linear_impl(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        (compute, out): (Compute, DType),
        branch: Option<(&device::LowRank<'_>, f32)>,
    ) -> Result<Tensor> {
        let (m, k, n) = (x.rows(), x.columns(), w.rows());
        expect(w.columns() == k && bias.is_none_or(|b| b.elements() == n), "linear", || {
            format!("x {:?}, w {:?}, bias {:?}", x.shape, w.shape, bias.map(|b| &b.shape))
        })?;
        let then = match branch {
            None => Then::Nothing,
            Some((branch, scaling)) => Then::AddScaled { term: low_rank(branch, (m, n), false)?, scaling },
        };
        let bias = bias.map(values).transpose()?;
        let mut y = Buffer::unset(m * n);
        if narrow::fits(compute, n) && bias.is_none() && branch.is_none() {
            narrow::by_rows(&self.workers, &values(x)?, &values(w)?, k, &mut y);
            rounding::round_slice(&mut y, out);
            return Ok(tensor(y, vec![m, n], out));
        }
        let (a, b) = (by_rows(x)?, by_rows(w)?);
        let cells = self.cells(compute, (m, n), out);
        self.gemm(&Product { m, n, k, a, b, compute, bias: bias.as_deref(), out, then, cells: cells.as_ref() }, &mut y);
        cells.into_iter().for_each(|cells| y.keep(cells.finish()));
        Ok(tensor(y, vec![m, n], out))
    }

    /// `sum`: what to add the product to, if anything, the low-rank term, and the dtype of their sum.
    pub(super) fn linear_input_grad_impl(
        &self,
        dy: &Tensor,
        w: &Tensor,
        (compute, out): (Compute, DType),
        sum: Option<(Option<&Tensor>, Option<&device::LowRank<'_>>, DType)>,
    ) -> Result<Tensor> {
        let (m, k, n) = (dy.rows(), dy.columns(), w.columns());
        expect(w.rows() == k, "linear_input_grad", || format!("dy {:?}, w {:?}", dy.shape, w.shape))?;
        let before = match sum {
            Some((Some(before), ..)) => Some(values(before)?),
            _ => None,
        };
        expect(before.as_ref().is_none_or(|x| x.len() == m * n), "linear_input_grad", || "another sum".to_owned())?;
        let then = match sum {
            None => Then::Nothing,
            Some((_, branch, dtype)) => {
                let term = branch.map(|branch| low_rank(branch, (m, n), true)).transpose()?;
                Then::Accumulate { so_far: before.as_deref(), term, dtype }
            }
        };
        let mut dx = Buffer::unset(m * n);
        if narrow::fits(compute, n) && sum.is_none() {
            let dy = narrow::Strided { values: &values(dy)?, row: k, depth: 1 };
            narrow::by_columns(&self.workers, &dy, (&values(w)?, k, n), &mut dx);
            rounding::round_slice(&mut dx, out);
            return Ok(tensor(dx, vec![m, n], out));
        }
        let (a, b) = (by_rows(dy)?, by_columns(w)?);
        let dtype = sum.map_or(out, |(.., dtype)| dtype);
        let cells = self.cells(compute, (m, n), dtype);
        self.gemm(&Product { m, n, k, a, b, compute, bias: None, out, then, cells: cells.as_ref() }, &mut dx);
        cells.into_iter().for_each(|cells| dx.keep(cells.finish()));
        Ok(tensor(dx, vec![m, n], dtype))
    }

    /// For what is to be measured of an (m, n) product, unless it is so narrow that it is computed transposed.
    fn cells(&self, compute: Compute, (m, n): (usize, usize), dtype: DType) -> Option<Cells> {
        let kernel = Kernel::best(compute);
        let meter = self.meter(&[m, n], dtype).filter(|_| n >= kernel.columns)?;
        Some(Cells::new(meter, kernel.rows * PANELS, kernel.columns))
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
        if narrow::fits(compute, n) {
            let (dy, x) = (values(dy)?, values(x)?);
            for (unit, dw) in dw.chunks_exact_mut((m * n).max(1)).enumerate() {
                let (first, k) = (units[unit], units[unit + 1] - units[unit]);
                let dy = narrow::Strided { values: &dy[first * m..], row: 1, depth: m };
                narrow::by_columns(&self.workers, &dy, (&x[first * n..][..k * n], k, n), dw);
            }
            rounding::round_slice(&mut dw, out);
            return Ok(tensor(dw, vec![count, m, n], out));
        }
        let product = |unit: usize| {
            let (first, k) = (units[unit], units[unit + 1] - units[unit]);
            let a = Matrix { elements: a, at: first * m, lane: 1, depth: m, dtype: dy.dtype };
            let b = Matrix { elements: b, at: first * n, lane: 1, depth: n, dtype: x.dtype };
            Product { m, n, k, a, b, compute, bias: None, out, then: Then::Nothing, cells: None }
        };
        let kernel = Kernel::best(compute);
        if m.min(n) > kernel.columns {
            for (unit, dw) in dw.chunks_exact_mut((m * n).max(1)).enumerate() {
                self.gemm_with(&kernel, &product(unit), dw);
            }
        } else {
            self.narrow_products(&kernel, count, product, &mut dw);
        }
        Ok(tensor(dw, vec![count, m, n], out))
    }

    /// Many products of few rows or columns (a LoRA rank), one task each or a part of one: sharing out each by itself
    /// would cost more than the product.
    fn narrow_products<'a>(
        &self,
        kernel: &Kernel,
        count: usize,
        product: impl Fn(usize) -> Product<'a> + Sync + Send,
        c: &mut [f32],
    ) {
        let size = c.len() / count.max(1);
        if size == 0 {
            return;
        }
        // Depths differ; the mean is good enough to decide by.
        let work = (0..count).map(|unit| product(unit).k).sum::<usize>() * size / 8;
        let c = Shared::new(c);
        let parts = (self.workers.threads() * 4).div_ceil(count);
        self.workers.each(count * parts, work, |task| {
            let product = product(task / parts);
            let plan = Plan::new(&product, kernel);
            let mut packed = Buffer::unset(plan.panels() * kernel.rows * plan.depth);
            let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut packed);
            pack::pack(plan.a, 0..plan.m, 0..product.k, kernel.rows, kernel, packed);
            let tiles = plan.n.div_ceil(kernel.columns);
            let columns = share(tiles, parts, task % parts, kernel.columns, plan.n);
            block(&plan, (packed, None), 0..plan.m, columns, (&c, task / parts * size));
        });
    }
}

/// Rows of x as lanes.
fn by_rows(x: &Tensor) -> Result<Matrix<'_>> {
    Ok(Matrix { elements: elements(x)?, at: 0, lane: x.columns(), depth: 1, dtype: x.dtype })
}

/// Columns of x as lanes.
fn by_columns(x: &Tensor) -> Result<Matrix<'_>> {
    Ok(Matrix { elements: elements(x)?, at: 0, lane: 1, depth: x.columns(), dtype: x.dtype })
}

/// The term x · w of an (m, n) product, or x · wᵀ with w's columns as lanes.
fn low_rank<'a>(of: &device::LowRank<'a>, (m, n): (usize, usize), columns: bool) -> Result<LowRank<'a>> {
    let device::LowRank { x, w, compute, dtype } = *of;
    let rank = x.columns();
    let (depth, lanes) = if columns { (w.rows(), w.columns()) } else { (w.columns(), w.rows()) };
    expect(x.rows() == m && depth == rank && lanes == n, "low-rank term", || {
        format!("x {:?}, w {:?} beside {m} x {n}", x.shape, w.shape)
    })?;
    Ok(LowRank { a: by_rows(x)?, b: if columns { by_columns(w)? } else { by_rows(w)? }, rank, compute, dtype })
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
        if product.n < kernel.columns
            && product.n < product.m
            && product.bias.is_none()
            && matches!(product.then, Then::Nothing)
        {
            let (m, n) = (product.n, product.m);
            return Self { product, kernel, a: &product.b, b: &product.a, m, n, strides: (1, product.n), depth };
        }
        let (m, n) = (product.m, product.n);
        Self { product, kernel, a: &product.a, b: &product.b, m, n, strides: (n, 1), depth }
    }

    fn panels(&self) -> usize {
        self.m.div_ceil(self.kernel.rows)
    }

    /// Whether tiles need finishing after the last part of the depth.
    fn finishes(&self) -> bool {
        let Product { bias, out, then, .. } = self.product;
        bias.is_some() || *out != DType::F32 || !matches!(then, Then::Nothing)
    }

    /// The low-rank term with room for its rows.
    fn term(&self) -> Option<Term<'a>> {
        let of = self.product.then.term()?;
        let kernel = Kernel::best(of.compute);
        assert!(kernel.rows == self.kernel.rows && kernel.columns == self.kernel.columns, "one tile for both products");
        Some(Term { of, kernel, a: Buffer::unset(self.panels() * kernel.rows * kernel.units(of.rank)) })
    }

    /// The depth in parts of [`depth_block`]; one empty part if there is none, which stores zeros.
    fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let (depth, part) = (self.depth, depth_block(self.product) / self.kernel.per_unit);
        (0..depth.div_ceil(part.max(1)).max(1)).map(move |i| part * i..(part * (i + 1)).min(depth))
    }
}

/// Elements of depth that are summed in one chain before they are added to what is there.
fn depth_block(product: &Product<'_>) -> usize {
    match product.compute {
        Compute::F32 | Compute::Tf32 => mkl_block(product.k),
        Compute::Bf16 | Compute::F16 => onednn_block(product),
    }
}

/// MKL's sgemm: 192, or two halves of less than twice that (found from outside, on its AVX-512 kernels: an LCA of two
/// terms, masked by large ones, spans the sums that meet there).
pub fn mkl_block(k: usize) -> usize {
    if k > 192 { 192.min(k / 2) } else { k }
}

/// oneDNN (brgemm_matmul_utils.cpp, `compute_blocking_heuristic_avx512`): 512, and 1024 for more depth unless the first
/// operand is transposed, as in the gradient of a weight.
fn onednn_block(product: &Product<'_>) -> usize {
    let transposed = product.a.depth != 1;
    if product.k > 1024 && !transposed { 1024 } else { 512 }
}

/// A low-rank term, its rows packed.
struct Term<'a> {
    of: &'a LowRank<'a>,
    kernel: Kernel,
    a: Buffer,
}

impl Term<'_> {
    fn units(&self) -> usize {
        self.kernel.units(self.of.rank)
    }
    /// Lays out the columns `lanes`, at most [`COLUMNS`], in panels.
    fn pack_columns(&self, lanes: Range<usize>, packed: &mut [u32]) {
        let width = self.kernel.columns;
        let out = &mut packed[..lanes.len().div_ceil(width) * width * self.units()];
        pack::pack(&self.of.b, lanes, 0..self.of.rank, width, &self.kernel, out);
    }
}

/// One task: rows × columns of C, which starts at `start` of its slice, over the whole depth.
fn block(
    plan: &Plan<'_>,
    (packed_a, term): (&[u32], Option<&Term<'_>>),
    rows: Range<usize>,
    columns: Range<usize>,
    (c, start): (&Shared<'_>, usize),
) {
    let kernel = plan.kernel;
    let most = plan.parts().map(|part| part.len()).max().unwrap_or(0);
    let width = COLUMNS.min(columns.len().next_multiple_of(kernel.columns));
    let (mut packed_b, mut term_b) = (Buffer::unset(width * most), Buffer::unset(width * term.map_or(0, Term::units)));
    let packed_b: &mut [u32] = bytemuck::cast_slice_mut(&mut packed_b);
    let term_b: &mut [u32] = bytemuck::cast_slice_mut(&mut term_b);
    let mut scratch = kernel::Scratch::new();
    for first_column in columns.clone().step_by(COLUMNS) {
        let lanes = first_column..(first_column + COLUMNS).min(columns.end);
        if let Some(term) = term {
            term.pack_columns(lanes.clone(), term_b);
        }
        for part in plan.parts() {
            let units = part.len();
            let elements = part.start * kernel.per_unit..(part.end * kernel.per_unit).min(plan.product.k);
            let tiles = || lanes.clone().step_by(kernel.columns).enumerate();
            let panels = lanes.len().div_ceil(kernel.columns);
            let out = &mut packed_b[..panels * kernel.columns * units];
            pack::pack(plan.b, lanes.clone(), elements, kernel.columns, kernel, out);
            let finishes = part.end == plan.depth && plan.finishes();
            for row in rows.clone().step_by(kernel.rows) {
                let a = &packed_a[row * plan.depth + part.start * kernel.rows..][..units * kernel.rows];
                for (panel, column) in tiles() {
                    let tile = kernel::Tile {
                        c,
                        at: start + row * plan.strides.0 + column * plan.strides.1,
                        strides: plan.strides,
                        rows: kernel.rows.min(rows.end - row),
                        columns: kernel.columns.min(lanes.end - column),
                    };
                    let b = &packed_b[panel * kernel.columns * units..][..kernel.columns * units];
                    let term = term.map(|term| {
                        let (units, all) = (term.units(), bytemuck::cast_slice(&term.a));
                        let (a, b) =
                            (&all[row * units..][..units * kernel.rows], &term_b[panel * kernel.columns * units..]);
                        (&term.kernel, a, &b[..kernel.columns * units])
                    });
                    let finish = finish::Finish {
                        bias: plan.product.bias.map(|bias| &bias[column..column + tile.columns]),
                        out: plan.product.out,
                        then: &plan.product.then,
                        term,
                    };
                    kernel.tile((a, b), &tile, part.start > 0, finishes.then_some(&finish), &mut scratch);
                }
                let end = (row + kernel.rows).min(rows.end);
                if let Some(cells) = plan.product.cells
                    && part.end == plan.depth
                    && (end == rows.end || end.is_multiple_of(kernel.rows * PANELS))
                {
                    cells.measure(end, lanes.clone(), |rows, columns| kernel::Tile {
                        c,
                        at: start + rows.start * plan.strides.0 + columns.start,
                        strides: plan.strides,
                        rows: rows.len(),
                        columns: columns.len(),
                    });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
