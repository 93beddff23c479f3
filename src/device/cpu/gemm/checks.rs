//! Checksums of a product, taken while it is computed: the sums of its rows as they are stored, and what the operands
//! say of them, A · (B's lanes added up). A is summed where it is packed and the result while its rows lie in the cache,
//! so that nothing is read from memory for it. Where a product is computed transposed, or is a weight's gradient, the
//! same is done with columns, and with A's lanes added up.

use std::sync::Arc;

use super::Matrix;
use super::kernel::Tile;
use super::plan::Plan;
use crate::device::Compute;
use crate::device::checks::{DEEP, ProductSums, Sums, Weights, add_columns, of_row};
use crate::device::cpu::checks;
use crate::device::cpu::simd::vectorised;
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::simd::{Level, level};
#[cfg(target_arch = "x86_64")]
use crate::device::cpu::sums_avx512;
use crate::device::cpu::threads::Shared;
use crate::device::cpu::values::Elements;
use crate::device::cpu::{Buffer, rounding};

/// Running sums of a norm.
const LANES: usize = 16;
/// Elements that are rounded at once: a part of the first-level cache.
const SCRATCH: usize = 1 << 11;

/// What a product is summed with.
pub struct Checks {
    /// Whether the sums are of the plan's rows; else of its columns.
    by_rows: bool,
    /// Sums over the lanes of the operand on the other side, at each depth.
    main: Arc<Sums>,
    term: Option<Sums>,
}

impl Checks {
    /// Of a product that this thread asks for, if its checksums are expected.
    pub fn expected(plan: &Plan<'_>) -> Option<Self> {
        checks::expected().map(|weight| Self::new(plan, !plan.transposed(), weight))
    }

    /// `known`: what the sums over the lanes should be.
    pub fn new(plan: &Plan<'_>, by_rows: bool, known: Option<Arc<Sums>>) -> Self {
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

/// Room for the sums of a product, or of several of one shape.
pub struct Room {
    sums: ProductSums,
    n: usize,
    /// Of the result, by tasks that share its rows or columns with others before them: [shares − 1] [Σ x, Σ |x|] [n].
    more: Buffer,
}

impl Room {
    /// For n sums of `length` elements each, with or without a low-rank term.
    pub fn new((n, length): (usize, usize), term: bool, shares: usize) -> Self {
        let more = Buffer::unset(2 * n * shares.saturating_sub(1));
        Self { sums: ProductSums::unset(n, length, term), n, more }
    }

    pub fn places(&mut self) -> Places<'_> {
        let mut places = self.sums.places().map(|(sums, sizes)| (Shared::new(sums), Shared::new(sizes)));
        let places = [places.next(), places.next(), places.next()];
        Places { n: self.n, places, more: Shared::new(&mut self.more) }
    }

    /// All of them.
    pub fn finish(mut self) -> ProductSums {
        if let Some((sums, sizes)) = self.sums.places().next() {
            for share in self.more.chunks_exact((2 * self.n).max(1)) {
                let (x, magnitude) = share.split_at(self.n);
                sums.iter_mut().zip(x).for_each(|(total, x)| *total += x);
                sizes.iter_mut().zip(magnitude).for_each(|(total, x)| *total += x);
            }
        }
        self.sums
    }
}

/// Σ x and Σ |x|.
type Place<'r> = (Shared<'r>, Shared<'r>);

/// A [`Room`] while tasks fill it, each its own part.
pub struct Places<'r> {
    n: usize,
    /// Of the result, the main product, the low-rank term.
    places: [Option<Place<'r>>; 3],
    more: Shared<'r>,
}

/// What a task sums, and where it puts it.
#[derive(Clone, Copy)]
pub struct Summed<'a> {
    pub checks: &'a Checks,
    pub places: &'a Places<'a>,
    /// Where the sums of the task's product begin.
    pub start: usize,
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
            (true, Some(term)) => (term, &self.places.places[2]),
            _ => (&*self.checks.main, &self.places.places[1]),
        };
        let Some(to) = to else { return };
        let depth = unit * per_unit..;
        let (sums, sizes) = (&factors.sums[depth.clone()], &factors.sizes[depth]);
        let elements = (packed.panel / packed.width.max(1) * per_unit).min(sizes.len());
        let factors = Part { sums, sizes, norm: norm(&sizes[..elements]) };
        let at = self.start + at;
        // SAFETY: the caller's promise.
        let (sums, sizes) = unsafe { (to.0.slice(at, count), to.1.slice(at, count)) };
        if unit == 0 {
            sums.fill(0.0);
            sizes.fill(0.0);
        }
        let places = sums.chunks_mut(packed.width).zip(sizes.chunks_mut(packed.width));
        for (panel, (sums, sizes)) in packed.panels.chunks_exact(packed.panel.max(1)).zip(places) {
            panel_sums_of((packed.width, per_unit), panel, &factors, (sums, sizes));
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
        let (n, at) = (self.places.n, self.start + at);
        // SAFETY: the caller's promise.
        let (sums, sizes) = match (self.share.checked_sub(1), &self.places.places[0]) {
            (None, Some(to)) => unsafe { (to.0.slice(at, count), to.1.slice(at, count)) },
            (share, _) => {
                let (at, more) = (2 * n * share.unwrap_or(0) + at, &self.places.more);
                // SAFETY: as above.
                unsafe { (more.slice(at, count), more.slice(at + n, count)) }
            }
        };
        if first {
            sums.fill(0.0);
            sizes.fill(0.0);
        }
        match (by_rows, tile.strides.1 == 1) {
            (true, _) => add_runs(|row| &*tile.row(row), sums, sizes),
            (false, false) => add_runs(|column| &*tile.column(column), sums, sizes),
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
fn add_runs<'r>(run: impl Fn(usize) -> &'r [f32], sums: &mut [f32], sizes: &mut [f32]) {
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

/// [`Sums`] of a part of the depth, and the norm of their sizes.
struct Part<'f> {
    sums: &'f [f32],
    sizes: &'f [f32],
    norm: f64,
}

/// Adds Σ factor·x and Σ size·|x|, or what that is at most, of each lane of one panel.
fn panel_sums_of((width, per_unit): (usize, usize), panel: &[u32], factors: &Part<'_>, to: (&mut [f32], &mut [f32])) {
    #[cfg(target_arch = "x86_64")]
    if level() >= Level::Avx512 {
        // SAFETY: the processor has AVX-512.
        return unsafe {
            match (width, per_unit) {
                (14, 1) => sums_avx512::of_panel::<14, 1>(panel, (factors.sums, factors.sizes), to),
                (14, _) => sums_avx512::of_pairs::<14, 1>(panel, (factors.sums, factors.norm), to),
                (_, 1) => sums_avx512::of_panel::<32, 2>(panel, (factors.sums, factors.sizes), to),
                _ => sums_avx512::of_pairs::<32, 2>(panel, (factors.sums, factors.norm), to),
            }
        };
    }
    vectorised(
        #[inline(always)]
        || match (width, (factors.sums, factors.sizes)) {
            (16, factors) => panel_sums::<16, 16>(panel, factors, to),
            (6, factors) => panel_sums::<6, 8>(panel, factors, to),
            (_, factors) => panel_sums::<4, 4>(panel, factors, to),
        },
    );
}

/// ‖x‖₂, in f64: no square is lost.
fn norm(x: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    vectorised(
        #[inline(always)]
        || {
            let (whole, rest) = x.as_chunks::<LANES>();
            for &x in whole.iter().chain(&[lanes_of(rest)]) {
                for lane in 0..LANES {
                    lanes[lane] = f64::from(x[lane]).mul_add(f64::from(x[lane]), lanes[lane]);
                }
            }
        },
    );
    lanes.iter().sum::<f64>().sqrt()
}

/// Of W lanes, in registers of R; chains of at most [`DEEP`] in f32. One element a unit: pairs come with AVX-512.
#[inline(always)]
fn panel_sums<const W: usize, const R: usize>(
    panel: &[u32],
    (factors, weights): (&[f32], &[f32]),
    (sums, sizes): (&mut [f32], &mut [f32]),
) {
    let (mut all_sums, mut all_sizes) = ([0f64; R], [0f64; R]);
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
        all_sums.iter_mut().zip(sum).for_each(|(total, x)| *total += f64::from(x));
        all_sizes.iter_mut().zip(size).for_each(|(total, x)| *total += f64::from(x));
    }
    sums.iter_mut().zip(all_sums).for_each(|(total, x)| *total += x as f32);
    sizes.iter_mut().zip(all_sizes).for_each(|(total, x)| *total += x as f32);
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
fn padded(factors: Arc<Sums>) -> Arc<Sums> {
    let length = factors.sums.len();
    if length.is_multiple_of(2) {
        return factors;
    }
    let pad = |x: &[f32]| [x, &[0.0]].concat();
    Arc::new(Sums { sums: pad(&factors.sums), sizes: pad(&factors.sizes) })
}

/// Σ x and Σ |x| over the lanes of a matrix at each depth, rounded as the product rounds it; padded to whole units.
fn of_lanes((matrix, lanes): (&Matrix<'_>, usize), depth: usize, compute: Compute) -> Sums {
    let in_place = match matrix.elements {
        Elements::Wide(x) if rounding::is_exact_in(matrix.dtype, compute) => Some(x),
        _ => None,
    };
    let down = matrix.depth == 1;
    // As rows of contiguous elements.
    let (rows, columns, stride) = if down { (lanes, depth, matrix.lane) } else { (depth, lanes, matrix.depth) };
    let at_once = if stride == columns { (SCRATCH / columns.max(1)).max(1).min(rows) } else { 1 };
    let mut all = Sums::zeros(depth.next_multiple_of(2));
    let deep = down && rows > DEEP;
    let mut wide = if deep { (vec![0f64; depth], vec![0f64; depth]) } else { Default::default() };
    let mut scratch = Buffer::unset(if in_place.is_some() { 0 } else { at_once * columns });
    for first in (0..rows).step_by(at_once.max(1)) {
        let (at, n) = (matrix.at + first * stride, at_once.min(rows - first) * columns);
        let values = match in_place {
            Some(x) => &x[at..at + n],
            None => {
                matrix.elements.read(at, &mut scratch[..n]);
                rounding::round_operand(&mut scratch[..n], compute);
                &scratch[..n]
            }
        };
        if !down {
            let run = |row: usize| &values[row * columns..(row + 1) * columns];
            let to = first..first + n / columns.max(1);
            add_runs(run, &mut all.sums[to.clone()], &mut all.sizes[to]);
            continue;
        }
        vectorised(
            #[inline(always)]
            || match deep {
                true => add_columns(values, &mut wide.0, &mut wide.1),
                false => add_few(values, &mut all.sums[..columns], &mut all.sizes[..columns]),
            },
        );
    }
    all.sums.iter_mut().zip(wide.0).for_each(|(to, x)| *to = x as f32);
    all.sizes.iter_mut().zip(wide.1).for_each(|(to, x)| *to = x as f32);
    all
}

/// Adds Σ x and Σ |x| of each column of a few rows.
#[inline(always)]
fn add_few(values: &[f32], sums: &mut [f32], sizes: &mut [f32]) {
    for row in values.chunks_exact(sums.len().max(1)) {
        for ((sum, size), x) in sums.iter_mut().zip(&mut *sizes).zip(row) {
            *sum += x;
            *size += x.abs();
        }
    }
}
