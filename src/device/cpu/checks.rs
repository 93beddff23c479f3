//! Sums of rows and columns for checksums, in place and on every thread.

use std::cell::RefCell;
use std::sync::Arc;

use super::CpuDevice;
use super::simd::vectorised;
use super::threads::Shared;
use super::values::{Elements, elements, expect_offsets};
use crate::Result;
use crate::device::checks::{Expect, Sums, Weights, add_columns, of_row};
use crate::device::{Offsets, Tensor};

/// What a task costs, in elements: a few microseconds.
const TASK: usize = 1 << 15;
/// What a row costs beside its elements, in elements: its sums are folded and stored.
const ROW: usize = 64;
/// Rows a task where columns are added: partial sums of each are kept.
const TALL: usize = 512;

thread_local! {
    static EXPECTED: RefCell<Option<Expect>> = const { RefCell::new(None) };
}

/// See [`crate::device::Device::expect_sums`].
pub fn expect(sums: Option<Expect>) {
    EXPECTED.replace(sums);
}

/// Whether checksums of this thread's products are expected, and what is known of the right operand.
pub fn expected() -> Option<Option<Arc<Sums>>> {
    EXPECTED.with_borrow(|expected| expected.as_ref().map(|expected| expected.weight.clone()))
}

impl CpuDevice {
    pub(super) fn row_checks_impl(&self, x: &Tensor, weights: &[Weights<'_>]) -> Result<Vec<Sums>> {
        let source = elements(x)?;
        let columns = x.columns().max(1);
        let a_task = (TASK / (columns + ROW)).max(1);
        let work = x.rows() * (columns + ROW) * weights.len();
        let mut all = vec![Sums::zeros(x.rows()); weights.len()];
        let places: Vec<_> =
            all.iter_mut().map(|all| (Shared::new(&mut all.sums), Shared::new(&mut all.sizes))).collect();
        self.workers.each(x.rows().div_ceil(a_task), work, |task| {
            let rows = task * a_task..x.rows().min((task + 1) * a_task);
            let mut scratch = Vec::new();
            let values = run(source, rows.start * columns..rows.end * columns, &mut scratch);
            for ((sums, sizes), weights) in places.iter().zip(weights) {
                // SAFETY: every row belongs to one task.
                let (sums, sizes) =
                    unsafe { (sums.slice(rows.start, rows.len()), sizes.slice(rows.start, rows.len())) };
                vectorised(
                    #[inline(always)]
                    || {
                        for ((row, sum), size) in values.chunks_exact(columns).zip(sums).zip(sizes) {
                            let (x, magnitude) = of_row(row, *weights);
                            (*sum, *size) = (x as f32, magnitude as f32);
                        }
                    },
                );
            }
        });
        Ok(all)
    }

    pub(super) fn column_checks_impl(&self, x: &Tensor, units: Offsets<'_>) -> Result<Sums> {
        expect_offsets(units, x.rows(), "column_checks")?;
        let source = elements(x)?;
        let columns = x.columns().max(1);
        let tasks: Vec<(usize, std::ops::Range<usize>)> = units
            .windows(2)
            .enumerate()
            .flat_map(|(unit, rows)| {
                let end = rows[1];
                (rows[0]..end).step_by(TALL).map(move |row| (unit, row..end.min(row + TALL)))
            })
            .collect();
        let parts = self.workers.map(tasks.len(), x.elements(), |task| {
            let rows = tasks[task].1.clone();
            let mut scratch = Vec::new();
            let values = run(source, rows.start * columns..rows.end * columns, &mut scratch);
            let mut part = (vec![0f64; columns], vec![0f64; columns]);
            vectorised(
                #[inline(always)]
                || add_columns(values, &mut part.0, &mut part.1),
            );
            part
        });
        let zeros = || vec![0f64; (units.len() - 1) * columns];
        let (mut sums, mut sizes) = (zeros(), zeros());
        for ((unit, _), part) in tasks.iter().zip(parts) {
            let to = unit * columns..(unit + 1) * columns;
            sums[to.clone()].iter_mut().zip(part.0).for_each(|(total, x)| *total += x);
            sizes[to].iter_mut().zip(part.1).for_each(|(total, x)| *total += x);
        }
        let narrow = |all: Vec<f64>| all.into_iter().map(|x| x as f32).collect();
        Ok(Sums { sums: narrow(sums), sizes: narrow(sizes) })
    }
}

/// Elements `range`, copied to `scratch` where they lie in a file.
fn run<'a>(source: Elements<'a>, range: std::ops::Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
    match source {
        Elements::Wide(values) => &values[range],
        packed => {
            scratch.resize(range.len(), 0.0);
            packed.read(range.start, scratch);
            scratch
        }
    }
}
