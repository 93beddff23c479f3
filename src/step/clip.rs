//! Gradient norm and clipping as torch.nn.utils.clip_grad_norm_ does it (contract 6.1).
//!
//! Owns the arithmetic between per-tensor norms and the factor on every gradient; the tensors stay on the device.

use half::{bf16, f16};

use crate::device::DType;
use crate::device::cpu::VectorNorm;

/// What clip_grad_norm_ found and did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    /// Pre-clip L2 norm, as the trainer logs it.
    pub norm: f32,
    /// min(1, max_norm / (norm + 1e-6)); NaN for a NaN norm.
    pub coefficient: f32,
}

/// `norms`: ‖g_j‖₂ of every gradient tensor, rounded to the tensors' dtype. Each step rounds to that dtype, as the
/// tensor operations of PyTorch do. `max_norm` ≤ 0 clips nothing (contract 5.5: transformers 5 then passes infinity).
pub fn clip(norms: &[f32], max_norm: f64, dtype: DType) -> Clip {
    let norms: Vec<f32> = norms.iter().map(|&n| round(n, dtype)).collect();
    let mut total = VectorNorm::default();
    total.add(&norms);
    let norm = round(total.finish(), dtype);
    if max_norm <= 0.0 {
        return Clip { norm, coefficient: 1.0 };
    }
    // tensor + 1e-6, then max_norm / tensor, which torch computes as reciprocal · max_norm.
    let reciprocal = round(1.0 / round(norm + 1e-6, dtype), dtype);
    let ratio = round(reciprocal * max_norm as f32, dtype);
    // torch.clamp(max=1.0) keeps NaN; f32::min would not.
    Clip { norm, coefficient: if ratio > 1.0 { 1.0 } else { ratio } }
}

/// x rounded to nearest even in `dtype`.
pub fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
    }
}
