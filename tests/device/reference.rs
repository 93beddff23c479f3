//! What results are compared with: one rounding by other means than ours, and generated values.

use spikeprobe::device::{Compute, DType, Device, Tensor};

/// x rounded to `dtype`, by the half crate: independent of our own rounding.
pub fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
    }
}

/// An operand of a product. TF32 keeps 10 mantissa bits, ties away from zero.
pub fn operand(x: f32, compute: Compute) -> f32 {
    match compute {
        Compute::F32 => x,
        Compute::Bf16 => round(x, DType::BF16),
        Compute::F16 => round(x, DType::F16),
        Compute::Tf32 if x.is_finite() => f32::from_bits((x.to_bits() + 0x1000) & 0xFFFF_E000),
        Compute::Tf32 => x,
    }
}

/// Half the distance between neighbours at x in `dtype`, at least that of the smallest subnormal.
pub fn half_ulp(x: f64, dtype: DType) -> f64 {
    let (bits, least) = match dtype {
        DType::F32 => (24, -149),
        DType::BF16 => (8, -133),
        DType::F16 => (11, -24),
    };
    let exponent = if x == 0.0 { least } else { (x.abs().log2().floor() as i32 - bits + 1).max(least) };
    2f64.powi(exponent - 1)
}

/// Pseudo-random values in (−2, 2), a few of them tiny or large, from a fixed generator.
pub fn values(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let unit = (state >> 40) as f32 / (1u64 << 24) as f32;
            (unit - 0.5) * 4.0 * if state.is_multiple_of(31) { 1e-3 } else { 1.0 }
        })
        .collect()
}

/// Values of `dtype` on the device, and the same as f64 for the reference.
pub fn upload(device: &dyn Device, values: &[f32], shape: &[usize], dtype: DType) -> (Tensor, Vec<f64>) {
    let tensor = device.upload(values, shape, dtype).expect("upload");
    (tensor, values.iter().map(|&x| round(x, dtype) as f64).collect())
}
