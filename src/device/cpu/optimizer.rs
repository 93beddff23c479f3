//! Gradient accumulation, AdamW and SGD, with PyTorch's order of operations (contract 6.2).

use super::CpuDevice;
use super::root;
use super::rounding::{Round, round, with_round};
use super::simd::vectorised;
use super::threads::Shared;
use super::values::{expect, values, values_mut};
use crate::Result;
use crate::device::{AdamW, DType, Tensor};

/// The scalars of one update, computed in f64 as Python does and then rounded to f32 as aten's kernels do.
#[derive(Clone, Copy)]
struct Scalars {
    decay: Option<f32>,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    correction2_root: f32,
    epsilon: f32,
    minus_step_size: f32,
}

impl Scalars {
    fn new(with: &AdamW, dtype: DType) -> Self {
        let correction1 = 1.0 - with.beta1.powf(with.step);
        let correction2 = 1.0 - with.beta2.powf(with.step);
        Self {
            decay: (with.weight_decay != 0.0).then_some((1.0 - with.learning_rate * with.weight_decay) as f32),
            one_minus_beta1: (1.0 - with.beta1) as f32,
            beta2: with.beta2 as f32,
            one_minus_beta2: (1.0 - with.beta2) as f32,
            correction2_root: correction2.sqrt() as f32,
            // aten converts add's scalar to the tensors' dtype before the kernel widens it again.
            epsilon: if with.fused { with.epsilon as f32 } else { round(with.epsilon as f32, dtype) },
            minus_step_size: -(with.learning_rate / correction1) as f32,
        }
    }

    /// The second moment after `g`.
    #[inline(always)]
    fn second(&self, v: f32, g: f32, each: impl Fn(f32) -> f32) -> f32 {
        each((self.one_minus_beta2 * g).mul_add(g, each(v * self.beta2)))
    }

    /// One element. The loop of PyTorch ops rounds after `each`; the fused kernel keeps f32 until the end.
    /// Fused multiply-adds stand where aten's vectorised code contracts to them. `sqrt` is the rounded root or MKL's.
    #[inline(always)]
    fn update(&self, [p, m, v]: [&mut f32; 3], g: f32, fused: bool, sqrt: impl Fn(f32) -> f32, round: impl Round) {
        let each = |x: f32| if fused { x } else { round.apply(x) };
        let decayed = self.decay.map_or(*p, |decay| each(*p * decay));
        // lerp: aten starts from the other end where the weight is 0.5 or more.
        let difference = g - *m;
        let first = each(if self.one_minus_beta1 < 0.5 {
            self.one_minus_beta1.mul_add(difference, *m)
        } else {
            (self.one_minus_beta1 - 1.0).mul_add(difference, g)
        });
        let second = self.second(*v, g, each);
        let denominator = each(each(each(sqrt(second)) / self.correction2_root) + self.epsilon);
        *p = round.apply(decayed + self.minus_step_size * first / denominator);
        *m = round.apply(first);
        *v = round.apply(second);
    }
}

impl CpuDevice {
    pub(super) fn accumulate_impl(&self, acc: &mut Tensor, g: &Tensor) -> Result<()> {
        expect(acc.shape == g.shape, "accumulate", || format!("shapes {:?} and {:?}", acc.shape, g.shape))?;
        let source = values(g)?;
        let dtype = acc.dtype;
        with_round!(dtype, round => self.workers.rows(values_mut(acc)?, 1, 1, |first, run| vectorised(#[inline(always)] || {
            for (a, &g) in run.iter_mut().zip(&source[first..]) {
                *a = round.apply(*a + g);
            }
        })));
        Ok(())
    }

    pub(super) fn accumulate_units_impl(&self, acc: &mut Tensor, units: &Tensor) -> Result<()> {
        let n = acc.elements();
        expect(n > 0 && units.elements().is_multiple_of(n), "accumulate_units", || {
            format!("shapes {:?} and {:?}", acc.shape, units.shape)
        })?;
        let source = values(units)?;
        let (dtype, count) = (acc.dtype, source.len() / n);
        with_round!(dtype, round => self.workers.rows(values_mut(acc)?, 1, count, |first, run| vectorised(#[inline(always)] || {
            // A few cache lines of the sum at a time, so that it stays in registers or close to them.
            for (i, run) in run.chunks_mut(256).enumerate() {
                for unit in 0..count {
                    let unit = &source[unit * n + first + i * 256..][..run.len()];
                    for (a, &g) in run.iter_mut().zip(unit) {
                        *a = round.apply(*a + g);
                    }
                }
            }
        })));
        Ok(())
    }

    pub(super) fn scale_in_place_impl(&self, x: &mut Tensor, s: f32) -> Result<()> {
        let dtype = x.dtype;
        with_round!(dtype, round => self.workers.rows(values_mut(x)?, 1, 1, |_, run| vectorised(#[inline(always)] || {
            for x in run {
                *x = round.apply(*x * s);
            }
        })));
        Ok(())
    }

    pub(super) fn adamw_impl(
        &self,
        p: &mut Tensor,
        g: &Tensor,
        m: &mut Tensor,
        v: &mut Tensor,
        with: &AdamW,
    ) -> Result<()> {
        let n = p.elements();
        expect(
            g.elements() == n && m.elements() == n && v.elements() == n && m.dtype == p.dtype && v.dtype == p.dtype,
            "adamw",
            || {
                format!(
                    "p {:?} {:?}, g {:?}, m {:?} {:?}, v {:?}",
                    p.shape, p.dtype, g.shape, m.shape, m.dtype, v.shape
                )
            },
        )?;
        let dtype = p.dtype;
        let scalars = Scalars::new(with, dtype);
        // torch.sqrt of an f32 tensor; the fused kernel and half tensors take the processor's root.
        let by_mkl = dtype == DType::F32 && !with.fused;
        let gradient = values(g)?;
        let (m, v) = (Shared::new(values_mut(m)?), Shared::new(values_mut(v)?));
        with_round!(dtype, round => self.workers.rows(values_mut(p)?, 1, 8, |first, p| {
            // SAFETY: `rows` hands out disjoint runs; m and v are cut exactly as p is.
            let (m, v) = unsafe { (m.slice(first, p.len()), v.slice(first, p.len())) };
            let g = &gradient[first..][..p.len()];
            vectorised(#[inline(always)] || {
                if !by_mkl {
                    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
                        scalars.update([p, m, v], g, with.fused, f32::sqrt, round);
                    }
                    return;
                }
                let mut roots = [0.0; root::BLOCK];
                let (p, g) = (p.chunks_mut(root::BLOCK), g.chunks(root::BLOCK));
                let (m, v) = (m.chunks_mut(root::BLOCK), v.chunks_mut(root::BLOCK));
                for (((p, g), m), v) in p.zip(g).zip(m).zip(v) {
                    let roots = &mut roots[..p.len()];
                    for ((root, &g), &v) in roots.iter_mut().zip(g).zip(&*v) {
                        *root = scalars.second(v, g, |x| x);
                    }
                    root::roots(roots);
                    for ((((p, &g), m), v), &root) in p.iter_mut().zip(g).zip(m).zip(v).zip(&*roots) {
                        scalars.update([p, m, v], g, false, |_| root, round);
                    }
                }
            });
        }));
        Ok(())
    }

    pub(super) fn sgd_impl(&self, p: &mut Tensor, g: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()> {
        expect(p.shape == g.shape, "sgd", || format!("shapes {:?} and {:?}", p.shape, g.shape))?;
        let gradient = values(g)?;
        let dtype = p.dtype;
        // aten converts add's alpha to the tensors' dtype before the kernel widens it again.
        let (rate, decay) = (round(-learning_rate as f32, dtype), round(weight_decay as f32, dtype));
        with_round!(dtype, round => self.workers.rows(values_mut(p)?, 1, 2, |first, run| vectorised(#[inline(always)] || {
            for (p, &g) in run.iter_mut().zip(&gradient[first..]) {
                let g = if decay == 0.0 { g } else { round.apply(decay.mul_add(*p, g)) };
                *p = round.apply(rate.mul_add(g, *p));
            }
        })));
        Ok(())
    }
}
