//! Sums of rows and columns, for checksums of products: f32 in as many running sums as a processor keeps in registers,
//! blocks of them in f64, their total as f32 again, always in the same order. [`roundings`] says what that costs in
//! accuracy. [`ProductSums`] are those that a device takes of a product while it computes it.

use std::sync::Arc;

use super::Offsets;
use super::cpu::Buffer;

/// What a row's elements are multiplied with before they are added.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'w> {
    Ones,
    /// Factors of the elements, and of their magnitudes.
    Of(&'w [f32], &'w [f32]),
}

impl Sums {
    pub fn zeros(length: usize) -> Self {
        Self { sums: vec![0.0; length], sizes: vec![0.0; length] }
    }

    pub fn view(&self) -> View<'_> {
        View { sums: &self.sums, sizes: &self.sizes }
    }

    /// As factors of another matrix's elements.
    pub fn weights(&self) -> Weights<'_> {
        Weights::Of(&self.sums, &self.sizes)
    }

    /// Puts others behind them.
    pub fn append(&mut self, other: &Self) {
        self.sums.extend_from_slice(&other.sums);
        self.sizes.extend_from_slice(&other.sizes);
    }
}

impl Weights<'_> {
    /// Those of the elements from `at` on.
    #[inline(always)]
    fn from(self, at: usize) -> Self {
        match self {
            Weights::Ones => Weights::Ones,
            Weights::Of(w, a) => Weights::Of(&w[at..], &a[at..]),
        }
    }
}

/// Σ x·w and Σ |x|·a of each row or column.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sums {
    pub sums: Vec<f32>,
    pub sizes: Vec<f32>,
}

/// That the checksums of a product will be asked for.
#[derive(Debug, Clone, Default)]
pub struct Expect {
    /// Sums of the right operand over the result's columns, where they are known; they may be older than the operand.
    pub weight: Option<Arc<Sums>>,
}

/// What a device sums of a product while it computes it: of each row of the result; of a weight's gradient of each column
/// of each unit, or of each row, whichever are more.
#[derive(Debug)]
pub struct ProductSums {
    /// [the result as it is stored, what the operands of the main product say, of the low-rank term before it is scaled]
    /// [Σ x, Σ |x|, or for operands what that is at most] [n].
    all: Buffer,
    n: usize,
    /// Elements of each sum of the result.
    pub length: usize,
}

impl ProductSums {
    /// n sums of so many elements, of a product with a low-rank term or without; all are still to be written.
    pub fn unset(n: usize, length: usize, term: bool) -> Self {
        Self { all: Buffer::unset(if term { 6 * n } else { 4 * n }), n, length }
    }

    pub fn got(&self) -> View<'_> {
        self.view(0)
    }
    pub fn main(&self) -> View<'_> {
        self.view(1)
    }
    pub fn branch(&self) -> Option<View<'_>> {
        (self.all.len() > 4 * self.n).then(|| self.view(2))
    }

    fn view(&self, which: usize) -> View<'_> {
        let (sums, sizes) = self.all[2 * which * self.n..2 * (which + 1) * self.n].split_at(self.n);
        View { sums, sizes }
    }

    /// Each of the above, to be written: Σ x and Σ |x|.
    pub fn places(&mut self) -> impl Iterator<Item = (&mut [f32], &mut [f32])> {
        let n = self.n;
        self.all.chunks_mut((2 * n).max(1)).map(move |both| both.split_at_mut(n))
    }
}

/// Borrowed [`Sums`].
#[derive(Debug, Clone, Copy)]
pub struct View<'s> {
    pub sums: &'s [f32],
    pub sizes: &'s [f32],
}

/// Running sums of a row.
const LANES: usize = 32;
/// Elements of a row, and rows of a column, that are added in f32.
const BLOCK: usize = 4096;
pub const DEEP: usize = 64;
/// Elements of a product's row that are summed where they are computed; these sums are added in f32.
pub const RUN: usize = 256;

/// f32 roundings that a term of a sum of `terms` undergoes at most: the longest chain, and the fold of [`LANES`] to 8; or a
/// run's, [`LANES`] folded to one, and the chain of runs.
pub fn roundings(terms: usize) -> usize {
    let chain = terms.min(BLOCK).div_ceil(LANES).max(DEEP.min(terms)) + 2;
    chain.max((terms.min(RUN).div_ceil(LANES) + 5 + terms.div_ceil(RUN)).min(terms))
}

/// The sums of one row.
#[inline(always)]
pub fn of_row(row: &[f32], weights: Weights<'_>) -> (f64, f64) {
    let whole = row.len() / LANES * LANES;
    let (mut sum, mut size) = few(&row[whole..], weights.from(whole));
    for from in (0..whole).step_by(BLOCK) {
        let block = from..whole.min(from + BLOCK);
        let part = match weights {
            Weights::Ones => ones(&row[block]),
            Weights::Of(w, a) => weighted(&row[block.clone()], &w[block.clone()], &a[block]),
        };
        sum += part.0;
        size += part.1;
    }
    (sum, size)
}

/// What is too short for lanes.
#[inline(always)]
fn few(row: &[f32], weights: Weights<'_>) -> (f64, f64) {
    let wide = |x: &f32| f64::from(*x);
    match weights {
        Weights::Ones => (row.iter().map(wide).sum(), row.iter().map(|x| wide(x).abs()).sum()),
        Weights::Of(w, a) => (
            row.iter().zip(w).map(|(x, w)| wide(x) * wide(w)).sum(),
            row.iter().zip(a).map(|(x, a)| wide(x).abs() * wide(a)).sum(),
        ),
    }
}

/// Elements are copied before they are added, and lanes only whole: else the compiler keeps the running sums in memory
/// and stores them at every turn, which takes three times as long.
#[inline(always)]
fn ones(row: &[f32]) -> (f64, f64) {
    let (mut sum, mut size) = ([0f32; LANES], [0f32; LANES]);
    for &x in row.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            sum[lane] += x[lane];
            size[lane] += x[lane].abs();
        }
    }
    (fold(&sum), fold(&size))
}

/// As [`ones`].
#[inline(always)]
fn weighted(row: &[f32], w: &[f32], a: &[f32]) -> (f64, f64) {
    let (mut sum, mut size) = ([0f32; LANES], [0f32; LANES]);
    let (x, w, a) = (row.as_chunks::<LANES>().0, w.as_chunks::<LANES>().0, a.as_chunks::<LANES>().0);
    for ((&x, &w), &a) in x.iter().zip(w).zip(a) {
        for lane in 0..LANES {
            sum[lane] = x[lane].mul_add(w[lane], sum[lane]);
            size[lane] = x[lane].abs().mul_add(a[lane], size[lane]);
        }
    }
    (fold(&sum), fold(&size))
}

#[inline(always)]
fn fold(lanes: &[f32; LANES]) -> f64 {
    let eight: [f64; 8] =
        std::array::from_fn(|i| f64::from((lanes[i] + lanes[i + 8]) + (lanes[i + 16] + lanes[i + 24])));
    let four: [f64; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// Adds Σ x and Σ |x| of each column of whole rows to `sums` and `sizes`, one element a column; f32 along [`DEEP`] rows.
#[inline(always)]
pub fn add_columns(values: &[f32], sums: &mut [f64], sizes: &mut [f64]) {
    let columns = sums.len().max(1);
    // Narrow rows are taken several at once, so that whole registers are added.
    let width = columns * LANES.div_ceil(columns);
    let (mut sum, mut size) = (vec![0f32; width], vec![0f32; width]);
    for block in values.chunks(width * DEEP) {
        sum.fill(0.0);
        size.fill(0.0);
        for row in block.chunks(width) {
            for ((sum, size), x) in sum.iter_mut().zip(&mut size).zip(row) {
                *sum += x;
                *size += x.abs();
            }
        }
        for (sum, size) in sum.chunks(columns).zip(size.chunks(columns)) {
            sums.iter_mut().zip(sum).for_each(|(total, x)| *total += f64::from(*x));
            sizes.iter_mut().zip(size).for_each(|(total, x)| *total += f64::from(*x));
        }
    }
}

/// Every row of `columns` elements, once per entry of `weights`.
pub fn of_rows(values: &[f32], columns: usize, weights: &[Weights<'_>]) -> Vec<Sums> {
    let narrow = |(sum, size): (f64, f64)| (sum as f32, size as f32);
    let rows =
        |weights: &Weights<'_>| values.chunks_exact(columns.max(1)).map(|row| narrow(of_row(row, *weights))).unzip();
    weights.iter().map(rows).map(|(sums, sizes)| Sums { sums, sizes }).collect()
}

/// Every column of each unit of rows: [units · columns].
pub fn of_columns(values: &[f32], columns: usize, units: Offsets<'_>) -> Sums {
    let mut all = Sums::default();
    for rows in units.windows(2) {
        let (mut sums, mut sizes) = (vec![0.0; columns], vec![0.0; columns]);
        add_columns(&values[rows[0] * columns..rows[1] * columns], &mut sums, &mut sizes);
        all.sums.extend(sums.iter().map(|x| *x as f32));
        all.sizes.extend(sizes.iter().map(|x| *x as f32));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::noise::symmetric;

    #[test]
    fn sums_of_every_length_lie_within_their_roundings() {
        for n in [0usize, 1, 7, 31, 32, 33, 576, 4096, 4097, 9000] {
            let of = |stream| (0..n as u64).map(|i| symmetric(5, stream, i)).collect::<Vec<f32>>();
            let (x, w) = (of(0), of(1));
            let a: Vec<f32> = w.iter().map(|w| w.abs()).collect();
            let exact = |weight: &dyn Fn(usize) -> f64| {
                x.iter().enumerate().map(|(i, x)| f64::from(*x) * weight(i)).sum::<f64>()
            };
            let size = |weight: &dyn Fn(usize) -> f64| {
                x.iter().enumerate().map(|(i, x)| f64::from(x.abs()) * weight(i)).sum::<f64>()
            };
            let near = |(sum, magnitude): (f64, f64), expected: (f64, f64)| {
                let bound = roundings(n) as f64 * 2f64.powi(-24) * expected.1;
                assert!((sum - expected.0).abs() <= bound, "{n}: {sum} {}", expected.0);
                assert!((magnitude - expected.1).abs() <= bound, "{n}: {magnitude} {}", expected.1);
            };
            near(of_row(&x, Weights::Ones), (exact(&|_| 1.0), size(&|_| 1.0)));
            near(of_row(&x, Weights::Of(&w, &a)), (exact(&|i| w[i].into()), size(&|i| a[i].into())));
        }
    }

    #[test]
    fn columns_are_added_unit_by_unit_at_any_width() {
        for columns in [1usize, 3, 8, 32, 50] {
            let values: Vec<f32> = (0..columns * 200).map(|i| (i % 7) as f32 - 3.0).collect();
            let found = of_columns(&values, columns, &[0, 30, 30, 200]);
            for (unit, rows) in [(0, 0..30), (1, 30..30), (2, 30..200)] {
                for column in 0..columns {
                    let of = |f: &dyn Fn(f32) -> f32| {
                        rows.clone().map(|row| f64::from(f(values[row * columns + column]))).sum::<f64>()
                    };
                    let at = unit * columns + column;
                    assert_eq!((found.sums[at], found.sizes[at]), (of(&|x| x) as f32, of(&f32::abs) as f32));
                }
            }
        }
    }
}
