//! Statistics of a tensor, where they were not taken as it was written (`meter`), and norms as PyTorch reports them.

use super::math::VectorNorm;
use super::simd::vectorised;
use super::values::{Elements, elements, expect_offsets};
use super::{CpuDevice, measure};
use crate::Result;
use crate::device::{DType, Statistics, Storage, Tensor};

/// Elements a piece: counts of a piece fit u32 lanes, its second pass finds it in the cache, and taking the next one
/// costs little beside it.
const PIECE: usize = 1 << 14;

impl CpuDevice {
    pub(super) fn statistics_impl(&self, x: &Tensor, units: &[usize], target: DType) -> Result<Vec<Statistics>> {
        expect_offsets(units, x.rows(), "statistics")?;
        if let Storage::Cpu(buffer) = &x.storage
            && let Some(known) = buffer.measured().and_then(|measured| measured.of(x, units, target))
        {
            return Ok(known.to_vec());
        }
        let source = elements(x)?;
        let pieces = pieces(units, x.columns());
        let parts = self.workers.map(pieces.len(), x.elements(), |i| {
            let (_, at, n) = pieces[i];
            with_values(&source, at, n, |values| measure::of_run(values, x.dtype, target))
        });
        let parts = pieces.iter().zip(&parts).map(|(&(unit, ..), part)| (unit, part));
        Ok(measure::merged(units.len() - 1, parts))
    }

    pub(super) fn norms_impl(&self, x: &Tensor, units: &[usize]) -> Result<Vec<(f32, u64)>> {
        expect_offsets(units, x.rows(), "norms")?;
        let source = elements(x)?;
        Ok(self.workers.map(units.len() - 1, x.elements(), |unit| {
            let (mut at, end) = (units[unit] * x.columns(), units[unit + 1] * x.columns());
            let (mut norm, mut nonfinite) = (VectorNorm::default(), 0);
            while at < end {
                let n = PIECE.min(end - at);
                nonfinite += with_values(&source, at, n, |values| {
                    vectorised(
                        #[inline(always)]
                        || {
                            norm.add(values);
                            values.iter().map(|x| u64::from(!x.is_finite())).sum::<u64>()
                        },
                    )
                });
                at += n;
            }
            (norm.finish(), nonfinite)
        }))
    }
}

/// (unit, first element, elements) of each piece, in order; pieces do not straddle units.
fn pieces(units: &[usize], columns: usize) -> Vec<(usize, usize, usize)> {
    let mut pieces = Vec::new();
    for (unit, pair) in units.windows(2).enumerate() {
        let (mut at, end) = (pair[0] * columns, pair[1] * columns);
        while at < end {
            let n = PIECE.min(end - at);
            pieces.push((unit, at, n));
            at += n;
        }
    }
    pieces
}

/// Shows `f` at most [`PIECE`] elements as f32: in place where they are, else a copy.
fn with_values<R>(source: &Elements<'_>, at: usize, n: usize, f: impl FnOnce(&[f32]) -> R) -> R {
    match *source {
        Elements::Wide(values) => f(&values[at..at + n]),
        Elements::Packed(..) => {
            let mut scratch = [0f32; PIECE];
            source.read(at, &mut scratch[..n]);
            f(&scratch[..n])
        }
    }
}
