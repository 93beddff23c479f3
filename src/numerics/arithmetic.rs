//! A dot product computed bit by bit under a stated arithmetic.
//!
//! Matrix units differ from a loop of f32 operations in how many products they add at once, how many bits survive the
//! alignment of those products, how the sum is rounded, and in which order partial sums meet (Fasi, Higham, Mikaitis,
//! Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ CS 7:e330, 2021; Khattak, Mikaitis, "Accurate models of
//! NVIDIA tensor cores", arXiv 2512.07004). An [`Arithmetic`] says which; [`Arithmetic::dot`] is its software model.
//! `fingerprint` recovers one from the outside.

use serde::Serialize;

use crate::device::{Compute, DType};

/// How a matrix unit adds up a dot product. Products of operands are exact.
#[derive(Debug, Clone, PartialEq)]
pub struct Arithmetic {
    /// What operands are rounded to before they are multiplied.
    pub operand: Compute,
    /// Products that are added at once, together with the accumulator: 1 is a chain of fused multiply-adds.
    pub block: usize,
    pub sum: Sum,
    /// How the sum of a block is brought to the accumulator.
    pub rounding: Rounding,
    /// Significand bits of the accumulator, the leading one included: 24 is f32.
    pub accumulator_bits: u32,
    pub order: Order,
    /// Parts of a long product that are summed by themselves.
    pub split: Option<Split>,
    /// Subnormal operands count; otherwise they are zero.
    pub subnormal_operands: bool,
    /// Subnormal sums are kept; otherwise they become zero.
    pub subnormal_sums: bool,
}

/// How the terms of one block are added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Sum {
    /// As if with unlimited precision; one rounding.
    Exact,
    /// Terms are shifted to the largest exponent among them and cut off below `fraction_bits`.
    Aligned { fraction_bits: u32 },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rounding {
    NearestEven,
    TowardZero,
}

/// In which order blocks meet. Partial sums of their own are added as f32, to nearest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Order {
    /// One accumulator, blocks one after another.
    Sequential,
    /// `lanes` accumulators; block b goes to accumulator b mod lanes; halves of the accumulators are then added.
    Lanes { lanes: usize },
    /// A balanced tree over the blocks.
    Pairwise,
}

/// Parts of the inner dimension whose sums are rounded before they are added as f32, one after another: split-K with a
/// reduced-precision reduction (cublasMath_t, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION in the cuBLAS
/// documentation; PyTorch's allow_bf16_reduced_precision_reduction).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Terms of a part; shorter products are not split.
    pub length: usize,
    pub rounded: DType,
}

impl Arithmetic {
    /// A chain of IEEE f32 fused multiply-adds.
    pub const FMA: Arithmetic = Arithmetic {
        operand: Compute::F32,
        block: 1,
        sum: Sum::Exact,
        rounding: Rounding::NearestEven,
        accumulator_bits: 24,
        order: Order::Sequential,
        split: None,
        subnormal_operands: true,
        subnormal_sums: true,
    };

    /// Σ a_k·b_k. Slices of the same length, exactly representable in `operand`.
    pub fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        let Some(Split { length, rounded }) = self.split.filter(|split| split.length < a.len()) else {
            return self.part(a, b);
        };
        let parts = a.chunks(length.max(1)).zip(b.chunks(length.max(1)));
        parts.fold(0.0, |sum, (a, b)| {
            sum + match rounded {
                DType::F32 => self.part(a, b),
                DType::BF16 => half::bf16::from_f32(self.part(a, b)).to_f32(),
                DType::F16 => half::f16::from_f32(self.part(a, b)).to_f32(),
            }
        })
    }

    /// One part of the inner dimension, or all of it.
    fn part(&self, a: &[f32], b: &[f32]) -> f32 {
        let operands = |k: std::ops::Range<usize>| (&a[k.clone()], &b[k]);
        let blocks: Vec<_> = (0..a.len()).step_by(self.block).map(|k| k..a.len().min(k + self.block)).collect();
        match self.order {
            Order::Sequential => blocks.into_iter().fold(0.0, |sum, k| self.add_block(sum, operands(k))),
            Order::Lanes { lanes } => {
                let mut sums = vec![0f32; lanes.min(blocks.len()).max(1)];
                let count = sums.len();
                for (i, k) in blocks.into_iter().enumerate() {
                    sums[i % count] = self.add_block(sums[i % count], operands(k));
                }
                while sums.len() > 1 {
                    let upper = sums.split_off(sums.len().div_ceil(2));
                    sums.iter_mut()
                        .zip(upper)
                        .for_each(|(low, high)| *low = self.rounded(&[(*low).into(), high.into()]));
                }
                sums[0]
            }
            Order::Pairwise => {
                let mut sums: Vec<f32> = blocks.into_iter().map(|k| self.add_block(0.0, operands(k))).collect();
                while sums.len() > 1 {
                    sums = sums.chunks(2).map(|pair| pair.iter().sum()).collect();
                }
                sums.first().copied().unwrap_or(0.0)
            }
        }
    }

    /// The accumulator after one block.
    fn add_block(&self, accumulator: f32, (a, b): (&[f32], &[f32])) -> f32 {
        let flushed = |x: f32| if self.subnormal_operands || !self.is_subnormal(x) { x } else { 0.0 };
        // 24-bit significands: the product is exact in f64, and so is its exponent.
        let mut terms: Vec<f64> =
            a.iter().zip(b).map(|(&x, &y)| f64::from(flushed(x)) * f64::from(flushed(y))).collect();
        terms.push(accumulator.into());
        if terms.iter().any(|t| !t.is_finite()) {
            return terms.iter().sum::<f64>() as f32;
        }
        let Sum::Aligned { fraction_bits } = self.sum else { return self.rounded(&terms) };
        // A product aligns by the sum of its operands' exponents, before any normalisation of its significand.
        let exponents = a.iter().zip(b).filter(|(x, y)| flushed(**x) != 0.0 && flushed(**y) != 0.0);
        let exponents = exponents.map(|(&x, &y)| exponent(x.into()) + exponent(y.into()));
        let Some(largest) = exponents.chain((accumulator != 0.0).then(|| exponent(accumulator.into()))).max() else {
            return self.rounded(&terms);
        };
        let quantum = 2f64.powi(largest - fraction_bits as i32);
        terms.iter_mut().for_each(|t| *t = (*t / quantum).trunc() * quantum);
        self.rounded(&terms)
    }

    fn is_subnormal(&self, x: f32) -> bool {
        match self.operand {
            Compute::F16 => x != 0.0 && x.abs() < 2f32.powi(-14),
            Compute::F32 | Compute::Tf32 | Compute::Bf16 => x.is_subnormal(),
        }
    }

    /// The exact sum, rounded once to the accumulator.
    fn rounded(&self, terms: &[f64]) -> f32 {
        let sum = exact_sum(terms);
        if !sum.is_finite() || sum == 0.0 {
            return sum as f32;
        }
        // Below f32's normal range the quantum stays that of the smallest normal number.
        let lowest = exponent(sum).max(f32::MIN_EXP - 1);
        let quantum = 2f64.powi(lowest + 1 - self.accumulator_bits as i32);
        let units = sum / quantum;
        let units = match self.rounding {
            Rounding::NearestEven => units.round_ties_even(),
            Rounding::TowardZero => units.trunc(),
        };
        let value = (units * quantum) as f32;
        if value.is_subnormal() && !self.subnormal_sums { 0.0 } else { value }
    }
}

/// ⌊log₂|x|⌋ of a normal f64.
fn exponent(x: f64) -> i32 {
    ((x.to_bits() >> 52) & 0x7ff) as i32 - 1023
}

/// The exact sum rounded to odd at 53 bits, so that a later rounding to fewer bits is as if from the exact sum
/// (Boldo, Melquiond 2008). Non-overlapping partial sums after Shewchuk (1997).
fn exact_sum(terms: &[f64]) -> f64 {
    let mut partials: Vec<f64> = Vec::new();
    for &term in terms {
        let mut x = term;
        let mut kept = Vec::with_capacity(partials.len() + 1);
        for &partial in &partials {
            let (large, small) = if x.abs() < partial.abs() { (partial, x) } else { (x, partial) };
            let high = large + small;
            let low = small - (high - large);
            if low != 0.0 {
                kept.push(low);
            }
            x = high;
        }
        kept.push(x);
        partials = kept;
    }
    let Some(mut high) = partials.pop() else { return 0.0 };
    let mut low = 0.0;
    while let Some(partial) = partials.pop() {
        let sum = high + partial;
        low = partial - (sum - high);
        high = sum;
        if low != 0.0 {
            break;
        }
    }
    if low == 0.0 || high.to_bits() & 1 == 1 {
        return high;
    }
    if (low > 0.0) == (high > 0.0) { f64::from_bits(high.to_bits() + 1) } else { f64::from_bits(high.to_bits() - 1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_of_fmas_is_what_mul_add_gives() {
        let value = |seed, k| crate::device::noise::symmetric(seed, 0, k) * 2f32.powi((k % 40) as i32 - 20);
        for n in [1u64, 2, 7, 64] {
            let (a, b): (Vec<f32>, Vec<f32>) = (0..n).map(|k| (value(1, k), value(2, k))).unzip();
            let chain = a.iter().zip(&b).fold(0f32, |sum, (x, y)| x.mul_add(*y, sum));
            assert_eq!(Arithmetic::FMA.dot(&a, &b).to_bits(), chain.to_bits(), "{n} terms");
        }
    }

    #[test]
    fn an_exact_sum_rounds_once_where_a_chain_rounds_three_times() {
        let wide = Arithmetic { block: 4, ..Arithmetic::FMA };
        let (a, ones) = ([1.0, 2f32.powi(-24), 2f32.powi(-24), -1.0], [1.0; 4]);
        assert_eq!(wide.dot(&a, &ones), 2f32.powi(-23));
        assert_eq!(Arithmetic::FMA.dot(&a, &ones), 0.0);
    }

    #[test]
    fn rounding_to_odd_keeps_what_lies_below_a_tie() {
        // 1 + 2^-24 is a tie at f32, and 2^-80 beyond it decides.
        let wide = Arithmetic { block: 3, ..Arithmetic::FMA };
        assert_eq!(wide.dot(&[1.0, 2f32.powi(-24), 2f32.powi(-80)], &[1.0; 3]), 1.0 + f32::EPSILON);
        assert_eq!(wide.dot(&[1.0, 2f32.powi(-24), -(2f32.powi(-80))], &[1.0; 3]), 1.0);
    }

    #[test]
    fn alignment_cuts_terms_below_its_last_bit() {
        let volta = Arithmetic {
            block: 4,
            sum: Sum::Aligned { fraction_bits: 23 },
            rounding: Rounding::TowardZero,
            ..Arithmetic::FMA
        };
        let left = |p: i32| volta.dot(&[1.0, 2f32.powi(p), -1.0], &[1.0; 3]);
        assert_eq!((left(-23), left(-24)), (2f32.powi(-23), 0.0));
    }
}
