//! What is computed from gradients, weights and moments: errors, lost updates, rounding. Pure functions.

use serde::{Deserialize, Serialize};

use crate::device::DType;
use crate::diagnosis::number;
use crate::step::round;

/// How far a gradient is from the reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GradientError {
    /// ‖g − r‖ / ‖r‖.
    #[serde(with = "number")]
    pub relative_l2: f64,
    /// ⟨g, r⟩ / (‖g‖ ‖r‖).
    #[serde(with = "number")]
    pub cosine: f64,
    /// ⟨g, r⟩ / ⟨r, r⟩ − 1: the part of the error that always points the same way (−0.01: a gradient 1 % too short).
    #[serde(with = "number")]
    pub bias: f64,
}

/// Sums from which a [`GradientError`] follows; they add up over matrices.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ErrorSums {
    difference: f64,
    product: f64,
    own: f64,
    reference: f64,
}

impl ErrorSums {
    /// `times` undoes a loss scale.
    pub fn of(gradient: &[f32], reference: &[f32], times: f64) -> Self {
        let mut sums = Self::default();
        for (g, r) in gradient.iter().zip(reference) {
            let (g, r) = (f64::from(*g) * times, f64::from(*r));
            sums.difference += (g - r) * (g - r);
            sums.product += g * r;
            sums.own += g * g;
            sums.reference += r * r;
        }
        sums
    }
    pub fn add(&mut self, other: &Self) {
        self.difference += other.difference;
        self.product += other.product;
        self.own += other.own;
        self.reference += other.reference;
    }
    /// NaN where the gradient is, or where the reference is zero.
    pub fn error(&self) -> GradientError {
        GradientError {
            relative_l2: (self.difference / self.reference).sqrt(),
            cosine: self.product / (self.own * self.reference).sqrt(),
            bias: self.product / self.reference - 1.0,
        }
    }
}

/// Adam's direction before the learning rate: m̂ / (√v̂ + ε) (contract 6.2).
pub fn adam_direction(m: &[f32], v: &[f32], betas: (f64, f64), epsilon: f64, updates: f64) -> Vec<f64> {
    let (first, second) = (1.0 - betas.0.powf(updates), 1.0 - betas.1.powf(updates));
    m.iter().zip(v).map(|(m, v)| f64::from(*m) / first / ((f64::from(*v) / second).sqrt() + epsilon)).collect()
}

/// Of the weights that an update would move, how many it leaves where they are in `dtype`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Lost {
    pub moved: u64,
    pub lost: u64,
}

impl Lost {
    /// `directions` · `learning_rate` subtracted from `weights` as the optimizer does.
    pub fn count(weights: &[f32], directions: &[f64], learning_rate: f64, dtype: DType) -> Self {
        let mut count = Self::default();
        for (w, u) in weights.iter().zip(directions) {
            let delta = learning_rate * u;
            if delta == 0.0 || !delta.is_finite() {
                continue;
            }
            count.moved += 1;
            count.lost += u64::from(round((f64::from(*w) - delta) as f32, dtype) == round(*w, dtype));
        }
        count
    }
    pub fn add(&mut self, other: Self) {
        self.moved += other.moved;
        self.lost += other.lost;
    }
    /// 0 when nothing moves.
    pub fn share(&self) -> f64 {
        self.lost as f64 / self.moved.max(1) as f64
    }
}

/// Learning rate below which more than half of the updates are lost: the median over weights of ½ ulp(w) / |u|.
pub fn half_lost_below(weights: &[f32], directions: &[f64], dtype: DType) -> Option<f64> {
    let mut limits: Vec<f64> = weights
        .iter()
        .zip(directions)
        .filter(|(w, u)| **w != 0.0 && u.is_finite() && **u != 0.0)
        .map(|(w, u)| half_ulp(*w, dtype) / u.abs())
        .collect();
    let middle = limits.len().checked_sub(1)? / 2;
    Some(*limits.select_nth_unstable_by(middle, f64::total_cmp).1)
}

/// Half the distance to the next number of `dtype` above |w|.
fn half_ulp(w: f32, dtype: DType) -> f64 {
    let (digits, smallest) = match dtype {
        DType::F32 => (23, -126),
        DType::BF16 => (7, -126),
        DType::F16 => (10, -14),
    };
    let exponent = (f64::from(w.abs()).log2().floor() as i32).max(smallest);
    2f64.powi(exponent - digits - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_tell_length_from_direction() {
        let reference = [3.0, 4.0];
        let short = ErrorSums::of(&[1.5, 2.0], &reference, 1.0).error();
        assert!((short.relative_l2 - 0.5).abs() < 1e-12 && (short.bias + 0.5).abs() < 1e-12);
        assert!((short.cosine - 1.0).abs() < 1e-12);
        let turned = ErrorSums::of(&[4.0, -3.0], &reference, 1.0).error();
        assert!(turned.cosine.abs() < 1e-12 && (turned.bias + 1.0).abs() < 1e-12);
        let scaled = ErrorSums::of(&[3.0 * 1024.0, 4.0 * 1024.0], &reference, 1.0 / 1024.0).error();
        assert_eq!(scaled.relative_l2, 0.0);
        assert!(ErrorSums::of(&[f32::NAN, 0.0], &reference, 1.0).error().relative_l2.is_nan());
    }

    #[test]
    fn an_update_below_half_an_ulp_of_bf16_is_lost_and_one_above_is_not() {
        // ulp of bf16 in [1, 2) is 2⁻⁷; downward from exactly 1 it is half of that.
        let weights = [1.5f32];
        assert_eq!(Lost::count(&weights, &[1.0], 0.0038, DType::BF16), Lost { moved: 1, lost: 1 });
        assert_eq!(Lost::count(&weights, &[1.0], 0.0040, DType::BF16), Lost { moved: 1, lost: 0 });
        assert_eq!(Lost::count(&weights, &[1.0], 1e-4, DType::F32).share(), 0.0);
        assert_eq!(Lost::count(&weights, &[0.0], 1.0, DType::BF16).moved, 0);
        assert_eq!(half_lost_below(&weights, &[1.0], DType::BF16), Some(2f64.powi(-8)));
    }

    #[test]
    fn adams_first_update_has_length_one() {
        let direction = adam_direction(&[0.1 * 0.02], &[0.001 * 0.02 * 0.02], (0.9, 0.999), 1e-8, 1.0);
        assert!((direction[0] - 1.0).abs() < 1e-4, "{direction:?}");
    }
}
