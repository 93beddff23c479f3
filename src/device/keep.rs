//! What dropout keeps.

use half::{bf16, f16};

use super::{DType, Tensor};
use crate::{Error, Result};

/// Which elements of a tensor dropout keeps.
#[derive(Debug, Clone, Copy)]
pub enum Keep<'a> {
    /// Those whose [`noise::unit`](super::noise::unit) of (seed, stream, element) is at least p.
    Drawn { seed: u64, stream: u64 },
    /// Those whose bit is set: bit i % 32 of word i / 32, row-major.
    Bits(&'a [u32]),
}

impl Keep<'_> {
    /// What a kept element of `x` is multiplied with: 1 / (1 − p) as `noise.div_(1 − p)` leaves it in x's dtype.
    ///
    /// # Errors
    /// p outside [0, 1), or fewer bits than elements.
    pub(super) fn factor(&self, p: f64, x: &Tensor) -> Result<f32> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::internal(format!("dropout with probability {p}")));
        }
        match self {
            Keep::Bits(words) if 32 * words.len() < x.elements() => {
                return Err(Error::internal(format!("{} words of mask for shape {:?}", words.len(), x.shape)));
            }
            _ => {}
        }
        let factor = 1.0 / (1.0 - p) as f32;
        Ok(match x.dtype {
            DType::F32 => factor,
            DType::BF16 => bf16::from_f32(factor).to_f32(),
            DType::F16 => f16::from_f32(factor).to_f32(),
        })
    }
}
