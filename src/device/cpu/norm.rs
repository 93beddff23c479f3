//! RMSNorm as Hugging Face writes it, and its gradient with the weight frozen.

use super::rounding::{Round, with_round};
use super::simd::vectorised;
use super::threads::Shared;
use super::values::{expect, tensor, values};
use super::{Buffer, CpuDevice, math};
use crate::Result;
use crate::device::{DType, Tensor};

impl CpuDevice {
    pub(super) fn rms_norm_impl(&self, x: &Tensor, w: &Tensor, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
        let columns = w.elements();
        expect(columns > 0 && x.elements().is_multiple_of(columns), "rms_norm", || {
            format!("shape {:?} does not divide into rows of {columns}", x.shape)
        })?;
        let rows = x.elements() / columns;
        let (source, weight) = (values(x)?, values(w)?);
        let mut y = Buffer::unset(source.len());
        let mut r = Buffer::unset(rows);
        let inverse = Shared::new(&mut r);
        with_round!(x.dtype, inner => with_round!(dtype, outer => {
            self.fill(&mut y, (&x.shape, dtype), columns, 4, |first, y| vectorised(#[inline(always)] || {
                // SAFETY: one element per row, and rows belong to one task each.
                let r = unsafe { inverse.slice(first, y.len() / columns) };
                for (i, (y, r)) in y.chunks_exact_mut(columns).zip(r).enumerate() {
                    let x = &source[(first + i) * columns..][..columns];
                    let mean = math::torch_sum([x], |[x]| x * x) / columns as f32;
                    *r = 1.0 / (mean + eps).sqrt();
                    for ((y, &x), &w) in y.iter_mut().zip(x).zip(weight.iter()) {
                        *y = outer.apply(w * inner.apply(x * *r));
                    }
                }
            }));
        }));
        Ok((tensor(y, x.shape.clone(), dtype), tensor(r, vec![rows], DType::F32)))
    }

    /// aten's order of operations: mul backward (rounded to x's dtype), then in f32 the backward of x·r, rsqrt, mean, pow.
    /// In f32, where the cast before them is nothing, the gradients of x·r and of pow reach x's sum one by one.
    pub(super) fn rms_norm_grad_impl(
        &self,
        dy: &Tensor,
        (x, w, r): (&Tensor, &Tensor, &Tensor),
        so_far: Option<&Tensor>,
    ) -> Result<Tensor> {
        let columns = w.elements();
        let same = |other: &Tensor| other.elements() == x.elements() && other.dtype == x.dtype;
        expect(so_far.is_none_or(same), "rms_norm_grad", || {
            format!("x {:?} in {:?}, and another sum so far", x.shape, x.dtype)
        })?;
        expect(
            columns > 0 && x.elements() == r.elements() * columns && dy.elements() == x.elements(),
            "rms_norm_grad",
            || format!("dy {:?}, x {:?}, w {columns}, r {}", dy.shape, x.shape, r.elements()),
        )?;
        let (dy, source, weight, r) = (values(dy)?, values(x)?, values(w)?, values(r)?);
        let so_far = so_far.map(values).transpose()?;
        let in_turn = x.dtype == DType::F32;
        let mut dx = Buffer::unset(source.len());
        with_round!(x.dtype, round => self.fill(&mut dx, (&x.shape, x.dtype), columns, 6, |first, dx| vectorised(#[inline(always)] || {
            for (i, dx) in dx.chunks_exact_mut(columns).enumerate() {
                let at = (first + i) * columns;
                let (dy, x, r) = (&dy[at..at + columns], &source[at..at + columns], r[first + i]);
                // dx holds g = round(dy·w) until its last pass.
                for ((g, &d), &w) in dx.iter_mut().zip(dy).zip(weight.iter()) {
                    *g = round.apply(d * w);
                }
                let d_r = math::torch_sum([dx, x], |[g, x]| g * x);
                let d_mean = -0.5 * d_r * (r * r * r) / columns as f32;
                let terms = |g: f32, x: f32| (g * r, d_mean * (2.0 * x));
                let sum = |(a, b): (f32, f32)| round.apply(a + b);
                match so_far.as_ref().map(|all| &all[at..at + columns]) {
                    None => dx.iter_mut().zip(x).for_each(|(g, &x)| *g = sum(terms(*g, x))),
                    Some(so_far) if in_turn => dx.iter_mut().zip(x).zip(so_far).for_each(|((g, &x), &so_far)| {
                        let (by_scale, by_mean) = terms(*g, x);
                        *g = (so_far + by_scale) + by_mean;
                    }),
                    Some(so_far) => dx.iter_mut().zip(x).zip(so_far).for_each(|((g, &x), &so_far)| {
                        *g = round.apply(so_far + sum(terms(*g, x)));
                    }),
                }
            }
        })));
        Ok(tensor(dx, x.shape.clone(), x.dtype))
    }
}
