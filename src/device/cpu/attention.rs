//! Causal grouped-query attention per sequence, and its gradient, in the order of PyTorch's flash kernels:
//! keys in blocks of [`KEYS`], running maximum and sum in f32, unnormalised probabilities rounded to the compute
//! format before they meet V. One task is one sequence and one key/value head.

use super::rounding::{self, Round, round_operand, with_round};
use super::simd::vectorised;
use super::threads::Shared;
use super::values::{expect, expect_offsets, tensor, values};
use super::{CpuDevice, math};
use crate::Result;
use crate::device::{AttentionShape, Compute, DType, Tensor};

/// Keys a block: PyTorch's CPU flash kernel splits there, so probabilities are rounded against the same maximum.
const KEYS: usize = 512;

/// One task's operands, gathered per head and rounded to the compute format.
struct Head {
    /// [heads of the group][length][head_dim]
    q: Vec<f32>,
    /// [head_dim][length]: transposed, so that a row of scores is vectorised over keys.
    k: Vec<f32>,
    /// [length][head_dim]
    v: Vec<f32>,
}

/// The work of one call, cut into tasks.
struct Plan<'a> {
    rows: &'a [usize],
    shape: &'a AttentionShape,
    compute: Compute,
    group: usize,
}

impl Plan<'_> {
    fn tasks(&self) -> usize {
        (self.rows.len() - 1) * self.shape.kv_heads
    }
    /// (first row, length, key/value head) of a task.
    fn task(&self, task: usize) -> (usize, usize, usize) {
        let sequence = task / self.shape.kv_heads;
        (self.rows[sequence], self.rows[sequence + 1] - self.rows[sequence], task % self.shape.kv_heads)
    }
    /// First key that query i may see.
    fn first_key(&self, i: usize) -> usize {
        self.shape.window.map_or(0, |window| (i + 1).saturating_sub(window))
    }
    fn work(&self) -> usize {
        let pairs: usize = self.rows.windows(2).map(|r| (r[1] - r[0]) * (r[1] - r[0])).sum();
        pairs * self.shape.heads * self.shape.head_dim
    }
}

impl CpuDevice {
    pub(super) fn attention_impl(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        rows: &[usize],
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor)> {
        let plan = check((q, k, v), rows, shape, compute)?;
        let (n, hd) = (q.rows(), shape.head_dim);
        let (qs, ks, vs) = (values(q)?, values(k)?, values(v)?);
        let mut o = vec![0f32; n * shape.heads * hd];
        let mut lse = vec![0f32; n * shape.heads];
        {
            let (o, lse) = (Shared::new(&mut o), Shared::new(&mut lse));
            self.workers.each(plan.tasks(), plan.work(), |task| {
                let (first, length, kv) = plan.task(task);
                let head = gather_head(&plan, (&qs, &ks, &vs), task);
                let mut scores = vec![0f32; KEYS];
                for h in 0..plan.group {
                    for i in 0..length {
                        let at = (first + i) * shape.heads + kv * plan.group + h;
                        // SAFETY: row and head belong to this task alone.
                        let (o, lse) = unsafe { (o.slice(at * hd, hd), lse.slice(at, 1)) };
                        let q = &head.q[(h * length + i) * hd..][..hd];
                        lse[0] = vectorised(
                            #[inline(always)]
                            || forward_row(&plan, &head, (i, length), q, &mut scores, o),
                        );
                    }
                }
            });
        }
        let dtype = output_dtype(compute);
        let o = tensor(o, vec![n, shape.heads * hd], dtype);
        Ok((o, tensor(lse, vec![n, shape.heads], DType::F32)))
    }

    pub(super) fn attention_grad_impl(
        &self,
        (d_o, o, lse): (&Tensor, &Tensor, &Tensor),
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        rows: &[usize],
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let plan = check((q, k, v), rows, shape, compute)?;
        expect(
            d_o.shape == q.shape && o.shape == q.shape && lse.elements() == q.rows() * shape.heads,
            "attention_grad",
            || format!("d_o {:?}, o {:?}, q {:?}, lse {:?}", d_o.shape, o.shape, q.shape, lse.shape),
        )?;
        let (qs, ks, vs) = (values(q)?, values(k)?, values(v)?);
        let (d_os, os, lses) = (values(d_o)?, values(o)?, values(lse)?);
        let mut dq = vec![0f32; qs.len()];
        let mut dk = vec![0f32; ks.len()];
        let mut dv = vec![0f32; vs.len()];
        {
            let (dq, dk, dv) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
            self.workers.each(plan.tasks(), plan.work(), |task| {
                let head = gather_head(&plan, (&qs, &ks, &vs), task);
                backward_task(&plan, &head, task, (&d_os, &os, &lses), (&dq, &dk, &dv));
            });
        }
        // dk and dv were rounded per query head; a group's sum rounds to the dtype that was repeated over it.
        rounding::round_slice(&mut dq, output_dtype(compute));
        for (d, dtype) in [(&mut dq, q.dtype), (&mut dk, k.dtype), (&mut dv, v.dtype)] {
            rounding::round_slice(d, dtype);
        }
        let wrap = |d: Vec<f32>, like: &Tensor| tensor(d, like.shape.clone(), like.dtype);
        Ok((wrap(dq, q), wrap(dk, k), wrap(dv, v)))
    }
}

fn output_dtype(compute: Compute) -> DType {
    match compute {
        Compute::F32 | Compute::Tf32 => DType::F32,
        Compute::Bf16 => DType::BF16,
        Compute::F16 => DType::F16,
    }
}

fn check<'a>(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    rows: &'a [usize],
    shape: &'a AttentionShape,
    compute: Compute,
) -> Result<Plan<'a>> {
    let n = q.rows();
    expect_offsets(rows, n, "attention")?;
    let fits = shape.kv_heads > 0
        && shape.heads.is_multiple_of(shape.kv_heads)
        && q.columns() == shape.heads * shape.head_dim
        && [k, v].iter().all(|t| t.rows() == n && t.columns() == shape.kv_heads * shape.head_dim);
    expect(fits, "attention", || format!("q {:?}, k {:?}, v {:?}, {shape:?}", q.shape, k.shape, v.shape))?;
    Ok(Plan { rows, shape, compute, group: shape.heads / shape.kv_heads })
}

fn gather_head(plan: &Plan<'_>, (q, k, v): (&[f32], &[f32], &[f32]), task: usize) -> Head {
    let (first, length, kv) = plan.task(task);
    let hd = plan.shape.head_dim;
    let mut head =
        Head { q: vec![0f32; plan.group * length * hd], k: vec![0f32; length * hd], v: vec![0f32; length * hd] };
    for i in 0..length {
        for h in 0..plan.group {
            let at = ((first + i) * plan.shape.heads + kv * plan.group + h) * hd;
            head.q[(h * length + i) * hd..][..hd].copy_from_slice(&q[at..at + hd]);
        }
        let at = ((first + i) * plan.shape.kv_heads + kv) * hd;
        for d in 0..hd {
            head.k[d * length + i] = k[at + d];
        }
        head.v[i * hd..][..hd].copy_from_slice(&v[at..at + hd]);
    }
    for x in [&mut head.q, &mut head.k, &mut head.v] {
        round_operand(x, plan.compute);
    }
    head
}

/// s[j] = Σ_d q[d]·k[d][first + j], d ascending.
#[inline(always)]
fn scores_of(q: &[f32], transposed: &[f32], length: usize, first: usize, s: &mut [f32]) {
    s.fill(0.0);
    for (d, &q) in q.iter().enumerate() {
        let k = &transposed[d * length + first..][..s.len()];
        for (s, &k) in s.iter_mut().zip(k) {
            *s = q.mul_add(k, *s);
        }
    }
}

/// One query row: writes its rounded output, returns its log-sum-exp.
#[inline(always)]
fn forward_row(
    plan: &Plan<'_>,
    head: &Head,
    (i, length): (usize, usize),
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
        let s = &mut scores[..end - first];
        scores_of(q, &head.k, length, first, s);
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
        sum = sum * rescale + math::sum(s.len(), |j| s[j]);
        for o in o.iter_mut() {
            *o *= rescale;
        }
        round_operand(s, plan.compute);
        for (j, &p) in s.iter().enumerate() {
            for (o, &v) in o.iter_mut().zip(&head.v[(first + j) * hd..][..hd]) {
                *o = p.mul_add(v, *o);
            }
        }
        max = new_max;
        first = end;
    }
    for o in o.iter_mut() {
        *o /= sum;
    }
    rounding::round_slice(o, output_dtype(plan.compute));
    max + sum.ln()
}

/// All gradients of one sequence and key/value head. Blocks of queries × blocks of keys, as PyTorch's CPU kernel
/// walks them: for half operands it keeps dq, dk, dv in half between blocks, which one can see in the results, so the
/// rounding is repeated here. Query heads that share a key/value head are summed at the end (the backward of
/// transformers' repeat_kv; its `enable_gqa`, used where a batch has no padding at all, adds them in turn).
fn backward_task(
    plan: &Plan<'_>,
    head: &Head,
    task: usize,
    (d_o, o, lse): (&[f32], &[f32], &[f32]),
    (dq, dk, dv): (&Shared<'_>, &Shared<'_>, &Shared<'_>),
) {
    let (first, length, kv) = plan.task(task);
    let hd = plan.shape.head_dim;
    let mut k = vec![0f32; length * hd];
    transpose(&head.k, hd, &mut k);
    let mut v_transposed = vec![0f32; length * hd];
    transpose(&head.v, length, &mut v_transposed);
    let mut work = Work::new(length, hd);
    let (mut dk_sum, mut dv_sum) = (vec![0f32; length * hd], vec![0f32; length * hd]);
    for h in 0..plan.group {
        let (mut dk_head, mut dv_head) = (vec![0f32; length * hd], vec![0f32; length * hd]);
        let queries = query_block(length);
        for block in (0..length).step_by(queries) {
            let end = (block + queries).min(length);
            for keys in (plan.first_key(block) / KEYS * KEYS..end).step_by(KEYS) {
                let last_key = (keys + KEYS).min(end);
                work.clear(keys..last_key);
                for i in block..end {
                    let at = (first + i) * plan.shape.heads + kv * plan.group + h;
                    let row = Row {
                        q: &head.q[(h * length + i) * hd..][..hd],
                        d_o: &d_o[at * hd..][..hd],
                        o: &o[at * hd..][..hd],
                        lse: lse[at],
                        keys: keys.max(plan.first_key(i))..last_key.min(i + 1),
                    };
                    if row.keys.is_empty() {
                        continue;
                    }
                    // SAFETY: row and head belong to this task alone.
                    let dq = unsafe { dq.slice(at * hd, hd) };
                    vectorised(
                        #[inline(always)]
                        || backward_row(plan, head, &row, (&k, &v_transposed), &mut work, dq),
                    );
                }
                let rows = keys * hd..last_key * hd;
                add_block(plan, &mut dk_head[rows.clone()], &work.dk[rows.clone()], plan.shape.scale);
                add_block(plan, &mut dv_head[rows.clone()], &work.dv[rows], 1.0);
            }
        }
        for (sum, part) in [(&mut dk_sum, &dk_head), (&mut dv_sum, &dv_head)] {
            for (sum, part) in sum.iter_mut().zip(part) {
                *sum += part;
            }
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

/// Queries a block in PyTorch's CPU kernel, by the length of the sequence.
fn query_block(length: usize) -> usize {
    match length {
        0..192 => 32,
        192..768 => 64,
        _ => 256,
    }
}

/// [rows][columns] → [columns][rows].
fn transpose(x: &[f32], rows: usize, out: &mut [f32]) {
    let columns = x.len() / rows.max(1);
    for (r, row) in x.chunks_exact(columns.max(1)).enumerate() {
        for (c, &value) in row.iter().enumerate() {
            out[c * rows + r] = value;
        }
    }
}

/// total = round(total + scale·block), rounded as the kernel's output dtype is.
fn add_block(plan: &Plan<'_>, total: &mut [f32], block: &[f32], scale: f32) {
    with_round!(output_dtype(plan.compute), round => vectorised(#[inline(always)] || {
        for (total, &part) in total.iter_mut().zip(block) {
            *total = round.apply(*total + scale * part);
        }
    }));
}

/// Scratch of one task's backward pass.
struct Work {
    p: Vec<f32>,
    dp: Vec<f32>,
    d_o: Vec<f32>,
    dq: Vec<f32>,
    /// This block's share of dk and dv, [length][head_dim].
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Work {
    fn new(length: usize, hd: usize) -> Self {
        let zeros = |n: usize| vec![0f32; n];
        let keys = length.min(KEYS);
        Self {
            p: zeros(keys),
            dp: zeros(keys),
            d_o: zeros(hd),
            dq: zeros(hd),
            dk: zeros(length * hd),
            dv: zeros(length * hd),
        }
    }
    fn clear(&mut self, keys: std::ops::Range<usize>) {
        let hd = self.dq.len();
        self.dk[keys.start * hd..keys.end * hd].fill(0.0);
        self.dv[keys.start * hd..keys.end * hd].fill(0.0);
    }
}

/// One query row against one block of keys.
struct Row<'a> {
    q: &'a [f32],
    d_o: &'a [f32],
    o: &'a [f32],
    lse: f32,
    keys: std::ops::Range<usize>,
}

#[inline(always)]
fn backward_row(
    plan: &Plan<'_>,
    head: &Head,
    row: &Row<'_>,
    (k, v_transposed): (&[f32], &[f32]),
    work: &mut Work,
    dq: &mut [f32],
) {
    let hd = row.q.len();
    let (first, count) = (row.keys.start, row.keys.len());
    let length = head.v.len() / hd;
    let (p, dp) = (&mut work.p[..count], &mut work.dp[..count]);
    scores_of(row.q, &head.k, length, first, p);
    for p in p.iter_mut() {
        *p = math::exp(*p * plan.shape.scale - row.lse);
    }
    work.d_o.copy_from_slice(row.d_o);
    round_operand(&mut work.d_o, plan.compute);
    let d_o = &work.d_o[..hd];
    let delta = math::sum(hd, |d| d_o[d] * row.o[d]);
    scores_of(d_o, v_transposed, length, first, dp);
    for (dp, &p) in dp.iter_mut().zip(p.iter()) {
        *dp = p * (*dp - delta);
    }
    round_operand(p, plan.compute);
    round_operand(dp, plan.compute);
    let sum = &mut work.dq[..hd];
    sum.fill(0.0);
    for (j, (&p, &ds)) in p.iter().zip(dp.iter()).enumerate() {
        let at = (first + j) * hd;
        let (dk, dv, k) = (&mut work.dk[at..at + hd], &mut work.dv[at..at + hd], &k[at..at + hd]);
        for d in 0..hd {
            dv[d] = p.mul_add(d_o[d], dv[d]);
            dk[d] = ds.mul_add(row.q[d], dk[d]);
            sum[d] = ds.mul_add(k[d], sum[d]);
        }
    }
    for (dq, &sum) in dq.iter_mut().zip(sum.iter()) {
        *dq += plan.shape.scale * sum;
    }
    rounding::round_slice(dq, output_dtype(plan.compute));
}
