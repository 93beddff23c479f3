//! Checksums of a product, taken while it is computed: the sums of its rows as they are stored, and what the operands
//! say of them, A · (B's lanes added up). A is summed where it is packed and the result while its rows lie in the cache,
//! so that nothing is read from memory for it. Where a product is computed transposed, or is a weight's gradient, the
//! same is done with columns, and with A's lanes added up.

use std::sync::Arc;

use super::Matrix;
use super::kernel::Tile;
use super::plan::Plan;
use crate::device::Compute;
use crate::device::checks::{DEEP, Factors, PartSums, Sums, Weights, add_columns, of_row};
use crate::device::cpu::checks::{self, row_sums};
use crate::device::cpu::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::simd::{Level, level};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::sums_avx512;
use crate::device::cpu::threads::Shared;
use crate::device::cpu::values::Elements;
use crate::device::cpu::{Buffer, rounding};

/// Elements that are rounded at once.
const SCRATCH: usize = 1 << 13;

/// What a product is summed with.
pub struct Checks {
    /// Whether the sums are of the plan's rows; else of its columns.
    by_rows: bool,
    /// Sums over the lanes of the operand on the other side, at each depth.
    main: Arc<Factors>,
    term: Option<Factors>,
}

impl Checks {
    /// Of a product that this thread asks for, if its checksums are expected.
    pub fn expected(plan: &Plan<'_>) -> Option<Self> {
        checks::expected().map(|weight| Self::new(plan, !plan.transposed(), weight))
    }

    /// `known`: what the sums over the lanes should be.
    pub fn new(plan: &Plan<'_>, by_rows: bool, known: Option<Arc<Factors>>) -> Self {
        let product = plan.product;
        let other = if by_rows { (plan.b, plan.n) } else { (plan.a, plan.m) };
        let main = match known {
            // Not those of another product that this one is made of.
            Some(known) if known.sums.len() == product.k => padded(known),
            _ => Arc::new(of_lanes(other, product.k, product.compute)),
        };
        // A product with a term is never computed transposed.
        let term = product.then.term().map(|term| of_lanes((&term.b, plan.n), term.rank, term.compute));
        Self { by_rows, main, term }
    }

    pub fn by_rows(&self) -> bool {
        self.by_rows
    }

    /// Sums of the product, and elements of each.
    pub fn shape(&self, plan: &Plan<'_>) -> (usize, usize) {
        if self.by_rows { (plan.m, plan.n) } else { (plan.n, plan.m) }
    }

    pub fn has_term(&self) -> bool {
        self.term.is_some()
    }
}

/// The sums of one product, or of some of its columns.
pub struct Room {
    /// The first sum.
    first: usize,
    n: usize,
    sums: PartSums,
    /// Of the result, by tasks that share its rows or columns: [shares] [Σ x, Σ |x|] [n].
    shares: Buffer,
}

impl Room {
    /// For n sums from `first` on, with or without a low-rank term.
    pub fn new(first: usize, n: usize, term: bool, shares: usize) -> Self {
        Self { first, n, sums: PartSums::zeros(n, term), shares: Buffer::unset(2 * n * shares) }
    }

    pub fn places(&mut self) -> Places<'_> {
        let mut places = self.sums.places().skip(1).map(|(sums, sizes)| (Shared::new(sums), Shared::new(sizes)));
        let (main, term) = (places.next(), places.next());
        Places { first: self.first, n: self.n, main, term, shares: Shared::new(&mut self.shares) }
    }

    /// All of them.
    pub fn finish(mut self) -> PartSums {
        if let Some((sums, sizes)) = self.sums.places().next() {
            for share in self.shares.chunks_exact((2 * self.n).max(1)) {
                let (x, magnitude) = share.split_at(self.n);
                sums.iter_mut().zip(x).for_each(|(total, x)| *total += f64::from(*x));
                sizes.iter_mut().zip(magnitude).for_each(|(total, x)| *total += f64::from(*x));
            }
        }
        self.sums
    }
}

type Place<'r> = (Shared<'r, f64>, Shared<'r, f64>);

/// A [`Room`] while tasks fill it, each its own part.
pub struct Places<'r> {
    first: usize,
    n: usize,
    main: Option<Place<'r>>,
    term: Option<Place<'r>>,
    shares: Shared<'r>,
}

/// What a task sums, and where it puts it.
#[derive(Clone, Copy)]
pub struct Summed<'a> {
    pub checks: &'a Checks,
    pub places: &'a Places<'a>,
    /// The task's share of the result's sums.
    pub share: usize,
}

/// Panels of packed lanes.
pub struct Packed<'p> {
    pub panels: &'p [u32],
    /// Lanes of a panel, and its length.
    pub width: usize,
    pub panel: usize,
}

impl Summed<'_> {
    /// Adds what `count` packed lanes from `at` on say, over the whole depth or, from `unit` on, a part of it. `term`: of the
    /// low-rank term.
    ///
    /// # Safety
    /// Each lane belongs to one task at a time.
    pub unsafe fn predict(
        &self,
        term: bool,
        (at, count): (usize, usize),
        unit: usize,
        per_unit: usize,
        packed: &Packed<'_>,
    ) {
        let (factors, to) = match (term, &self.checks.term) {
            (true, Some(term)) => (term, &self.places.term),
            _ => (&*self.checks.main, &self.places.main),
        };
        let Some(to) = to else { return };
        let depth = unit * per_unit..;
        let factors = (&factors.sums[depth.clone()], &factors.sizes[depth]);
        let at = at - self.places.first;
        // SAFETY: the caller's promise.
        let (sums, sizes) = unsafe { (to.0.slice(at, count), to.1.slice(at, count)) };
        let places = sums.chunks_mut(packed.width).zip(sizes.chunks_mut(packed.width));
        for (panel, (sums, sizes)) in packed.panels.chunks_exact(packed.panel.max(1)).zip(places) {
            panel_sums_of((packed.width, per_unit), panel, factors, (sums, sizes));
        }
    }

    /// Sums a tile of the result that is written whole and begins at this row and column. `first`: of all that this task
    /// writes to the rows, or columns where those are summed.
    ///
    /// # Safety
    /// Each row, or column, of a share belongs to one task at a time.
    pub unsafe fn add(&self, tile: &Tile<'_>, (row, column): (usize, usize), first: bool) {
        let by_rows = self.checks.by_rows;
        let (at, count) = if by_rows { (row, tile.rows) } else { (column, tile.columns) };
        let n = self.places.n;
        let at = 2 * n * self.share + at - self.places.first;
        // SAFETY: the caller's promise.
        let (sums, sizes) = unsafe { (self.places.shares.slice(at, count), self.places.shares.slice(at + n, count)) };
        if first {
            sums.fill(0.0);
            sizes.fill(0.0);
        }
        match (by_rows, tile.strides.1 == 1) {
            (true, _) => add_runs(|row| tile.row(row), sums, sizes),
            (false, false) => add_runs(|column| tile.column(column), sums, sizes),
            (false, true) => vectorised(
                #[inline(always)]
                || {
                    for row in 0..tile.rows {
                        for ((sum, size), x) in sums.iter_mut().zip(&mut *sizes).zip(&*tile.row(row)) {
                            *sum += *x;
                            *size += x.abs();
                        }
                    }
                },
            ),
        }
    }
}

/// Adds Σ x and Σ |x| of each run of elements that lie together.
fn add_runs<'r>(run: impl Fn(usize) -> &'r mut [f32], sums: &mut [f32], sizes: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 {
        // SAFETY: the processor has AVX-512.
        return unsafe { sums_avx512::add_runs(run, sums, sizes) };
    }
    vectorised(
        #[inline(always)]
        || {
            for (i, (sum, size)) in sums.iter_mut().zip(sizes).enumerate() {
                let (x, magnitude) = of_row(run(i), Weights::Ones);
                *sum += x as f32;
                *size += magnitude as f32;
            }
        },
    );
}

/// Adds Σ factor·x and Σ size·|x| of each lane of one panel.
fn panel_sums_of(
    (width, per_unit): (usize, usize),
    panel: &[u32],
    factors: (&[f32], &[f32]),
    to: (&mut [f64], &mut [f64]),
) {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 {
        // SAFETY: the processor has AVX-512.
        return unsafe {
            match (width, per_unit) {
                (14, 1) => sums_avx512::of_panel::<14, 1, 1>(panel, factors, to),
                (14, _) => sums_avx512::of_panel::<14, 1, 2>(panel, factors, to),
                (_, 1) => sums_avx512::of_panel::<32, 2, 1>(panel, factors, to),
                _ => sums_avx512::of_panel::<32, 2, 2>(panel, factors, to),
            }
        };
    }
    vectorised(
        #[inline(always)]
        || match width {
            16 => panel_sums::<16, 16>(panel, factors, to),
            6 => panel_sums::<6, 8>(panel, factors, to),
            _ => panel_sums::<4, 4>(panel, factors, to),
        },
    );
}

/// Of W lanes, in registers of R; chains of at most [`DEEP`] in f32. One element a unit: pairs come with AVX-512.
#[inline(always)]
fn panel_sums<const W: usize, const R: usize>(
    panel: &[u32],
    (factors, weights): (&[f32], &[f32]),
    (sums, sizes): (&mut [f64], &mut [f64]),
) {
    let chains = factors.chunks(DEEP).zip(weights.chunks(DEEP));
    for (units, (factors, weights)) in panel.chunks(DEEP * W).zip(chains) {
        let (mut sum, mut size) = ([0f32; R], [0f32; R]);
        for (i, (factor, weight)) in (0..units.len() / W).zip(factors.iter().zip(weights)) {
            let lanes = lanes_of::<_, R>(&units[i * W..]);
            for lane in 0..R {
                let x = f32::from_bits(lanes[lane]);
                sum[lane] = x.mul_add(*factor, sum[lane]);
                size[lane] = x.abs().mul_add(*weight, size[lane]);
            }
        }
        sums.iter_mut().zip(sum).for_each(|(total, x)| *total += f64::from(x));
        sizes.iter_mut().zip(size).for_each(|(total, x)| *total += f64::from(x));
    }
}

/// The first R elements, zeros past the end.
#[inline(always)]
fn lanes_of<T: Copy + Default, const R: usize>(run: &[T]) -> [T; R] {
    match run.first_chunk() {
        Some(whole) => *whole,
        None => {
            let mut padded = [T::default(); R];
            padded[..run.len()].copy_from_slice(run);
            padded
        }
    }
}

/// To whole units.
fn padded(factors: Arc<Factors>) -> Arc<Factors> {
    let length = factors.sums.len();
    if length.is_multiple_of(2) {
        return factors;
    }
    let pad = |x: &[f32]| [x, &[0.0]].concat();
    Arc::new(Factors { sums: pad(&factors.sums), sizes: pad(&factors.sizes) })
}

/// Σ x and Σ |x| over the lanes of a matrix at each depth, rounded as the product rounds it; padded to whole units.
fn of_lanes((matrix, lanes): (&Matrix<'_>, usize), depth: usize, compute: Compute) -> Factors {
    let exact = rounding::is_exact_in(matrix.dtype, compute);
    let down = matrix.depth == 1;
    // As rows of contiguous elements.
    let (rows, columns, stride) = if down { (lanes, depth, matrix.lane) } else { (depth, lanes, matrix.depth) };
    let at_once = if stride == columns { (SCRATCH / columns.max(1)).max(1) } else { 1 };
    let Sums { mut sums, mut sizes } = Sums::zeros(depth.next_multiple_of(2));
    let mut scratch = Vec::new();
    for first in (0..rows).step_by(at_once) {
        let (at, n) = (matrix.at + first * stride, at_once.min(rows - first) * columns);
        let values = match matrix.elements {
            Elements::Wide(x) if exact => &x[at..at + n],
            elements => {
                scratch.resize(n, 0.0);
                elements.read(at, &mut scratch);
                rounding::round_operand(&mut scratch, compute);
                &scratch
            }
        };
        vectorised(
            #[inline(always)]
            || {
                if down {
                    return add_columns(values, &mut sums[..columns], &mut sizes[..columns]);
                }
                let places = sums[first..].iter_mut().zip(&mut sizes[first..]);
                for (row, (sum, size)) in values.chunks_exact(columns.max(1)).zip(places) {
                    (*sum, *size) = row_sums(row);
                }
            },
        );
    }
    Sums { sums, sizes }.into()
}
