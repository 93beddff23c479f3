//! Sums of rows for checksums, in place and on every thread.

use super::CpuDevice;
use super::simd::vectorised;
use super::values::{Elements, elements};
use crate::Result;
use crate::device::Tensor;
use crate::device::checks::{Weights, row_check};

/// Rows a task.
const ROWS: usize = 16;

impl CpuDevice {
    pub(super) fn row_checks_impl(&self, x: &Tensor, weights: Option<Weights<'_>>) -> Result<Vec<(f64, f64)>> {
        let source = elements(x)?;
        let columns = x.columns().max(1);
        let tasks = x.rows().div_ceil(ROWS);
        let parts = self.workers.map(tasks, x.elements(), |task| {
            let rows = task * ROWS..x.rows().min((task + 1) * ROWS);
            let mut scratch = vec![0f32; if matches!(source, Elements::Wide(_)) { 0 } else { columns }];
            let mut sums = Vec::with_capacity(rows.len());
            for at in rows.map(|r| r * columns) {
                let row = match source {
                    Elements::Wide(values) => &values[at..at + columns],
                    packed @ Elements::Packed(..) => {
                        packed.read(at, &mut scratch);
                        &scratch
                    }
                };
                sums.push(vectorised(
                    #[inline(always)]
                    || row_check(row, weights),
                ));
            }
            sums
        });
        Ok(parts.concat())
    }
}
