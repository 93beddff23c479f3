//! What the arithmetic of a matrix product is, recovered from the outside by products whose results tell hypotheses
//! apart (the questions of Fasi et al., PeerJ CS 7:e330, 2021, and Khattak, Mikaitis, arXiv 2512.07004).

use serde::Serialize;

use super::order::{self, Found};
use super::{Multiplier, Rounding};
use crate::Result;
use crate::device::{Compute, DType};

/// Everything that was asked. `None`: this operand type cannot tell.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fingerprint {
    pub order: Found,
    /// Starts of partial sums in a product of 4096 terms.
    pub cuts: Vec<usize>,
    /// Significand bits of those partial sums where they are fewer than the accumulator's, results stored in the
    /// operands' dtype: a split with a reduced-precision reduction.
    pub reduced_bits: Option<u32>,
    /// Bits below the leading one of the largest term that survive while terms are added.
    pub kept_bits: u32,
    /// What happens to the bits below.
    pub cut_off: CutOff,
    /// How a sum that needs more bits than the accumulator has is rounded.
    pub rounding: Option<Rounding>,
    /// Significand bits of the accumulator between additions, the leading one included.
    pub accumulator_bits: u32,
    /// f32 products enter the sum unrounded (a fused multiply-add).
    pub exact_products: Option<bool>,
    pub subnormal_operands: bool,
    pub subnormal_sums: Option<bool>,
    pub nonfinite: NonFinite,
}

/// What happens to bits below the last kept one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CutOff {
    Nearest,
    TowardZero,
    Down,
    Up,
}

/// Rules for values that are not finite: each is what IEEE 754 says, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NonFinite {
    /// ∞ · 0 is NaN.
    pub infinity_times_zero_is_nan: bool,
    /// ∞ − ∞ is NaN.
    pub infinities_cancel_to_nan: bool,
    /// A NaN operand reaches the result.
    pub nan_propagates: bool,
    /// A sum beyond f32 is ∞.
    pub overflow_is_infinite: Option<bool>,
}

/// A dot product written as its terms a·b.
struct Asked<'m>(&'m dyn Multiplier);

impl Asked<'_> {
    fn of(&self, terms: &[(f32, f32)]) -> Result<f32> {
        // Zeros fill the product up to a length that every kernel takes.
        let mut a: Vec<f32> = terms.iter().map(|t| t.0).collect();
        let mut b: Vec<f32> = terms.iter().map(|t| t.1).collect();
        a.resize(order::TERMS, 0.0);
        b.resize(order::TERMS, 0.0);
        Ok(self.0.dots(&a, &b)?.first().copied().unwrap_or(f32::NAN))
    }
    /// Terms 2^p · significand, split so that both operands are representable in every format.
    fn sum(&self, terms: &[f32]) -> Result<f32> {
        self.of(&terms.iter().map(|&t| split(t)).collect::<Vec<_>>())
    }
    /// The sum with `large`, `small` and −`large` at three places, zeros elsewhere.
    fn between(&self, places: [usize; 3], large: f32, small: f32) -> Result<f32> {
        let mut terms = vec![0.0; order::TERMS];
        for (place, term) in places.into_iter().zip([large, small, -large]) {
            terms[place] = term;
        }
        self.sum(&terms)
    }
    /// Largest p for which 2^-p survives between 1 and −1.
    fn kept(&self, places: [usize; 3]) -> Result<u32> {
        let mut kept = 0;
        for p in 1..=48 {
            let small = 2f32.powi(-p);
            if self.between(places, 1.0, small)? != small {
                break;
            }
            kept = p as u32;
        }
        Ok(kept)
    }
}

/// Where three terms are added at once (as far as the unit does that), and where the first two meet, are rounded to
/// the accumulator, and then meet the third.
fn places(order: &Found) -> ([usize; 3], [usize; 3]) {
    match *order {
        Found::Sequential { block: 1 } | Found::Exact | Found::Other { .. } | Found::Pairwise { block: 1 | 2 } => {
            ([0, 1, 2], [0, 1, 2])
        }
        Found::Sequential { block } => ([0, block, block + 1], [0, 1, block]),
        Found::SequentialSwapped => ([1, 0, 3], [1, 0, 3]),
        Found::Lanes { lanes, block: 1 } => ([0, lanes, 1], [0, lanes, 1]),
        Found::Lanes { lanes, block } => ([0, lanes * block, lanes * block + 1], [0, lanes * block, block]),
        Found::Pairwise { block } => ([0, 1, 2], [0, 1, block]),
    }
}

/// x = a·b with exponents halved: 2^-40 is no fp16 number, 2^-20 · 2^-20 is a product of two.
fn split(x: f32) -> (f32, f32) {
    if x == 0.0 || !x.is_finite() {
        return (x, 1.0);
    }
    let exponent = ((x.to_bits() >> 23) & 0xff) as i32 - 127;
    let b = 2f32.powi(exponent / 2);
    (x / b, b)
}

/// Asks everything.
///
/// # Errors
/// Those of the products.
pub fn fingerprint(multiplier: &dyn Multiplier) -> Result<Fingerprint> {
    let asked = Asked(multiplier);
    let order = order::of(multiplier)?;
    let (together, apart) = places(&order);
    let kept_bits = asked.kept(together)?;
    let unit = 2f32.powi(-(kept_bits as i32));
    let cut_off = cut_off(&|t| Ok(asked.between(together, f32::signum(t), t * unit)? / unit))?;
    let accumulator_bits = asked.kept(apart)? + 1;
    Ok(Fingerprint {
        cuts: order::cuts(multiplier)?,
        reduced_bits: reduced_bits(multiplier, apart, accumulator_bits)?,
        kept_bits,
        cut_off,
        rounding: rounding(&asked, accumulator_bits)?,
        accumulator_bits,
        exact_products: exact_products(&asked, &order)?,
        subnormal_operands: subnormal_operands(&asked)?,
        subnormal_sums: subnormal_sums(&asked)?,
        nonfinite: nonfinite(&asked)?,
        order,
    })
}

/// Bits of the sums of parts of a long product: of 1 and 2^-p in the first part, before −1 of a later one takes the 1 away.
fn reduced_bits(multiplier: &dyn Multiplier, first: [usize; 3], whole: u32) -> Result<Option<u32>> {
    let survives = |last: usize, p: u32| -> Result<bool> {
        let small = 2f32.powi(-(p as i32));
        let (mut a, mut b) = (vec![0f32; order::LONG], vec![0f32; order::LONG]);
        for (place, term) in [(first[0], 1.0), (first[1], small), (last, -1.0)] {
            (a[place], b[place]) = split(term);
        }
        Ok(multiplier.rounded_dots(&a, &b)?.first().copied() == Some(small))
    };
    let full = whole.saturating_sub(1);
    for last in [order::LONG / 4, order::LONG / 2, 3 * order::LONG / 4, order::LONG - 1] {
        if full == 0 || survives(last, full)? {
            continue;
        }
        let mut kept = 0;
        while kept + 1 < full && survives(last, kept + 1)? {
            kept += 1;
        }
        return Ok(Some(kept + 1));
    }
    Ok(None)
}

/// `left(t)` is what remains, in units of the last kept bit, of a term t units beside ±1.
fn cut_off(left: &dyn Fn(f32) -> Result<f32>) -> Result<CutOff> {
    let (high, low) = (left(1.75)?, left(1.25)?);
    let (minus_high, minus_low) = (left(-1.75)?, left(-1.25)?);
    Ok(match (high, low, minus_high, minus_low) {
        (h, l, mh, ml) if h == 2.0 && l == 1.0 && mh == -2.0 && ml == -1.0 => CutOff::Nearest,
        (h, _, mh, _) if h == 2.0 && mh == -1.0 => CutOff::Up,
        (h, _, mh, _) if h == 1.0 && mh == -2.0 => CutOff::Down,
        _ => CutOff::TowardZero,
    })
}

/// 2 + 1½ units in the last place, from terms that each survive alignment.
fn rounding(asked: &Asked<'_>, bits: u32) -> Result<Option<Rounding>> {
    if !(4..=24).contains(&bits) {
        return Ok(None);
    }
    let ulp = 2f32.powi(2 - bits as i32);
    let sum = asked.sum(&[1.0, ulp, ulp / 2.0, 1.0])?;
    Ok(Some(if sum >= 2.0 + 2.0 * ulp { Rounding::NearestEven } else { Rounding::TowardZero }))
}

/// (1 + 2^-23)² = 1 + 2^-22 + 2^-46: does the last part reach the sum?
fn exact_products(asked: &Asked<'_>, order: &Found) -> Result<Option<bool>> {
    if asked.0.operand() != Compute::F32 {
        return Ok(None);
    }
    let (x, one) = (1.0 + f32::EPSILON, 1.0);
    let minus = (-(1.0 + 2.0 * f32::EPSILON), one);
    let terms = if *order == Found::SequentialSwapped { [(x, x), minus] } else { [minus, (x, x)] };
    Ok(Some(asked.of(&terms)? == 2f32.powi(-46)))
}

fn storage(compute: Compute) -> DType {
    match compute {
        Compute::F16 => DType::F16,
        Compute::Bf16 => DType::BF16,
        Compute::F32 | Compute::Tf32 => DType::F32,
    }
}

/// The smallest subnormal operand times a power of two that makes the product normal.
fn subnormal_operands(asked: &Asked<'_>) -> Result<bool> {
    let (small, large) = match storage(asked.0.operand()) {
        DType::F16 => (2f32.powi(-24), 2f32.powi(10)),
        DType::BF16 => (2f32.powi(-130), 2f32.powi(60)),
        // tf32 keeps ten bits below the leading one, so a subnormal with one bit is representable.
        DType::F32 => (2f32.powi(-130), 2f32.powi(60)),
    };
    Ok(asked.of(&[(small, large)])? == small * large)
}

/// A sum of normal operands that is a subnormal f32. fp16's smallest product is far above.
fn subnormal_sums(asked: &Asked<'_>) -> Result<Option<bool>> {
    if storage(asked.0.operand()) == DType::F16 {
        return Ok(None);
    }
    let small = 2f32.powi(-68);
    Ok(Some(asked.of(&[(small, small)])? == small * small))
}

fn nonfinite(asked: &Asked<'_>) -> Result<NonFinite> {
    let infinite = f32::INFINITY;
    let huge = 2f32.powi(64);
    Ok(NonFinite {
        infinity_times_zero_is_nan: asked.of(&[(infinite, 0.0)])?.is_nan(),
        infinities_cancel_to_nan: asked.of(&[(infinite, 1.0), (-infinite, 1.0)])?.is_nan(),
        nan_propagates: asked.of(&[(f32::NAN, 1.0), (1.0, 1.0)])?.is_nan(),
        overflow_is_infinite: match storage(asked.0.operand()) {
            DType::F16 => None,
            _ => Some(asked.of(&[(huge, huge / 2.0), (huge, huge / 2.0)])? == infinite),
        },
    })
}
