//! The reference of gradient errors: a device whose matrix products and losses accumulate in f64.
//!
//! Wraps another device in f32 arithmetic. Only what sums many terms is done here; elementwise operations of an f32
//! plan round at 2⁻²⁴ a time, far below what half formats are judged by. Slow, and used for a few windows.

use std::sync::Arc;

use crate::Result;
use crate::device::{AdamW, AttentionShape, Compute, DType, Device, Offsets, Statistics, Tensor};

/// f64 accumulation over `inner`.
pub struct Reference {
    pub inner: Arc<dyn Device>,
}

impl Reference {
    /// Σ_k a[i, k] · b[k, j] for the layouts of the three products, f64, rounded once to f32.
    fn product(
        &self,
        shape: (usize, usize, usize),
        at: impl Fn(usize, usize) -> f32,
        bt: impl Fn(usize, usize) -> f32,
    ) -> Vec<f32> {
        let (rows, inner, columns) = shape;
        let mut out = Vec::with_capacity(rows * columns);
        let mut sums = vec![0f64; columns];
        for i in 0..rows {
            sums.fill(0.0);
            for k in 0..inner {
                let a = f64::from(at(i, k));
                sums.iter_mut().enumerate().for_each(|(j, sum)| *sum += a * f64::from(bt(k, j)));
            }
            out.extend(sums.iter().map(|s| *s as f32));
        }
        out
    }
}

impl Device for Reference {
    fn name(&self) -> String {
        format!("{} with f64 accumulation", self.inner.name())
    }
    fn fingerprint(&self) -> String {
        format!("{} f64", self.inner.fingerprint())
    }
    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, _: Compute, out: DType) -> Result<Tensor> {
        let (n, fan_in, fan_out) = (x.rows(), x.columns(), w.rows());
        let (xs, ws) = (self.inner.download(x)?, self.inner.download(w)?);
        // Columns of wᵀ side by side, so that the inner loop reads in order.
        let mut turned = vec![0f32; ws.len()];
        for (o, row) in ws.chunks_exact(fan_in).enumerate() {
            row.iter().enumerate().for_each(|(i, value)| turned[i * fan_out + o] = *value);
        }
        let mut y = self.product((n, fan_in, fan_out), |i, k| xs[i * fan_in + k], |k, j| turned[k * fan_out + j]);
        if let Some(bias) = bias {
            let bias = self.inner.download(bias)?;
            y.chunks_exact_mut(fan_out).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
        }
        self.inner.upload(&y, &[n, fan_out], out)
    }
    fn linear_input_grad(&self, dy: &Tensor, w: &Tensor, _: Compute, out: DType) -> Result<Tensor> {
        let (n, fan_out, fan_in) = (dy.rows(), dy.columns(), w.columns());
        let (dys, ws) = (self.inner.download(dy)?, self.inner.download(w)?);
        let dx = self.product((n, fan_out, fan_in), |i, k| dys[i * fan_out + k], |k, j| ws[k * fan_in + j]);
        self.inner.upload(&dx, &[n, fan_in], out)
    }
    fn linear_weight_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: Offsets<'_>,
        _: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (fan_out, fan_in) = (dy.columns(), x.columns());
        let (dys, xs) = (self.inner.download(dy)?, self.inner.download(x)?);
        let mut all = Vec::new();
        for unit in units.windows(2) {
            let rows = unit[1] - unit[0];
            let (dys, xs) = (&dys[unit[0] * fan_out..unit[1] * fan_out], &xs[unit[0] * fan_in..unit[1] * fan_in]);
            all.extend(self.product((fan_out, rows, fan_in), |i, k| dys[k * fan_out + i], |k, j| xs[k * fan_in + j]));
        }
        self.inner.upload(&all, &[units.len().saturating_sub(1), fan_out, fan_in], out)
    }

    // ---- as the device below does it
    fn upload(&self, values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.inner.upload(values, shape, dtype)
    }
    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.inner.download(x)
    }
    fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.inner.zeros(shape, dtype)
    }
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        self.inner.cast(x, dtype)
    }
    fn gather_rows(&self, x: &Tensor, index: &[u32]) -> Result<Tensor> {
        self.inner.gather_rows(x, index)
    }
    fn scatter_rows(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
        self.inner.scatter_rows(x, index, rows)
    }
    fn add(&self, a: &Tensor, b: &Tensor, out: DType) -> Result<Tensor> {
        self.inner.add(a, b, out)
    }
    fn scale(&self, x: &Tensor, s: f32, out: DType) -> Result<Tensor> {
        self.inner.scale(x, s, out)
    }
    fn perturb(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor> {
        self.inner.perturb(x, seed, stream, ulp_of)
    }
    fn dropout(&self, x: &Tensor, p: f32, seed: u64, stream: u64) -> Result<Tensor> {
        self.inner.dropout(x, p, seed, stream)
    }
    fn embedding(&self, table: &Tensor, ids: &[u32], out: DType) -> Result<Tensor> {
        self.inner.embedding(table, ids, out)
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32, out: DType) -> Result<(Tensor, Tensor)> {
        self.inner.rms_norm(x, w, eps, out)
    }
    fn rms_norm_grad(&self, dy: &Tensor, x: &Tensor, w: &Tensor, r: &Tensor) -> Result<Tensor> {
        self.inner.rms_norm_grad(dy, x, w, r)
    }
    fn rope(
        &self,
        x: &Tensor,
        positions: &[u32],
        cos: &Tensor,
        sin: &Tensor,
        heads: usize,
        inverse: bool,
        out: DType,
    ) -> Result<Tensor> {
        self.inner.rope(x, positions, cos, sin, heads, inverse, out)
    }
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        rows: Offsets<'_>,
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor)> {
        self.inner.attention(q, k, v, rows, shape, compute)
    }
    fn attention_grad(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        rows: Offsets<'_>,
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        self.inner.attention_grad(d_o, q, k, v, o, lse, rows, shape, compute)
    }
    fn gate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.inner.gate(gate, up)
    }
    fn gate_grad(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
        self.inner.gate_grad(d_out, gate, up)
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        self.inner.cross_entropy(logits, labels, seed)
    }
    fn accumulate(&self, acc: &mut Tensor, g: &Tensor) -> Result<()> {
        self.inner.accumulate(acc, g)
    }
    fn scale_in_place(&self, x: &mut Tensor, s: f32) -> Result<()> {
        self.inner.scale_in_place(x, s)
    }
    fn adamw(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, with: &AdamW) -> Result<()> {
        self.inner.adamw(p, g, m, v, with)
    }
    fn sgd(&self, p: &mut Tensor, g: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()> {
        self.inner.sgd(p, g, learning_rate, weight_decay)
    }
    fn statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<Vec<Statistics>> {
        self.inner.statistics(x, units, target)
    }
    fn norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<Vec<(f32, u64)>> {
        self.inner.norms(x, units)
    }
}
