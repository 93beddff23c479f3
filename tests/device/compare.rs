//! Comparisons that a NaN cannot pass.

use spikeprobe::device::DType;

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

/// |got − want| ≤ most, element by element; NaN only against NaN, infinity only against the same infinity.
pub fn within(what: &str, got: &[f32], want: &[f64], most: &[f64]) {
    assert_eq!((got.len(), most.len()), (want.len(), want.len()), "{what}: lengths");
    for (i, (&a, &b)) in got.iter().zip(want).enumerate() {
        let a = a as f64;
        let same = (a.is_nan() && b.is_nan()) || a == b;
        // Written so that a NaN difference fails.
        let close = (a - b).abs() <= most[i];
        assert!(same || close, "{what}[{i}]: {a:e} against {b:e}, bound {:e}", most[i]);
    }
}

/// The same bits, any NaN equal to any other.
pub fn identical(what: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(same, "{what}[{i}]: {a:e} ({:08x}) against {b:e} ({:08x})", a.to_bits(), b.to_bits());
    }
}
