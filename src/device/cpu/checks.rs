//! Sums of rows and columns for checksums, in place and on every thread.

use super::CpuDevice;
use super::simd::vectorised;
use super::values::{Elements, elements, expect_offsets};
use crate::Result;
use crate::device::checks::{Sums, Weights, add_columns, of_row};
use crate::device::{Offsets, Tensor};

/// Rows a task.
const ROWS: usize = 64;
/// Rows a task where columns are added: partial sums of each are kept.
const TALL: usize = 512;

impl CpuDevice {
    pub(super) fn row_checks_impl(&self, x: &Tensor, weights: &[Weights<'_>]) -> Result<Vec<Sums>> {
        let source = elements(x)?;
        let columns = x.columns().max(1);
        let tasks = x.rows().div_ceil(ROWS);
        let parts = self.workers.map(tasks, x.elements() * weights.len(), |task| {
            let rows = task * ROWS..x.rows().min((task + 1) * ROWS);
            let mut scratch = Vec::new();
            let mut parts = vec![Sums::default(); weights.len()];
            for at in rows.map(|r| r * columns) {
                let row = run(source, at..at + columns, &mut scratch);
                for (part, weights) in parts.iter_mut().zip(weights) {
                    let (sum, size) = vectorised(
                        #[inline(always)]
                        || of_row(row, *weights),
                    );
                    part.sums.push(sum);
                    part.sizes.push(size);
                }
            }
            parts
        });
        let mut all = vec![Sums::default(); weights.len()];
        for part in parts {
            for (all, mut part) in all.iter_mut().zip(part) {
                all.sums.append(&mut part.sums);
                all.sizes.append(&mut part.sizes);
            }
        }
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
            let mut part = Sums { sums: vec![0.0; columns], sizes: vec![0.0; columns] };
            vectorised(
                #[inline(always)]
                || add_columns(values, &mut part.sums, &mut part.sizes),
            );
            part
        });
        let length = (units.len() - 1) * columns;
        let mut all = Sums { sums: vec![0.0; length], sizes: vec![0.0; length] };
        for ((unit, _), part) in tasks.iter().zip(parts) {
            let to = unit * columns..(unit + 1) * columns;
            all.sums[to.clone()].iter_mut().zip(part.sums).for_each(|(total, x)| *total += x);
            all.sizes[to].iter_mut().zip(part.sizes).for_each(|(total, x)| *total += x);
        }
        Ok(all)
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
