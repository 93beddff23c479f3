//! Which single bit of a number, flipped, explains another number.

/// The value with one bit of its IEEE 754 binary32 pattern flipped (bit 31: sign, 30..23: exponent).
pub fn flipped(value: f32, bit: u32) -> f32 {
    f32::from_bits(value.to_bits() ^ (1 << bit))
}

/// Bits of `before` that, flipped, come nearest to `after`, best first, with the distance left. Only flips that
/// bring it nearer than no flip at all. `half`: the value is stored in bf16, whose bits are the upper 16.
pub fn candidates(before: f32, after: f32, half: bool) -> Vec<(u32, f64)> {
    let distance = |value: f32| (f64::from(value) - f64::from(after)).abs();
    let unflipped = distance(before);
    let lowest = if half { 16 } else { 0 };
    let mut all: Vec<(u32, f64)> = (lowest..32)
        .map(|bit| (bit, distance(flipped(before, bit))))
        .filter(|(_, d)| d.is_finite() && *d < unflipped)
        .collect();
    all.sort_by(|a, b| a.1.total_cmp(&b.1));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exponent_bit_is_found_through_the_drift_of_a_few_steps() {
        let before = 0.0123_f32;
        let after = flipped(before, 27) + 1e-3 * flipped(before, 27);
        assert_eq!(candidates(before, after, false)[0].0, 27);
    }

    #[test]
    fn an_unchanged_value_has_no_candidate() {
        assert!(candidates(0.5, 0.5, false).is_empty());
    }

    #[test]
    fn a_bf16_value_has_no_lower_bits() {
        assert!(candidates(1.0, 1.000_1, true).iter().all(|(bit, _)| *bit >= 16));
    }
}
