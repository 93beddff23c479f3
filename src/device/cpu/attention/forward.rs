//! Attention, forward: one task.

use super::combine::{Transposed, combine};
use super::{Head, KEYS, Plan, output_dtype};
use crate::device::Compute;
use crate::device::cpu::math;
use crate::device::cpu::rounding::{self, round_operand};
use crate::device::cpu::simd::vectorised;
use crate::device::cpu::threads::Shared;

/// Writes the rows of o and lse that belong to (first row of the sequence, key/value head).
pub fn task(plan: &Plan<'_>, head: &Head, (first, kv): (usize, usize), (o, lse): (&Shared<'_>, &Shared<'_>)) {
    let hd = plan.shape.head_dim;
    let keys = Transposed::new(&head.k, head.length);
    let mut scores = vec![0f32; KEYS];
    for h in 0..plan.group {
        for i in 0..head.length {
            let at = (first + i) * plan.shape.heads + kv * plan.group + h;
            // SAFETY: row and head belong to this task alone.
            let (o, lse) = unsafe { (o.slice(at * hd, hd), lse.slice(at, 1)) };
            let q = &head.q[(h * head.length + i) * hd..][..hd];
            lse[0] = vectorised(
                #[inline(always)]
                || row(plan, (&keys, &head.v), i, q, &mut scores, o),
            );
        }
    }
}

/// One query row: writes its rounded output, returns its log-sum-exp.
#[inline(always)]
fn row(
    plan: &Plan<'_>,
    (keys, v): (&Transposed, &[f32]),
    i: usize,
    q: &[f32],
    scores: &mut [f32],
    o: &mut [f32],
) -> f32 {
    let hd = o.len();
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0f32);
    let mut first = plan.first_key(i);
    o.fill(0.0);
    while first <= i {
        let end = (first / KEYS * KEYS + KEYS).min(i + 1);
        keys.dot(q, first, end - first, scores);
        let s = &mut scores[..end - first];
        for s in s.iter_mut() {
            *s *= plan.shape.scale;
        }
        let highest = math::max(s);
        let new_max = if highest > max || highest.is_nan() { highest } else { max };
        if matches!(plan.compute, Compute::Bf16 | Compute::F16) {
            s.iter_mut().for_each(|s| *s = math::exp_flash_half(*s - new_max));
        } else {
            s.iter_mut().for_each(|s| *s = math::exp_flash(*s - new_max));
        }
        let rescale = if max == f32::NEG_INFINITY { 0.0 } else { math::exp(max - new_max) };
        sum = sum * rescale + math::sum([s], |[s]| s);
        for o in o.iter_mut() {
            *o *= rescale;
        }
        round_operand(s, plan.compute);
        combine(|j| s[j], s.len(), &v[first * hd..], hd, o);
        max = new_max;
        first = end;
    }
    for o in o.iter_mut() {
        *o /= sum;
    }
    rounding::round_slice(o, output_dtype(plan.compute));
    max + sum.ln()
}
