//! Rotary position embedding (half-split, Hugging Face's rotate_half) and its gradient.

use super::rounding::{Round, with_round};
use super::simd::vectorised;
use super::values::{expect, tensor, values};
use super::{Buffer, CpuDevice};
use crate::Result;
use crate::device::{DType, Tensor};

/// What a rotation needs besides the vectors.
pub(super) struct Rotation<'a> {
    pub positions: &'a [u32],
    pub cos: &'a Tensor,
    pub sin: &'a Tensor,
    pub heads: usize,
    pub inverse: bool,
}

impl CpuDevice {
    pub(super) fn rope_impl(&self, x: &Tensor, with: &Rotation<'_>, dtype: DType) -> Result<Tensor> {
        let (rows, columns) = (x.rows(), x.columns());
        let half = with.cos.columns();
        expect(columns == with.heads * half * 2 && with.positions.len() == rows, "rope", || {
            format!("x {:?}, {} heads, tables of {half}, {} positions", x.shape, with.heads, with.positions.len())
        })?;
        for &p in with.positions {
            expect((p as usize) < with.cos.rows().min(with.sin.rows()), "rope", || {
                format!("position {p} of {}", with.cos.rows())
            })?;
        }
        let (source, cos, sin) = (values(x)?, values(with.cos)?, values(with.sin)?);
        let mut out = Buffer::unset(source.len());
        let sign = if with.inverse { -1.0f32 } else { 1.0 };
        with_round!(dtype, round => self.fill(&mut out, (&x.shape, dtype), columns, 3, |first, run| vectorised(#[inline(always)] || {
            for (i, y) in run.chunks_exact_mut(columns).enumerate() {
                let x = &source[(first + i) * columns..][..columns];
                let at = with.positions[first + i] as usize * half;
                let (cos, sin) = (&cos[at..at + half], &sin[at..at + half]);
                for (y, x) in y.chunks_exact_mut(2 * half).zip(x.chunks_exact(2 * half)) {
                    let ((y1, y2), (x1, x2)) = (y.split_at_mut(half), x.split_at(half));
                    for j in 0..half {
                        let s = sign * sin[j];
                        y1[j] = round.apply(round.apply(x1[j] * cos[j]) + round.apply(-x2[j] * s));
                        y2[j] = round.apply(round.apply(x2[j] * cos[j]) + round.apply(x1[j] * s));
                    }
                }
            }
        })));
        Ok(tensor(out, x.shape.clone(), dtype))
    }
}
