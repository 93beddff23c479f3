//! Element by element: casts, sums, scaling, row selection, embedding, noise and dropout, the gated activation.

use super::math::exp;
use super::rounding::{Round, with_round};
use super::simd::vectorised;
use super::values::{elements, expect, tensor, values};
use super::{Buffer, CpuDevice};
use crate::Result;
use crate::device::{DType, Keep, Tensor, noise};

impl CpuDevice {
    /// out[i] = round(f(x[i])).
    fn map(&self, x: &Tensor, dtype: DType, f: impl Fn(f32) -> f32 + Sync + Send + Copy) -> Result<Tensor> {
        let source = values(x)?;
        let mut out = Buffer::unset(source.len());
        with_round!(dtype, round => self.workers.rows(&mut out, 1, 1, |first, run| vectorised(#[inline(always)] || {
            for (y, &x) in run.iter_mut().zip(&source[first..]) {
                *y = round.apply(f(x));
            }
        })));
        Ok(tensor(out, x.shape.clone(), dtype))
    }

    pub(super) fn cast_impl(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if x.dtype == dtype && matches!(x.storage, crate::device::Storage::Cpu(_)) {
            return Ok(x.clone());
        }
        self.map(x, dtype, |value| value)
    }

    pub(super) fn scale_impl(&self, x: &Tensor, s: f32, out: DType) -> Result<Tensor> {
        self.map(x, out, move |value| value * s)
    }

    pub(super) fn add_impl(&self, a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
        expect(a.shape == b.shape, "add", || format!("shapes {:?} and {:?}", a.shape, b.shape))?;
        let (left, right) = (values(a)?, values(b)?);
        let mut out = Buffer::unset(left.len());
        with_round!(dtype, round => self.fill(&mut out, (&a.shape, dtype), 1, 1, |first, run| vectorised(#[inline(always)] || {
            let (left, right) = (&left[first..][..run.len()], &right[first..][..run.len()]);
            for ((y, &a), &b) in run.iter_mut().zip(left).zip(right) {
                *y = round.apply(a + b);
            }
        })));
        Ok(tensor(out, a.shape.clone(), dtype))
    }

    pub(super) fn gather_impl(&self, x: &Tensor, index: &[u32], dtype: DType) -> Result<Tensor> {
        let (rows, columns) = (x.rows(), x.columns());
        for &i in index {
            expect((i as usize) < rows, "gather_rows", || format!("row {i} of {rows}"))?;
        }
        let source = elements(x)?;
        let mut out = Buffer::unset(index.len() * columns);
        self.workers.rows(&mut out, columns, 1, |first, run| {
            for (row, &i) in run.chunks_exact_mut(columns).zip(&index[first..]) {
                source.read(i as usize * columns, row);
                super::rounding::round_slice(row, if dtype == x.dtype { DType::F32 } else { dtype });
            }
        });
        Ok(tensor(out, vec![index.len(), columns], dtype))
    }

    pub(super) fn scatter_impl(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
        let columns = x.columns();
        expect(x.rows() == index.len(), "scatter_rows", || format!("{} rows, {} indices", x.rows(), index.len()))?;
        let source = values(x)?;
        let mut out = Buffer::zeros(rows * columns);
        for (row, &i) in source.chunks_exact(columns.max(1)).zip(index) {
            expect((i as usize) < rows, "scatter_rows", || format!("row {i} of {rows}"))?;
            out[i as usize * columns..][..columns].copy_from_slice(row);
        }
        Ok(tensor(out, vec![rows, columns], x.dtype))
    }

    pub(super) fn perturb_impl(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor> {
        let half_ulp = noise::half_ulp(ulp_of);
        self.map_indexed(x, move |value, i| value * (1.0 + half_ulp * noise::symmetric(seed, stream, i)))
    }

    pub(super) fn dropout_impl(&self, x: &Tensor, p: f64, keep: Keep<'_>) -> Result<Tensor> {
        let factor = keep.factor(p, x)?;
        let noise = move |kept: bool| if kept { factor } else { 0.0 };
        match keep {
            Keep::Drawn { seed, stream } => {
                let p = p as f32;
                self.map_indexed(x, move |value, i| value * noise(noise::unit(seed, stream, i) >= p))
            }
            Keep::Bits(words) => {
                self.map_indexed(x, move |value, i| value * noise(words[i as usize / 32] >> (i % 32) & 1 == 1))
            }
        }
    }

    /// out[i] = round(f(x[i], i)) in x's dtype.
    fn map_indexed(&self, x: &Tensor, f: impl Fn(f32, u64) -> f32 + Sync + Send + Copy) -> Result<Tensor> {
        let source = values(x)?;
        let mut out = Buffer::unset(source.len());
        with_round!(x.dtype, round => self.workers.rows(&mut out, 1, 4, |first, run| vectorised(#[inline(always)] || {
            for (i, (y, &x)) in run.iter_mut().zip(&source[first..]).enumerate() {
                *y = round.apply(f(x, (first + i) as u64));
            }
        })));
        Ok(tensor(out, x.shape.clone(), x.dtype))
    }

    pub(super) fn gate_impl(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        expect(gate.shape == up.shape, "gate", || format!("shapes {:?} and {:?}", gate.shape, up.shape))?;
        let (g, u) = (values(gate)?, values(up)?);
        let mut out = Buffer::unset(g.len());
        with_round!(gate.dtype, round => self.fill(&mut out, (&gate.shape, gate.dtype), 1, 8, |first, run| vectorised(#[inline(always)] || {
            let (g, u) = (&g[first..][..run.len()], &u[first..][..run.len()]);
            for ((y, &g), &u) in run.iter_mut().zip(g).zip(u) {
                *y = round.apply(round.apply(silu(g)) * u);
            }
        })));
        Ok(tensor(out, gate.shape.clone(), gate.dtype))
    }

    pub(super) fn gate_grad_impl(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
        expect(gate.shape == up.shape && gate.shape == d_out.shape, "gate_grad", || {
            format!("shapes {:?}, {:?} and {:?}", d_out.shape, gate.shape, up.shape)
        })?;
        let (d, g, u) = (values(d_out)?, values(gate)?, values(up)?);
        let mut d_gate = Buffer::unset(g.len());
        let mut d_up = Buffer::unset(g.len());
        with_round!(gate.dtype, round => self.fill2((&mut d_gate, &mut d_up), (&gate.shape, gate.dtype), 1, 8, |first, dg, du| {
            let n = dg.len();
            let inputs = (&d[first..][..n], &g[first..][..n], &u[first..][..n]);
            vectorised(#[inline(always)] || gate_grad_run(inputs.0, inputs.1, inputs.2, dg, du, round));
        }));
        Ok((tensor(d_gate, gate.shape.clone(), gate.dtype), tensor(d_up, up.shape.clone(), gate.dtype)))
    }
}

/// x·σ(x), as aten computes it: x / (1 + e^−x).
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// A function of its own, because its parameters tell the compiler that the five runs do not overlap.
#[inline(always)]
fn gate_grad_run(d: &[f32], g: &[f32], u: &[f32], d_gate: &mut [f32], d_up: &mut [f32], round: impl Round) {
    for ((((d, g), u), d_gate), d_up) in d.iter().zip(g).zip(u).zip(d_gate).zip(d_up) {
        let denominator = 1.0 + exp(-g);
        let sigmoid = 1.0 / denominator;
        *d_up = round.apply(d * round.apply(g / denominator));
        // d_act is an op's output of its own; aten's silu_backward then works in f32.
        let d_act = round.apply(d * u);
        // The compiler of PyTorch contracts 1 + g·(1 − σ) to one multiply-add.
        *d_gate = round.apply(d_act * sigmoid * g.mul_add(1.0 - sigmoid, 1.0));
    }
}
