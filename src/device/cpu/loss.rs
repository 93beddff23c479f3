//! Cross-entropy on logits rows and its gradient: log_softmax and NLL in f32 (contract 4.3).

use std::sync::atomic::{AtomicU32, Ordering};

use super::rounding::{Round, with_round};
use super::simd::vectorised;
use super::values::{expect, owned, tensor};
use super::{CpuDevice, math};
use crate::Result;
use crate::device::Tensor;

impl CpuDevice {
    pub(super) fn cross_entropy_impl(
        &self,
        logits: Tensor,
        labels: &[u32],
        seed: &[f32],
    ) -> Result<(Vec<f32>, Tensor)> {
        let (rows, vocabulary) = (logits.rows(), logits.columns());
        expect(labels.len() == rows && seed.len() == rows && vocabulary > 0, "cross_entropy", || {
            format!("logits {:?}, {} labels, {} seeds", logits.shape, labels.len(), seed.len())
        })?;
        for &label in labels {
            expect((label as usize) < vocabulary, "cross_entropy", || format!("label {label} of {vocabulary}"))?;
        }
        let (shape, dtype) = (logits.shape.clone(), logits.dtype);
        // Bits of each row's.
        let losses: Vec<AtomicU32> = (0..rows).map(|_| AtomicU32::default()).collect();
        let mut gradient = owned(logits)?;
        with_round!(dtype, round => {
            self.fill(&mut gradient, (&shape, dtype), vocabulary, 10, |first, gradient| {
                for (row, d) in (first..).zip(gradient.chunks_exact_mut(vocabulary)) {
                    let loss = vectorised(#[inline(always)] || one_row(d, labels[row] as usize, seed[row], round));
                    losses[row].store(loss.to_bits(), Ordering::Relaxed);
                }
            });
        });
        let losses = losses.into_iter().map(|bits| f32::from_bits(bits.into_inner())).collect();
        Ok((losses, tensor(gradient, shape, dtype)))
    }
}

/// Loss of one row; `row` comes in as logits and goes out as (softmax − one-hot)·seed.
/// aten's order: log p = (x − max) − log Σ e^(x − max); gradient = g − e^(log p)·Σg with g = −seed at the label.
#[inline(always)]
fn one_row(row: &mut [f32], label: usize, seed: f32, round: impl Round) -> f32 {
    let max = math::max(row);
    let sum = math::sum([row], |[x]| math::exp(x - max));
    let log_sum = math::ln(sum);
    let log_p = (row[label] - max) - log_sum;
    for x in row.iter_mut() {
        *x = round.apply(math::exp((*x - max) - log_sum) * seed);
    }
    // The compiler of PyTorch contracts g − e^(log p)·Σg to one multiply-add.
    row[label] = round.apply(math::exp(log_p).mul_add(seed, -seed));
    -log_p
}
