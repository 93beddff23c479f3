//! What follows from measurements: headroom, underflow, the first site out of range, exponents, lost updates.
//!
//! Pure functions of numbers already gathered.

use super::Measurement;
use crate::device::{DType, Statistics};

/// Largest finite magnitude of a dtype.
pub fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => f64::from(f32::MAX),
        DType::BF16 => half::bf16::MAX.to_f64(),
        DType::F16 => half::f16::MAX.to_f64(),
    }
}

impl Measurement {
    /// Non-finite elements, and finite ones that the range's dtype would round to infinity.
    pub fn out_of_range(&self) -> u64 {
        let s = &self.statistics;
        s.nan + s.pos_inf + s.neg_inf + s.overflow
    }

    /// Binades between the largest finite magnitude measured and the range's largest number: negative beyond it,
    /// infinite for an all-zero tensor. fp16's 65504 with a maximum of 1024 leaves 6.0.
    pub fn headroom(&self) -> f64 {
        largest(self.range).log2() - f64::from(self.statistics.max_abs).log2()
    }

    /// Share of non-zero finite elements that the range's dtype rounds to zero; 0 when there are none.
    pub fn underflow_share(&self) -> f64 {
        share(&self.statistics, self.statistics.underflow)
    }

    /// Share of non-zero finite elements below the range's smallest normal number.
    pub fn subnormal_share(&self) -> f64 {
        share(&self.statistics, self.statistics.subnormal)
    }
}

fn share(s: &Statistics, count: u64) -> f64 {
    let counted = s.elements.saturating_sub(s.nan + s.pos_inf + s.neg_inf + s.zero);
    if counted == 0 { 0.0 } else { count as f64 / counted as f64 }
}

/// The first measurement, in execution order (forward, then backward), with an element out of range.
pub fn first_out_of_range(measurements: &[Measurement]) -> Option<&Measurement> {
    measurements.iter().find(|m| m.out_of_range() > 0)
}

/// The measurement with the least headroom. Sites with non-finite elements count as none left.
pub fn least_headroom(measurements: &[Measurement]) -> Option<&Measurement> {
    let left = |m: &Measurement| if m.out_of_range() > 0 { f64::NEG_INFINITY } else { m.headroom() };
    measurements.iter().min_by(|a, b| left(a).total_cmp(&left(b)))
}

/// How many elements have each binary exponent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExponentHistogram {
    /// `counts[i]`: magnitudes in [2^(i − 149), 2^(i − 148)). f32's exponents, subnormal ones included.
    pub counts: Vec<u64>,
    pub zero: u64,
    pub nonfinite: u64,
}

impl ExponentHistogram {
    /// Exponent of the first bin.
    pub const LOWEST: i32 = -149;
    const BINS: usize = 149 + 128;

    pub fn of(values: &[f32]) -> Self {
        let mut histogram = Self { counts: vec![0; Self::BINS], zero: 0, nonfinite: 0 };
        for &value in values {
            match exponent(value) {
                None if value == 0.0 => histogram.zero += 1,
                None => histogram.nonfinite += 1,
                Some(e) => histogram.counts[(e - Self::LOWEST) as usize] += 1,
            }
        }
        histogram
    }

    /// (exponent, count) of the bins that are not empty, ascending.
    pub fn filled(&self) -> impl Iterator<Item = (i32, u64)> {
        self.counts.iter().enumerate().filter(|(_, n)| **n > 0).map(|(i, &n)| (i as i32 + Self::LOWEST, n))
    }
}

/// ⌊log₂|x|⌋; `None` for zero and non-finite x.
fn exponent(x: f32) -> Option<i32> {
    let magnitude = x.to_bits() & 0x7FFF_FFFF;
    match magnitude >> 23 {
        0 if magnitude == 0 => None,
        0 => Some(-118 - magnitude.leading_zeros() as i32),
        255 => None,
        biased => Some(biased as i32 - 127),
    }
}

/// What rounding left of a parameter update.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct UpdateLoss {
    /// Elements that were to move.
    pub wanted: u64,
    /// Of these, elements that kept their value: the update was below half an ulp.
    pub unmoved: u64,
    /// ‖wanted update‖₂ and ‖achieved update‖₂.
    pub wanted_norm: f64,
    pub achieved_norm: f64,
}

impl UpdateLoss {
    /// Compares the update `wanted` (f32, as the optimizer computed it) with what became of a matrix.
    pub fn of(before: &[f32], wanted: &[f32], after: &[f32]) -> Self {
        let mut loss = Self::default();
        for ((&before, &wanted), &after) in before.iter().zip(wanted).zip(after) {
            let achieved = f64::from(after) - f64::from(before);
            loss.wanted += u64::from(wanted != 0.0);
            loss.unmoved += u64::from(wanted != 0.0 && achieved == 0.0);
            loss.wanted_norm += f64::from(wanted) * f64::from(wanted);
            loss.achieved_norm += achieved * achieved;
        }
        loss.wanted_norm = loss.wanted_norm.sqrt();
        loss.achieved_norm = loss.achieved_norm.sqrt();
        loss
    }

    /// Both together, as of one larger matrix.
    #[must_use]
    pub fn merge(self, other: Self) -> Self {
        Self {
            wanted: self.wanted + other.wanted,
            unmoved: self.unmoved + other.unmoved,
            wanted_norm: self.wanted_norm.hypot(other.wanted_norm),
            achieved_norm: self.achieved_norm.hypot(other.achieved_norm),
        }
    }

    /// Share of the elements that were to move and did not; 0 when none was.
    pub fn lost_share(&self) -> f64 {
        if self.wanted == 0 { 0.0 } else { self.unmoved as f64 / self.wanted as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::{Part, Role, Site};

    fn measured(part: Part, statistics: Statistics) -> Measurement {
        let site = Site::outside(part, Role::Output);
        Measurement { site, unit: None, dtype: DType::BF16, range: DType::F16, statistics, values: None }
    }

    #[test]
    fn headroom_counts_binades_to_the_largest_number() {
        let m = measured(Part::Logits, Statistics { max_abs: 1023.5, elements: 4, ..Statistics::default() });
        assert!((m.headroom() - 6.0).abs() < 1e-9);
        let m = measured(Part::Logits, Statistics { max_abs: 131_008.0, overflow: 1, ..Statistics::default() });
        assert!((m.headroom() + 1.0).abs() < 1e-9);
        assert_eq!(m.out_of_range(), 1);
        assert_eq!(measured(Part::Logits, Statistics::default()).headroom(), f64::INFINITY);
    }

    #[test]
    fn shares_leave_zeros_and_non_finite_elements_out() {
        let s = Statistics {
            elements: 10,
            zero: 4,
            nan: 1,
            pos_inf: 1,
            underflow: 1,
            subnormal: 2,
            ..Statistics::default()
        };
        let m = measured(Part::Logits, s);
        assert_eq!((m.underflow_share(), m.subnormal_share()), (0.25, 0.5));
        let zeros = measured(Part::Logits, Statistics { elements: 3, zero: 3, ..Statistics::default() });
        assert_eq!(zeros.underflow_share(), 0.0);
    }

    #[test]
    fn the_first_site_out_of_range_is_the_first_in_execution_order() {
        let fine = measured(Part::Embedding, Statistics { elements: 1, max_abs: 8.0, ..Statistics::default() });
        let close = measured(Part::FinalNorm, Statistics { elements: 1, max_abs: 60_000.0, ..Statistics::default() });
        let nan = measured(Part::Logits, Statistics { elements: 1, nan: 1, ..Statistics::default() });
        let all = [fine.clone(), close.clone(), nan.clone()];
        assert_eq!(first_out_of_range(&all), Some(&nan));
        assert_eq!(least_headroom(&all), Some(&nan));
        assert_eq!(least_headroom(&all[..2]), Some(&close));
        assert_eq!(first_out_of_range(&all[..2]), None);
    }

    #[test]
    fn exponents_of_normal_subnormal_and_odd_values() {
        let smallest = f32::from_bits(1);
        let values =
            [1.0, -1.5, 2.0, 0.75, smallest, f32::MIN_POSITIVE / 2.0, f32::MAX, 0.0, -0.0, f32::NAN, f32::INFINITY];
        let histogram = ExponentHistogram::of(&values);
        let filled: Vec<_> = histogram.filled().collect();
        assert_eq!(filled, [(-149, 1), (-127, 1), (-1, 1), (0, 2), (1, 1), (127, 1)]);
        assert_eq!((histogram.zero, histogram.nonfinite), (2, 2));
    }

    #[test]
    fn updates_below_half_an_ulp_are_lost() {
        let before = [1.0, 1.0, 1.0, 2.0];
        let wanted = [0.001, 0.5, 0.0, -0.25];
        let after = before.iter().zip(wanted).map(|(b, w)| half::bf16::from_f32(b + w).to_f32()).collect::<Vec<_>>();
        let loss = UpdateLoss::of(&before, &wanted, &after);
        assert_eq!((loss.wanted, loss.unmoved), (3, 1));
        assert!((loss.lost_share() - 1.0 / 3.0).abs() < 1e-12);
        assert!(loss.achieved_norm < loss.wanted_norm);
        let twice = loss.merge(loss);
        assert_eq!((twice.wanted, twice.unmoved), (6, 2));
        assert!((twice.wanted_norm / loss.wanted_norm - 2f64.sqrt()).abs() < 1e-12);
    }
}
