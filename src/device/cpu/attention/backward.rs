//! Attention, backward: one task.
//!
//! Blocks of queries × blocks of keys, as PyTorch's CPU kernel walks them: for half operands it keeps dq, dk, dv in
//! half between blocks, which one can see in the results, so the rounding is repeated here. Query heads that share a
//! key/value head are summed at the end (the backward of transformers' repeat_kv), or in turn (`enable_gqa`).

use std::ops::Range;

use super::combine::{NARROW, Order, Terms, Transposed, combine};
use super::{Head, KEYS, Plan, output_dtype};
use crate::device::Compute;
use crate::device::cpu::math::{self, LANES};
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
    /// Queries and keys of the block in PyTorch's kernel, padding and keys that no query sees included.
    depth: (usize, usize),
}

/// Writes dq, dk, dv of a task's sequence and key/value head.
pub fn task(
    plan: &Plan<'_>,
    head: &Head,
    task: usize,
    saved: &Saved<'_>,
    (dq, dk, dv): (&Shared<'_>, &Shared<'_>, &Shared<'_>),
) {
    let hd = plan.shape.head_dim;
    let (first, length, kv) = plan.task(task);
    let grouped = plan.grouped(task);
    let scaled = |x: &[f32]| -> Vec<f32> { x.iter().map(|x| plan.shape.scale * x).collect() };
    let scaled_k = scaled(&head.k);
    let (q, k, scale) = match output_dtype(plan.compute).is_half() {
        true => (&head.q, &head.k, plan.shape.scale),
        false => (&scaled(&head.q), &scaled_k, 1.0),
    };
    let operands = Operands {
        k,
        transposed_k: Transposed::new(&scaled_k, length),
        transposed_v: Transposed::new(&head.v, length),
        scale,
    };
    let (padded, queries) = (plan.padded(task), query_block(plan.padded(task)));
    let stride = KEYS.min(length).next_multiple_of(NARROW) + NARROW;
    let cells = || vec![0f32; queries.min(length) * stride];
    let mut work = Work { stride, scores: vec![0f32; KEYS], p: cells(), ds: cells(), sum: vec![0f32; hd] };
    let zeros = || vec![0f32; length * hd];
    let (mut dk_sum, mut dv_sum, mut dk_head, mut dv_head) = (zeros(), zeros(), zeros(), zeros());
    for h in 0..plan.group {
        for start in (0..length).step_by(queries) {
            let padded_end = (start + queries).min(padded);
            let queries = start..padded_end.min(length);
            for keys in (plan.first_key(start) / KEYS * KEYS..queries.end).step_by(KEYS) {
                let depth = (padded_end - start, plan.block_keys(task, keys));
                let block = Block { queries: queries.clone(), keys: keys..(keys + KEYS).min(queries.end), depth };
                for i in block.queries.clone() {
                    let at = (first + i) * plan.shape.heads + kv * plan.group + h;
                    // SAFETY: row and head belong to this task alone.
                    let dq = unsafe { dq.slice(at * hd, hd) };
                    let row = Row { i, row: h * length + i, o: &saved.o[at * hd..][..hd], lse: saved.lse[at] };
                    query(plan, (&head.q, &operands, saved.d_o), &block, &row, &mut work, dq);
                }
                let of_head = h * length * hd..(h + 1) * length * hd;
                let (q, d_o) = (&q[of_head.clone()], &saved.d_o[of_head]);
                let Work { p, ds, sum, .. } = &mut work;
                keys_of_block(plan, &block, (p, stride), (d_o, 1.0), sum, &mut dv_head);
                keys_of_block(plan, &block, (ds, stride), (q, scale), sum, &mut dk_head);
            }
        }
        if grouped && h + 1 < plan.group {
            continue;
        }
        for (sum, part) in [(&mut dk_sum, &mut dk_head), (&mut dv_sum, &mut dv_head)] {
            sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += std::mem::take(part));
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

/// Order of the terms of dq: a product of depth `depth` whose first `before` terms are zero.
fn order_of_keys(plan: &Plan<'_>, depth: usize, before: usize) -> Order {
    match plan.compute {
        Compute::Bf16 => Order::Pairs { odd: !before.is_multiple_of(2) },
        Compute::F16 => Order::interleaved(depth, before),
        Compute::F32 | Compute::Tf32 => Order::mkl(depth, before),
    }
}

/// The same for dk and dv.
fn order_of_queries(plan: &Plan<'_>, depth: usize, before: usize) -> Order {
    match plan.compute {
        Compute::F16 => Order::Onwards,
        _ => order_of_keys(plan, depth, before),
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

/// A sequence's keys and values as the products of a row of queries read them.
///
/// PyTorch multiplies the scores of half operands and all products of f32 ones with MKL, whose first operand (keys,
/// or queries for the gradient of keys) takes the scale before the sum; oneDNN, which computes the other products of
/// bf16 ones, scales the sum; so does ATen, which computes those of fp16, for dq, but for dk its second operand.
struct Operands<'a> {
    /// [length][head_dim], for dq, which is scaled by `scale` afterwards.
    k: &'a [f32],
    transposed_k: Transposed,
    transposed_v: Transposed,
    scale: f32,
}

/// Fills one row of `work` and adds the row's share of dq.
fn query(
    plan: &Plan<'_>,
    (q, operands, d_o): (&[f32], &Operands<'_>, &[f32]),
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
    let (q, d_o) = (&q[row.row * hd..][..hd], &d_o[row.row * hd..][..hd]);
    let cells = (row.i - block.queries.start) * work.stride + (first - block.keys.start);
    let count = end - first;
    let Work { scores, p, ds, sum, .. } = work;
    vectorised(
        #[inline(always)]
        || {
            operands.transposed_k.dot(q, first, count, scores);
            let (p, ds) = (&mut p[cells..cells + count], &mut ds[cells..cells + count]);
            for (p, s) in p.iter_mut().zip(scores.iter()) {
                *p = math::exp(*s - row.lse);
            }
            let delta = sum_of_products(d_o, row.o, plan.compute);
            operands.transposed_v.dot(d_o, first, count, scores);
            for ((ds, &p), dp) in ds.iter_mut().zip(p.iter()).zip(scores.iter()) {
                *ds = p * (*dp - delta);
            }
            round_operand(p, plan.compute);
            round_operand(ds, plan.compute);
            let order = order_of_keys(plan, block.depth.1, first - block.keys.start);
            let terms = Terms { weight: |j: usize| ds[j], count, order };
            add_scaled(terms, &operands.k[first * hd..], operands.scale, sum, dq);
        },
    );
    rounding::round_slice(dq, output_dtype(plan.compute));
}

/// Σ x·y as PyTorch's `map2_reduce_all` adds it: half operands come in two registers, each with a sum of its own; what
/// does not fill them is added lane after lane.
#[inline(always)]
fn sum_of_products(x: &[f32], y: &[f32], compute: Compute) -> f32 {
    let half = output_dtype(compute).is_half();
    if x.len() < if half { 2 * LANES } else { LANES } {
        let products = x.iter().zip(y).map(|(x, y)| x * y);
        let second = products.clone().skip(LANES).chain(std::iter::repeat(0.0));
        let lanes = products.take(LANES).zip(second).map(|(first, second)| first + second);
        return lanes.reduce(|sum, lane| sum + lane).unwrap_or(0.0);
    }
    match half {
        true => math::sum_in_lanes::<{ 2 * LANES }, 2>([x, y], |[x, y]| x * y),
        false => math::sum([x, y], |[x, y]| x * y),
    }
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
            let order = order_of_queries(plan, block.depth.0, first - block.queries.start);
            let (of_weight, of_sum) = if order == Order::Onwards { (scale, 1.0) } else { (1.0, scale) };
            let terms = Terms { weight: |i: usize| of_weight * weights[i * stride], count: last - first, order };
            let total = &mut total[j * hd..][..hd];
            add_scaled(terms, &rows[first * hd..], of_sum, sum, total);
            for total in total {
                *total = round.apply(*total);
            }
        },
    ));
}

/// out[l] += scale·Σ_j weight(j)·rows[j·head_dim + l]; `sum` is scratch.
#[inline(always)]
fn add_scaled(terms: Terms<impl Fn(usize) -> f32 + Copy>, rows: &[f32], scale: f32, sum: &mut [f32], out: &mut [f32]) {
    let head_dim = out.len();
    if scale == 1.0 {
        return combine(terms, rows, head_dim, out);
    }
    sum.fill(0.0);
    combine(terms, rows, head_dim, sum);
    for (out, &sum) in out.iter_mut().zip(sum.iter()) {
        *out += scale * sum;
    }
}
