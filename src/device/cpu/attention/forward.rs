//! Attention, forward: one task.

use super::combine::{Order, Terms, Transposed, combine};
use super::{Head, KEYS, Plan, output_dtype};
use crate::device::Compute;
use crate::device::cpu::math::{self, LANES};
use crate::device::cpu::rounding::{self, round_operand};
use crate::device::cpu::simd::vectorised;
use crate::device::cpu::threads::Shared;

/// Writes the rows of o and lse that belong to a sequence and key/value head.
pub fn task(plan: &Plan<'_>, head: &Head, task: usize, (o, lse): (&Shared<'_>, &Shared<'_>)) {
    let hd = plan.shape.head_dim;
    let (first, _, kv) = plan.task(task);
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
                || row(plan, (&keys, &head.v), (task, i), q, &mut scores, o),
            );
        }
    }
}

/// One query row: writes its rounded output, returns its log-sum-exp.
#[inline(always)]
fn row(
    plan: &Plan<'_>,
    (keys, v): (&Transposed, &[f32]),
    (task, i): (usize, usize),
    q: &[f32],
    scores: &mut [f32],
    o: &mut [f32],
) -> f32 {
    let hd = o.len();
    let padded = plan.padded(task);
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0f32);
    let mut first = plan.first_key(i);
    o.fill(0.0);
    while first <= i {
        let block = first / KEYS * KEYS;
        let end = (block + KEYS).min(i + 1);
        // Lanes count from the block's first key, seen or not.
        let hidden = (first - block) % LANES;
        keys.dot(q, first - hidden, end - first + hidden, scores);
        let s = &mut scores[..end - first + hidden];
        for s in s.iter_mut() {
            *s *= plan.shape.scale;
        }
        s[..hidden].fill(f32::NEG_INFINITY);
        let highest = math::max(s);
        let new_max = if highest > max || highest.is_nan() { highest } else { max };
        // Whole registers of the padded block; what is left of it is computed one by one.
        let whole = block + (padded - block).min(KEYS) / LANES * LANES;
        let part = exponentials(s, (whole + hidden).saturating_sub(first), new_max, plan.compute);
        // Once a block PyTorch takes the C library's exponential of an f32, and its compiler fuses what follows.
        let rescale = if max == f32::NEG_INFINITY { 0.0 } else { (max - new_max).exp() };
        sum = rescale.mul_add(sum, part);
        for o in o.iter_mut() {
            *o *= rescale;
        }
        let s = &mut s[hidden..];
        round_operand(s, plan.compute);
        let order = Order::mkl(plan.block_keys(task, block), first - block);
        let terms = Terms { weight: |j: usize| s[j], count: s.len(), order };
        combine(terms, &v[first * hd..], hd, o);
        max = new_max;
        first = end;
    }
    let reciprocal = 1.0 / sum;
    for o in o.iter_mut() {
        *o *= reciprocal;
    }
    rounding::round_slice(o, output_dtype(plan.compute));
    max + sum.ln()
}

/// s ← e^(s − max), and their sum: approximated in the first `whole` elements as PyTorch's vectors are (sums in
/// [`LANES`] lanes, for half formats in two such registers), exact in the rest, which PyTorch leaves to the C library's
/// `exp` of doubles (added one after another).
#[inline(always)]
fn exponentials(s: &mut [f32], whole: usize, max: f32, compute: Compute) -> f32 {
    let (vectors, rest) = s.split_at_mut(whole.min(s.len()));
    let sum = if matches!(compute, Compute::Bf16 | Compute::F16) {
        vectors.iter_mut().for_each(|s| *s = math::exp_flash_half(*s - max));
        math::sum_in_lanes::<{ 2 * LANES }, 1>([&*vectors], |[s]| s)
    } else {
        vectors.iter_mut().for_each(|s| *s = math::exp_flash(*s - max));
        math::sum([&*vectors], |[s]| s)
    };
    rest.iter_mut().for_each(|s| *s = f64::from(*s - max).exp() as f32);
    rest.iter().fold(sum, |sum, s| sum + s)
}
