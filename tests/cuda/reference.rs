//! What results are compared with: f64 arithmetic, one rounding, bounds that name their reason.

use spikeprobe::device::{Compute, DType, Device, Tensor};

pub const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

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

pub fn download(device: &dyn Device, x: &Tensor) -> Vec<f32> {
    device.download(x).expect("download")
}

/// Equal bits, but that any NaN equals any NaN.
#[track_caller]
pub fn same(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let equal = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(equal, "{what}[{i}]: {a:e} ({:08x}) against {b:e} ({:08x})", a.to_bits(), b.to_bits());
    }
}

/// |got − want| ≤ bound(i) + half an ulp of the rounding; NaN only against NaN, infinities equal.
#[track_caller]
pub fn close(what: &str, got: &[f32], want: &[f64], dtype: DType, bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (&a, &b)) in got.iter().zip(want).enumerate() {
        if b.is_nan() || a.is_nan() {
            assert!(b.is_nan() && a.is_nan(), "{what}[{i}]: {a} against {b}");
            continue;
        }
        let wide = round(b as f32, dtype) as f64;
        if wide.is_infinite() || a.is_infinite() {
            assert!(wide == a as f64, "{what}[{i}]: {a} against {wide}");
            continue;
        }
        let allowed = bound(i) + half_ulp(b.abs().max(a.abs() as f64), dtype);
        assert!((a as f64 - b).abs() <= allowed, "{what}[{i}]: {a:e} against {b:e}, allowed {allowed:e}");
    }
}
