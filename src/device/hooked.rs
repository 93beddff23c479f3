//! A device whose results somebody looks at, or changes, between one operation and the next.
//!
//! Fault injection, checksums, recomputation on another device and reference arithmetics are hooks; what they have in
//! common, forwarding every operation, is here.

use std::sync::{Arc, PoisonError, RwLock};

use super::checks::Weights;
use super::{AdamW, AttentionShape, Compute, DType, Device, Offsets, Statistics, Tensor};
use crate::Result;

/// Sees each operation after it ran.
pub trait Hook: Send + Sync {
    /// What it returns is the result from here on.
    ///
    /// # Errors
    /// Stops the pass.
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>>;

    /// Whether [`Call::again`] is wanted for operations in place too; their operands are then copied first.
    fn repeats_in_place(&self) -> bool {
        false
    }
}

/// An operation to be run again, with its results.
pub type Again<'c> = &'c dyn Fn(&Elsewhere<'_>) -> Result<Vec<Tensor>>;

/// An operation in place, on the tensors it changes.
type InPlace<'c> = &'c dyn Fn(&dyn Device, &mut [&mut Tensor], &Elsewhere<'_>) -> Result<()>;

/// One operation with its operands.
pub struct Call<'c> {
    /// The method of [`Device`].
    pub operation: &'static str,
    pub operands: &'c [&'c Tensor],
    pub product: Option<Product<'c>>,
    /// The operation once more, on any device. None for one in place, unless [`Hook::repeats_in_place`].
    pub again: Option<Again<'c>>,
}

/// The operands of a matrix product.
#[derive(Clone, Copy)]
pub enum Product<'c> {
    /// x [n, in] · w [out, in]ᵀ (+ bias).
    Forward { x: &'c Tensor, w: &'c Tensor, bias: Option<&'c Tensor>, compute: Compute },
    /// dy [n, out] · w [out, in].
    InputGrad { dy: &'c Tensor, w: &'c Tensor, compute: Compute },
    /// Per unit dy[u]ᵀ · x[u].
    WeightGrad { dy: &'c Tensor, x: &'c Tensor, units: Offsets<'c>, compute: Compute },
}

/// A device that may not be the one the operands lie on.
pub struct Elsewhere<'e> {
    pub device: &'e dyn Device,
    /// Where the operands lie, if their elements have to be carried over.
    pub from: Option<&'e dyn Device>,
}

impl Elsewhere<'_> {
    fn bring(&self, x: &Tensor) -> Result<Tensor> {
        match self.from {
            None => Ok(x.clone()),
            Some(from) => self.device.upload(&from.download(x)?, &x.shape, x.dtype),
        }
    }
}

/// A hook that can be exchanged while the device is in use; without one, nothing is seen.
#[derive(Default)]
pub struct Switch(RwLock<Option<Arc<dyn Hook>>>);

impl Switch {
    pub fn set(&self, hook: Option<Arc<dyn Hook>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hook;
    }
    fn current(&self) -> Option<Arc<dyn Hook>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Hook for Switch {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        match self.current() {
            None => Ok(result),
            Some(hook) => hook.after(device, call, result),
        }
    }
    fn repeats_in_place(&self) -> bool {
        self.current().is_some_and(|hook| hook.repeats_in_place())
    }
}

/// `inner`, seen by `hook`.
pub struct Hooked {
    pub inner: Arc<dyn Device>,
    pub hook: Arc<dyn Hook>,
}

impl Hooked {
    fn seen<const N: usize>(
        &self,
        operation: &'static str,
        operands: &[&Tensor],
        product: Option<Product<'_>>,
        again: Again<'_>,
        result: [Tensor; N],
    ) -> Result<[Tensor; N]> {
        let call = Call { operation, operands, product, again: Some(again) };
        whole(self.hook.after(&*self.inner, &call, result.into())?, operation)
    }

    /// An operation that changes tensors in place, `operate`d on by any device.
    fn in_place<const N: usize>(
        &self,
        operation: &'static str,
        mut tensors: [&mut Tensor; N],
        operate: InPlace<'_>,
    ) -> Result<()> {
        let here = Elsewhere { device: &*self.inner, from: None };
        let copy = |x: &Tensor| self.inner.upload(&self.inner.download(x)?, &x.shape, x.dtype);
        let before: Option<Vec<Tensor>> = match self.hook.repeats_in_place() {
            true => Some(tensors.iter().map(|x| copy(x)).collect::<Result<_>>()?),
            false => None,
        };
        operate(&*self.inner, &mut tensors, &here)?;
        let again = |there: &Elsewhere<'_>| {
            let mut brought = Vec::new();
            for x in before.iter().flatten() {
                brought.push(there.device.upload(&self.inner.download(x)?, &x.shape, x.dtype)?);
            }
            operate(there.device, &mut brought.iter_mut().collect::<Vec<_>>(), there)?;
            Ok(brought)
        };
        let again = before.is_some().then_some(&again as Again<'_>);
        let call = Call { operation, operands: &[], product: None, again };
        // The caller's tensors are given up, so that the hook's are the only ones and stay writable in place.
        let placeholder = self.inner.zeros(&[0], DType::F32)?;
        let result = tensors.iter_mut().map(|x| std::mem::replace(*x, placeholder.clone())).collect();
        let result: [Tensor; N] = whole(self.hook.after(&*self.inner, &call, result)?, operation)?;
        tensors.into_iter().zip(result).for_each(|(x, after)| *x = after);
        Ok(())
    }
}

fn whole<const N: usize>(result: Vec<Tensor>, operation: &str) -> Result<[Tensor; N]> {
    let count = result.len();
    result
        .try_into()
        .map_err(|_| crate::Error::internal(format!("a hook made {count} results of the {N} of {operation}")))
}

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
    fn norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<Vec<(f32, u64)>> {
        self.inner.norms(x, units)
    }
    fn row_checks(&self, x: &Tensor, weights: Option<Weights<'_>>) -> Result<Vec<(f64, f64)>> {
        self.inner.row_checks(x, weights)
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
        let [y] = self.seen("linear", &[x, w], Some(product), again, [self.inner.linear(x, w, bias, compute, out)?])?;
        Ok(y)
    }
    fn linear_input_grad(&self, dy: &Tensor, w: &Tensor, compute: Compute, out: DType) -> Result<Tensor> {
        let again: Again<'_> =
            &|on| Ok(vec![on.device.linear_input_grad(&on.bring(dy)?, &on.bring(w)?, compute, out)?]);
        let product = Product::InputGrad { dy, w, compute };
        let dx = self.inner.linear_input_grad(dy, w, compute, out)?;
        let [dx] = self.seen("linear_input_grad", &[dy, w], Some(product), again, [dx])?;
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
        let dw = self.inner.linear_weight_grad(dy, x, units, compute, out)?;
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
    fn dropout(&self, x: &Tensor, p: f32, seed: u64, stream: u64) -> Result<Tensor> {
        let again: Again<'_> = &|on| Ok(vec![on.device.dropout(&on.bring(x)?, p, seed, stream)?]);
        let [y] = self.seen("dropout", &[x], None, again, [self.inner.dropout(x, p, seed, stream)?])?;
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
    fn rms_norm_grad(&self, dy: &Tensor, x: &Tensor, w: &Tensor, r: &Tensor) -> Result<Tensor> {
        let again: Again<'_> =
            &|on| Ok(vec![on.device.rms_norm_grad(&on.bring(dy)?, &on.bring(x)?, &on.bring(w)?, &on.bring(r)?)?]);
        let [dx] = self.seen("rms_norm_grad", &[dy, x, w], None, again, [self.inner.rms_norm_grad(dy, x, w, r)?])?;
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
        let again: Again<'_> = &|on| Ok(with_losses(on.device, &on.bring(logits)?)?.into());
        let [losses, d_logits] =
            self.seen("cross_entropy", &[logits], None, again, with_losses(&*self.inner, logits)?)?;
        Ok((self.inner.download(&losses)?, d_logits))
    }

    // ---- optimizer
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
