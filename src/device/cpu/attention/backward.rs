//! Attention, backward: one task.
//!
//! Blocks of queries × blocks of keys, as PyTorch's CPU kernel walks them: for half operands it keeps dq, dk, dv in
//! half between blocks, which one can see in the results, so the rounding is repeated here. Query heads that share a
//! key/value head are summed at the end (the backward of transformers' repeat_kv; its `enable_gqa`, used where a
//! batch has no padding at all, adds them in turn).

use std::ops::Range;

use super::combine::{NARROW, Transposed, combine};
use super::{Head, KEYS, Plan, output_dtype};
use crate::device::cpu::math;
use crate::device::cpu::rounding::{self, Round, round_operand, with_round};
use crate::device::cpu::simd::vectorised;
use crate::device::cpu::threads::Shared;

/// What the forward pass left and what comes from above.
pub struct Saved<'a> {
    /// [heads of the group][length][head_dim], rounded.
    pub d_o: &'a [f32],
    /// [n, heads·head_dim]
    pub o: &'a [f32],
    /// [n, heads]
    pub lse: &'a [f32],
}

/// Probabilities and score gradients of one block, [queries][stride], rounded as operands; scores of one query; one
/// sum.
struct Work {
    /// No power of two: a column's cells would all compete for the same few cache lines.
    stride: usize,
    scores: Vec<f32>,
    p: Vec<f32>,
    ds: Vec<f32>,
    sum: Vec<f32>,
}

/// Where a block lies, in rows of the sequence.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

/// Writes dq, dk, dv of (first row, length, key/value head) of a sequence padded to `padded`.
pub fn task(
    plan: &Plan<'_>,
    head: &Head,
    (first, length, kv): (usize, usize, usize),
    padded: usize,
    saved: &Saved<'_>,
    (dq, dk, dv): (&Shared<'_>, &Shared<'_>, &Shared<'_>),
) {
    let hd = plan.shape.head_dim;
    let transposed = (Transposed::new(&head.k, length), Transposed::new(&head.v, length));
    let queries = query_block(padded);
    let stride = KEYS.min(length).next_multiple_of(NARROW) + NARROW;
    let cells = || vec![0f32; queries.min(length) * stride];
    let mut work = Work { stride, scores: vec![0f32; KEYS], p: cells(), ds: cells(), sum: vec![0f32; hd] };
    let (mut dk_sum, mut dv_sum) = (vec![0f32; length * hd], vec![0f32; length * hd]);
    for h in 0..plan.group {
        let (mut dk_head, mut dv_head) = (vec![0f32; length * hd], vec![0f32; length * hd]);
        for start in (0..length).step_by(queries) {
            let queries = start..(start + queries).min(length);
            for keys in (plan.first_key(start) / KEYS * KEYS..queries.end).step_by(KEYS) {
                let block = Block { queries: queries.clone(), keys: keys..(keys + KEYS).min(queries.end) };
                for i in block.queries.clone() {
                    let at = (first + i) * plan.shape.heads + kv * plan.group + h;
                    // SAFETY: row and head belong to this task alone.
                    let dq = unsafe { dq.slice(at * hd, hd) };
                    let row = Row { i, row: h * length + i, o: &saved.o[at * hd..][..hd], lse: saved.lse[at] };
                    query(plan, head, (&transposed, saved.d_o), &block, &row, &mut work, dq);
                }
                let of_head = h * length * hd..(h + 1) * length * hd;
                let (q, d_o) = (&head.q[of_head.clone()], &saved.d_o[of_head]);
                let Work { p, ds, sum, .. } = &mut work;
                keys_of_block(plan, &block, (p, stride), (d_o, 1.0), sum, &mut dv_head);
                keys_of_block(plan, &block, (ds, stride), (q, plan.shape.scale), sum, &mut dk_head);
            }
        }
        for (sum, part) in [(&mut dk_sum, &dk_head), (&mut dv_sum, &dv_head)] {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
    }
    for i in 0..length {
        let at = ((first + i) * plan.shape.kv_heads + kv) * hd;
        // SAFETY: row and key/value head belong to this task alone.
        let (dk, dv) = unsafe { (dk.slice(at, hd), dv.slice(at, hd)) };
        dk.copy_from_slice(&dk_sum[i * hd..][..hd]);
        dv.copy_from_slice(&dv_sum[i * hd..][..hd]);
    }
}

/// Queries a block in PyTorch's CPU kernel, by the padded length of the sequence.
fn query_block(length: usize) -> usize {
    match length {
        0..192 => 32,
        192..768 => 64,
        _ => 256,
    }
}

/// One query row.
struct Row<'a> {
    /// In the sequence.
    i: usize,
    /// In the gathered heads.
    row: usize,
    o: &'a [f32],
    lse: f32,
}

/// Fills one row of `work` and adds the row's share of dq.
fn query(
    plan: &Plan<'_>,
    head: &Head,
    ((k, v), d_o): (&(Transposed, Transposed), &[f32]),
    block: &Block,
    row: &Row<'_>,
    work: &mut Work,
    dq: &mut [f32],
) {
    let hd = dq.len();
    let first = block.keys.start.max(plan.first_key(row.i));
    let end = block.keys.end.min(row.i + 1);
    if first >= end {
        return;
    }
    let (q, d_o) = (&head.q[row.row * hd..][..hd], &d_o[row.row * hd..][..hd]);
    let cells = (row.i - block.queries.start) * work.stride + (first - block.keys.start);
    let count = end - first;
    let Work { scores, p, ds, sum, .. } = work;
    vectorised(
        #[inline(always)]
        || {
            k.dot(q, first, count, scores);
            let (p, ds) = (&mut p[cells..cells + count], &mut ds[cells..cells + count]);
            for (p, s) in p.iter_mut().zip(scores.iter()) {
                *p = math::exp(*s * plan.shape.scale - row.lse);
            }
            let delta = math::sum([d_o, row.o], |[d, o]| d * o);
            v.dot(d_o, first, count, scores);
            for ((ds, &p), dp) in ds.iter_mut().zip(p.iter()).zip(scores.iter()) {
                *ds = p * (*dp - delta);
            }
            round_operand(p, plan.compute);
            round_operand(ds, plan.compute);
            sum.fill(0.0);
            combine(|j| ds[j], count, &head.k[first * hd..], hd, sum);
            for (dq, &sum) in dq.iter_mut().zip(sum.iter()) {
                *dq += plan.shape.scale * sum;
            }
        },
    );
    rounding::round_slice(dq, output_dtype(plan.compute));
}

/// total[j] = round(total[j] + scale·Σ_i weights[i][j]·rows[i]) for the keys j of a block, i over its queries.
fn keys_of_block(
    plan: &Plan<'_>,
    block: &Block,
    (weights, stride): (&[f32], usize),
    (rows, scale): (&[f32], f32),
    sum: &mut [f32],
    total: &mut [f32],
) {
    let hd = sum.len();
    with_round!(output_dtype(plan.compute), round => vectorised(
        #[inline(always)]
        || for j in block.keys.clone() {
            let last = plan.shape.window.map_or(block.queries.end, |window| block.queries.end.min(j + window));
            let first = block.queries.start.max(j);
            if first >= last {
                continue;
            }
            let weights = &weights[(first - block.queries.start) * stride + (j - block.keys.start)..];
            sum.fill(0.0);
            combine(|i| weights[i * stride], last - first, &rows[first * hd..], hd, sum);
            for (total, &part) in total[j * hd..][..hd].iter_mut().zip(sum.iter()) {
                *total = round.apply(*total + scale * part);
            }
        },
    ));
}
