//! Every operation of a [`Device`], run on the inner one and shown to the hook.

use super::{Again, Hooked, Product, Sees};
use crate::Result;
use crate::device::checks::{Expect, ProductSums, Sums, Weights};
use crate::device::{
    AdamW, AttentionShape, Compute, DType, Device, Keep, LowRank, Norm, Offsets, PendingNorms, Statistics, Tensor,
    Update, parts,
};

impl Device for Hooked {
    fn name(&self) -> String {
        self.inner.name()
    }
    fn fingerprint(&self) -> String {
        self.inner.fingerprint()
    }

    // ---- not results of arithmetic
    fn upload(&self, values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.inner.upload(values, shape, dtype)
    }
    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.inner.download(x)
    }
    fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.inner.zeros(shape, dtype)
    }
    fn statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<Vec<Statistics>> {
        self.inner.statistics(x, units, target)
    }
    fn norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<Vec<Norm>> {
        self.inner.norms(x, units)
    }
    fn queue_norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<PendingNorms> {
        self.inner.queue_norms(x, units)
    }
    fn finish_norms(&self, pending: PendingNorms) -> Result<Vec<Norm>> {
        self.inner.finish_norms(pending)
    }
    fn row_checks(&self, x: &Tensor, weights: &[Weights<'_>]) -> Result<Vec<Sums>> {
        self.inner.row_checks(x, weights)
    }
    fn matrix_unit(&self, x: &Tensor, w: &Tensor, compute: Compute) -> Result<Option<Tensor>> {
        self.inner.matrix_unit(x, w, compute)
    }
    fn column_checks(&self, x: &Tensor, units: Offsets<'_>) -> Result<Sums> {
        self.inner.column_checks(x, units)
    }
    fn expect_sums(&self, of: Option<Expect>) {
        self.inner.expect_sums(of);
    }
    fn product_sums<'t>(&self, y: &'t Tensor) -> Option<&'t ProductSums> {
        self.inner.product_sums(y)
    }

    // ---- data movement that rounds or reorders
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.cast(&on.bring(x)?, dtype)?]);
        let [y] = self.seen("cast", &[x], None, again, [self.inner.cast(x, dtype)?])?;
        Ok(y)
    }
    fn gather_rows(&self, x: &Tensor, index: &[u32]) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.gather_rows(&on.bring(x)?, index)?]);
        let [y] = self.seen("gather_rows", &[x], None, again, [self.inner.gather_rows(x, index)?])?;
        Ok(y)
    }
    fn scatter_rows(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.scatter_rows(&on.bring(x)?, index, rows)?]);
        let [y] = self.seen("scatter_rows", &[x], None, again, [self.inner.scatter_rows(x, index, rows)?])?;
        Ok(y)
    }

    // ---- products
    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, compute: Compute, out: DType) -> Result<Tensor> {
        let again: Again<'_> = &|on| {
            let bias = bias.map(|b| on.bring(b)).transpose()?;
            Ok(vec![on.device.linear(&on.bring(x)?, &on.bring(w)?, bias.as_ref(), compute, out)?])
        };
        let product = Product::Forward { x, w, bias, compute };
        let y = self.product(&product, |inner| inner.linear(x, w, bias, compute, out))?;
        let [y] = self.seen("linear", &[x, w], Some(product), again, [y])?;
        Ok(y)
    }
    fn linear_input_grad(&self, dy: &Tensor, w: &Tensor, compute: Compute, out: DType) -> Result<Tensor> {
        let again: Again<'_> =
            &|on| Ok(vec![on.device.linear_input_grad(&on.bring(dy)?, &on.bring(w)?, compute, out)?]);
        let product = Product::InputGrad { dy, w, compute };
        let dx = self.product(&product, |inner| inner.linear_input_grad(dy, w, compute, out))?;
        let [dx] = self.seen("linear_input_grad", &[dy, w], Some(product), again, [dx])?;
        Ok(dx)
    }
    fn linear_adapted(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        compute: Compute,
        out: DType,
        branch: &LowRank<'_>,
        scaling: f32,
    ) -> Result<Tensor> {
        if self.sees_everything() {
            return parts::linear_adapted(self, (x, w, bias), (compute, out), branch, scaling);
        }
        let again: Again<'_> = &|on| {
            let (bias, u, b) = (bias.map(|b| on.bring(b)).transpose()?, on.bring(branch.x)?, on.bring(branch.w)?);
            let (x, w, branch) = (on.bring(x)?, on.bring(w)?, LowRank { x: &u, w: &b, ..*branch });
            Ok(vec![on.device.linear_adapted(&x, &w, bias.as_ref(), compute, out, &branch, scaling)?])
        };
        let product = Product::Adapted { x, w, bias, compute, branch: *branch, scaling };
        let adapted = |inner: &dyn Device| inner.linear_adapted(x, w, bias, compute, out, branch, scaling);
        let y = self.product(&product, adapted)?;
        let [y] = self.seen("linear_adapted", &[x, w], Some(product), again, [y])?;
        Ok(y)
    }
    fn linear_input_grad_onto(
        &self,
        so_far: Option<Tensor>,
        branch: Option<&LowRank<'_>>,
        dy: &Tensor,
        w: &Tensor,
        compute: Compute,
        out: DType,
        dtype: DType,
    ) -> Result<Tensor> {
        match self.hook.sees() {
            Sees::Everything => {
                return parts::input_grad_onto(self, so_far, branch, (dy, w), (compute, out, dtype));
            }
            Sees::Nothing => return self.inner.linear_input_grad_onto(so_far, branch, dy, w, compute, out, dtype),
            Sees::Products => {}
        }
        let before = so_far.clone();
        let again: Again<'_> = &|on| {
            let before = before.as_ref().map(|x| on.bring(x)).transpose()?;
            let brought = branch.map(|b| Ok::<_, crate::Error>((on.bring(b.x)?, on.bring(b.w)?))).transpose()?;
            let branch = branch.zip(brought.as_ref()).map(|(b, (x, w))| LowRank { x, w, ..*b });
            let (dy, w) = (on.bring(dy)?, on.bring(w)?);
            Ok(vec![on.device.linear_input_grad_onto(before, branch.as_ref(), &dy, &w, compute, out, dtype)?])
        };
        let branch_too = branch.copied();
        let product = Product::Onto { so_far: before.as_ref(), branch: branch_too, dy, w, compute, out };
        let onto = |inner: &dyn Device| inner.linear_input_grad_onto(so_far, branch, dy, w, compute, out, dtype);
        let dx = self.product(&product, onto)?;
        let [dx] = self.seen("linear_input_grad_onto", &[dy, w], Some(product), again, [dx])?;
        Ok(dx)
    }
    fn linear_weight_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: Offsets<'_>,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let again: Again<'_> =
            &|on| Ok(vec![on.device.linear_weight_grad(&on.bring(dy)?, &on.bring(x)?, units, compute, out)?]);
        let product = Product::WeightGrad { dy, x, units, compute };
        let dw = self.product(&product, |inner| inner.linear_weight_grad(dy, x, units, compute, out))?;
        let [dw] = self.seen("linear_weight_grad", &[dy, x], Some(product), again, [dw])?;
        Ok(dw)
    }

    // ---- elementwise
    fn add(&self, a: &Tensor, b: &Tensor, out: DType) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.add(&on.bring(a)?, &on.bring(b)?, out)?]);
        let [y] = self.seen("add", &[a, b], None, again, [self.inner.add(a, b, out)?])?;
        Ok(y)
    }
    fn scale(&self, x: &Tensor, s: f32, out: DType) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.scale(&on.bring(x)?, s, out)?]);
        let [y] = self.seen("scale", &[x], None, again, [self.inner.scale(x, s, out)?])?;
        Ok(y)
    }
    fn perturb(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.perturb(&on.bring(x)?, seed, stream, ulp_of)?]);
        let [y] = self.seen("perturb", &[x], None, again, [self.inner.perturb(x, seed, stream, ulp_of)?])?;
        Ok(y)
    }
    fn dropout(&self, x: &Tensor, p: f64, keep: Keep<'_>) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.dropout(&on.bring(x)?, p, keep)?]);
        let [y] = self.seen("dropout", &[x], None, again, [self.inner.dropout(x, p, keep)?])?;
        Ok(y)
    }

    // ---- the decoder's own
    fn embedding(&self, table: &Tensor, ids: &[u32], out: DType) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.embedding(&on.bring(table)?, ids, out)?]);
        let [y] = self.seen("embedding", &[table], None, again, [self.inner.embedding(table, ids, out)?])?;
        Ok(y)
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32, out: DType) -> Result<(Tensor, Tensor)> {
        let again: Again<'_> = &|on| {
            let (y, r) = on.device.rms_norm(&on.bring(x)?, &on.bring(w)?, eps, out)?;
            Ok(vec![y, r])
        };
        let (y, r) = self.inner.rms_norm(x, w, eps, out)?;
        let [y, r] = self.seen("rms_norm", &[x, w], None, again, [y, r])?;
        Ok((y, r))
    }
    fn rms_norm_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        r: &Tensor,
        so_far: Option<&Tensor>,
    ) -> Result<Tensor> {
        let again: Again<'_> = &|on| {
            let so_far = so_far.map(|x| on.bring(x)).transpose()?;
            let [dy, x, w, r] = [dy, x, w, r].map(|x| on.bring(x));
            Ok(vec![on.device.rms_norm_grad(&dy?, &x?, &w?, &r?, so_far.as_ref())?])
        };
        let dx = self.inner.rms_norm_grad(dy, x, w, r, so_far)?;
        let [dx] = self.seen("rms_norm_grad", &[dy, x, w], None, again, [dx])?;
        Ok(dx)
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
        let again: Again<'_> = &|on| {
            let (x, cos, sin) = (on.bring(x)?, on.bring(cos)?, on.bring(sin)?);
            Ok(vec![on.device.rope(&x, positions, &cos, &sin, heads, inverse, out)?])
        };
        let y = self.inner.rope(x, positions, cos, sin, heads, inverse, out)?;
        let [y] = self.seen("rope", &[x], None, again, [y])?;
        Ok(y)
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
        let again: Again<'_> = &|on| {
            let (o, lse) = on.device.attention(&on.bring(q)?, &on.bring(k)?, &on.bring(v)?, rows, shape, compute)?;
            Ok(vec![o, lse])
        };
        let (o, lse) = self.inner.attention(q, k, v, rows, shape, compute)?;
        let [o, lse] = self.seen("attention", &[q, k, v], None, again, [o, lse])?;
        Ok((o, lse))
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
        let again: Again<'_> = &|on| {
            let [d_o, q, k, v, o, lse] = [d_o, q, k, v, o, lse].map(|x| on.bring(x));
            let (dq, dk, dv) = on.device.attention_grad(&d_o?, &q?, &k?, &v?, &o?, &lse?, rows, shape, compute)?;
            Ok(vec![dq, dk, dv])
        };
        let (dq, dk, dv) = self.inner.attention_grad(d_o, q, k, v, o, lse, rows, shape, compute)?;
        let [dq, dk, dv] = self.seen("attention_grad", &[d_o, q, k, v], None, again, [dq, dk, dv])?;
        Ok((dq, dk, dv))
    }
    fn gate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.gate(&on.bring(gate)?, &on.bring(up)?)?]);
        let [y] = self.seen("gate", &[gate, up], None, again, [self.inner.gate(gate, up)?])?;
        Ok(y)
    }
    fn gate_grad(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
        let again: Again<'_> = &|on| {
            let (g, u) = on.device.gate_grad(&on.bring(d_out)?, &on.bring(gate)?, &on.bring(up)?)?;
            Ok(vec![g, u])
        };
        let (g, u) = self.inner.gate_grad(d_out, gate, up)?;
        let [g, u] = self.seen("gate_grad", &[d_out, gate, up], None, again, [g, u])?;
        Ok((g, u))
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        let with_losses = |device: &dyn Device, logits: &Tensor| {
            let (losses, d_logits) = device.cross_entropy(logits, labels, seed)?;
            Ok([device.upload(&losses, &[losses.len()], DType::F32)?, d_logits])
        };
        if !self.sees_everything() {
            return self.inner.cross_entropy(logits, labels, seed);
        }
        let again: Again<'_> = &|on| Ok(with_losses(on.device, &on.bring(logits)?)?.into());
        let [losses, d_logits] =
            self.seen("cross_entropy", &[logits], None, again, with_losses(&*self.inner, logits)?)?;
        Ok((self.inner.download(&losses)?, d_logits))
    }

    fn cross_entropy_owned(&self, logits: Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        match self.sees_everything() {
            true => self.cross_entropy(&logits, labels, seed),
            false => self.inner.cross_entropy_owned(logits, labels, seed),
        }
    }

    // ---- optimizer
    fn accumulate_units(&self, acc: &mut Tensor, units: &Tensor) -> Result<()> {
        match self.sees_everything() {
            true => parts::accumulate_units(self, acc, units),
            false => self.inner.accumulate_units(acc, units),
        }
    }
    fn update(&self, tensors: &mut [Update<'_>], factors: [f32; 2]) -> Result<f64> {
        match self.sees_everything() {
            true => parts::update(self, tensors, factors),
            false => self.inner.update(tensors, factors),
        }
    }
    fn norms_of(&self, tensors: &[Tensor], factor: f32) -> Result<Vec<Norm>> {
        match self.sees_everything() {
            true => parts::norms_of(self, tensors, factor),
            false => self.inner.norms_of(tensors, factor),
        }
    }
    fn accumulate(&self, acc: &mut Tensor, g: &Tensor) -> Result<()> {
        self.in_place("accumulate", [acc], &|device, x, on| device.accumulate(x[0], &on.bring(g)?))
    }
    fn scale_in_place(&self, x: &mut Tensor, s: f32) -> Result<()> {
        self.in_place("scale_in_place", [x], &|device, x, _| device.scale_in_place(x[0], s))
    }
    fn adamw(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, with: &AdamW) -> Result<()> {
        self.in_place("adamw", [p, m, v], &|device, x, on| {
            let [p, m, v] = x else { return Err(crate::Error::internal("adamw of other than three tensors")) };
            device.adamw(p, &on.bring(g)?, m, v, with)
        })
    }
    fn sgd(&self, p: &mut Tensor, g: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()> {
        self.in_place("sgd", [p], &|device, x, on| device.sgd(x[0], &on.bring(g)?, learning_rate, weight_decay))
    }
}
