//! Causal grouped-query attention per sequence, and its gradient, in the order of PyTorch's flash kernels:
//! keys in blocks of [`KEYS`], running maximum and sum in f32, unnormalised probabilities rounded to the compute
//! format before they meet V. One task is one sequence and one key/value head. This file cuts the work and gathers
//! heads; `forward` and `backward` compute one task each, `combine` is the inner loop of all their products.

mod backward;
mod combine;
mod forward;

use super::rounding::{self, round_operand};
use super::threads::Shared;
use super::values::{expect, expect_offsets, tensor, values};
use super::{Buffer, CpuDevice};
use crate::Result;
use crate::device::{AttentionShape, Compute, DType, Tensor};

/// Keys a block: PyTorch's CPU flash kernel splits there, so probabilities are rounded against the same maximum.
const KEYS: usize = 512;

/// One task's operands, gathered per head and rounded to the compute format.
struct Head {
    /// [heads of the group][length][head_dim]
    q: Vec<f32>,
    /// [length][head_dim]
    k: Vec<f32>,
    v: Vec<f32>,
    length: usize,
}

/// The work of one call, cut into tasks.
struct Plan<'a> {
    rows: &'a [usize],
    shape: &'a AttentionShape<'a>,
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
    /// Length of the padded sequence of a task.
    fn padded(&self, task: usize) -> usize {
        let (_, length, _) = self.task(task);
        self.shape.padded.get(task / self.shape.kv_heads).map_or(length, |&padded| padded.max(length))
    }
    fn grouped(&self, task: usize) -> bool {
        self.shape.grouped.get(task / self.shape.kv_heads).copied().unwrap_or(false)
    }
    /// Keys in PyTorch's block from key `first` on, those that no query may see included.
    fn block_keys(&self, task: usize, first: usize) -> usize {
        (self.padded(task) - first).min(KEYS)
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
        let mut o = Buffer::unset(n * shape.heads * hd);
        let mut lse = Buffer::unset(n * shape.heads);
        {
            let (o, lse) = (Shared::new(&mut o), Shared::new(&mut lse));
            self.workers.each(plan.tasks(), plan.work(), |task| {
                let head = gather_head(&plan, (&qs, &ks, &vs), task);
                forward::task(&plan, &head, task, (&o, &lse));
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
        let mut dq = Buffer::zeros(qs.len());
        let mut dk = Buffer::unset(ks.len());
        let mut dv = Buffer::unset(vs.len());
        {
            let (dq, dk, dv) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
            self.workers.each(plan.tasks(), plan.work(), |task| {
                let head = gather_head(&plan, (&qs, &ks, &vs), task);
                let d_o = gather(&d_os, &plan, task, shape.heads);
                let saved = backward::Saved { d_o: &d_o, o: &os, lse: &lses };
                backward::task(&plan, &head, task, &saved, (&dq, &dk, &dv));
            });
        }
        // dk and dv were rounded per query head; a group's sum rounds to the dtype that was repeated over it.
        for (d, like) in [(&mut dq, q), (&mut dk, k), (&mut dv, v)] {
            let dtype = like.dtype;
            if dtype.is_half() {
                self.fill(d, (&like.shape, dtype), 1, 1, |_, run| rounding::round_slice(run, dtype));
            }
        }
        let wrap = |d: Buffer, like: &Tensor| tensor(d, like.shape.clone(), like.dtype);
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
    shape: &'a AttentionShape<'a>,
    compute: Compute,
) -> Result<Plan<'a>> {
    let n = q.rows();
    expect_offsets(rows, n, "attention")?;
    let fits = shape.kv_heads > 0
        && shape.heads.is_multiple_of(shape.kv_heads)
        && (shape.padded.is_empty() || shape.padded.len() == rows.len() - 1)
        && (shape.grouped.is_empty() || shape.grouped.len() == rows.len() - 1)
        && q.columns() == shape.heads * shape.head_dim
        && [k, v].iter().all(|t| t.rows() == n && t.columns() == shape.kv_heads * shape.head_dim);
    expect(fits, "attention", || format!("q {:?}, k {:?}, v {:?}, {shape:?}", q.shape, k.shape, v.shape))?;
    Ok(Plan { rows, shape, compute, group: shape.heads / shape.kv_heads })
}

fn gather_head(plan: &Plan<'_>, (q, k, v): (&[f32], &[f32], &[f32]), task: usize) -> Head {
    let (_, length, _) = plan.task(task);
    let q = gather(q, plan, task, plan.shape.heads);
    let [k, v] = [k, v].map(|x| gather(x, plan, task, plan.shape.kv_heads));
    Head { q, k, v, length }
}

/// The rows of a task's sequence in x [n, heads·head_dim], for its heads, rounded: [heads of the task][length][head_dim].
fn gather(x: &[f32], plan: &Plan<'_>, task: usize, heads: usize) -> Vec<f32> {
    let (first, length, kv) = plan.task(task);
    let (hd, group) = (plan.shape.head_dim, heads / plan.shape.kv_heads);
    let mut out = vec![0f32; group * length * hd];
    for (row, out) in out.chunks_exact_mut(hd.max(1)).enumerate() {
        let (h, i) = (row / length, row % length);
        out.copy_from_slice(&x[((first + i) * heads + kv * group + h) * hd..][..hd]);
    }
    round_operand(&mut out, plan.compute);
    out
}
