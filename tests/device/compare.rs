//! Comparisons that a NaN cannot pass.

use spikeprobe::device::DType;

use super::reference::{half_ulp, round};

/// Distance in units in the last place of `dtype`; both values are representable in it. None if only one is NaN, or
/// the infinities differ.
pub fn ulps(a: f32, b: f32, dtype: DType) -> Option<u64> {
    if a.is_nan() || b.is_nan() {
        return (a.is_nan() && b.is_nan()).then_some(0);
    }
    if a.is_infinite() || b.is_infinite() {
        return (a == b).then_some(0);
    }
    let ordered = |x: f32| {
        let magnitude = match dtype {
            DType::F32 => x.abs().to_bits() as i64,
            DType::BF16 => half::bf16::from_f32(x.abs()).to_bits() as i64,
            DType::F16 => half::f16::from_f32(x.abs()).to_bits() as i64,
        };
        if x.is_sign_negative() { -magnitude } else { magnitude }
    };
    Some(ordered(a).abs_diff(ordered(b)))
}

/// At least `share` of the elements equal (±0 are), and none further away than `most` ulp of the largest magnitude
/// that entered it: `scale(i)`.
pub fn mostly_equal(what: &str, got: &[f32], want: &[f32], dtype: DType, share: f64, most: f64) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    let epsilon = match dtype {
        DType::F32 => 2f64.powi(-23),
        DType::BF16 => 2f64.powi(-7),
        DType::F16 => 2f64.powi(-10),
    };
    let largest = want.iter().filter(|x| x.is_finite()).fold(0f32, |m, x| m.max(x.abs())) as f64;
    let mut different = 0;
    for (i, (&a, &b)) in got.iter().zip(want).enumerate() {
        let distance = ulps(a, b, dtype).unwrap_or_else(|| panic!("{what}[{i}]: {a} against {b}"));
        different += (distance > 0) as usize;
        let error = (a as f64 - b as f64).abs();
        assert!(
            distance == 0 || error <= most * epsilon * largest,
            "{what}[{i}]: {a:e} against {b:e}, {distance} ulp, largest {largest:e}"
        );
    }
    let equal = 1.0 - different as f64 / got.len() as f64;
    println!("{what}: {:.3} % equal ({different} of {} differ)", 100.0 * equal, got.len());
    assert!(equal >= share, "{what}: only {:.3} % equal", 100.0 * equal);
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
