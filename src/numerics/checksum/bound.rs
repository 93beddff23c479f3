//! How far the sum of a product's row may honestly lie from the sum that its operands predict.
//!
//! With u the unit roundoff and γ_k = k·u/(1 − k·u) (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
//! §3.1), Σ|x||w| over a row's products called its weight W:
//! - a sum of k products, f32 all along: γ_k·W, in whatever order they are added;
//! - the predicted sum: factors added up with [`roundings`] and rounded to f32, then the same once more: γ·W;
//! - the measured sum, rounded to f32: γ·Σ|y|;
//! - each rounding to a dtype of half a unit ρ in the last place: ρ·Σ|·| of what is rounded. Of a fused product's parts
//!   only their weights are known, and of its main part |main| ≤ |y| + |branch| + |so far|.
//!
//! W (or, by Cauchy and Schwarz, what it is at most) and Σ|y| are measured with the same roundings; a hundredth more
//! covers them, γ², and ρ².

use std::ops::Range;

use crate::device::checks::{View, roundings};
use crate::device::cpu::vectorised;
use crate::device::noise::half_ulp;
use crate::device::{Compute, DType, Device};

/// What the rows of a result should sum to.
pub struct Expected {
    /// Products an element of the main part.
    pub terms: usize,
    /// Σ and Σ|·| of the bias: the same in every row.
    pub bias: (f64, f64),
    pub branch: Option<Branch>,
    /// What the main part is rounded to before it is added; `None`: the result's own dtype.
    pub inner: Option<DType>,
}

/// The low-rank part of a product.
pub struct Branch {
    /// Products an element.
    pub terms: usize,
    pub scaling: f32,
    /// What it is rounded to.
    pub dtype: DType,
}

/// A product's row sums, with their weights.
pub struct Given<'s> {
    pub got: View<'s>,
    /// From the operands, without the bias.
    pub main: View<'s>,
    /// The same of the low-rank part, before it is scaled.
    pub branch: Option<View<'s>>,
    /// Of what the product was added to.
    pub so_far: Option<View<'s>>,
}

/// Rows that are judged at once.
const TOGETHER: usize = 256;
static NONE: [f32; TOGETHER] = [0.0; TOGETHER];

/// Beyond this even the checksum may overflow f32.
const NOTHING_SAID: f64 = (1u128 << 120) as f64;

/// Unit roundoff of additions: f32 to nearest. Matrix units of GPUs align b products and the accumulator to the largest
/// of them, cut off what lies below f bits, and cut the sum to f32 (profiles.rs): over k/b blocks (b + 1)·2⁻ᶠ + 2⁻²³
/// each, of at most the element's Σ|x||w|; with b = 4 and f = 23, the coarsest, 1.5·k·2⁻²³ < k·2⁻²².
pub fn unit(device: &dyn Device, compute: Compute) -> f64 {
    let truncates = compute != Compute::F32 && device.name() != "cpu";
    2f64.powi(if truncates { -22 } else { -24 })
}

impl Expected {
    /// The first row whose sum is off by more than rounding: row, difference, bound. `dtype` and `columns` of the result.
    pub fn first_wrong(
        &self,
        given: &Given<'_>,
        (dtype, columns): (DType, usize),
        unit: f64,
    ) -> Option<(usize, f64, f64)> {
        let rows = given.got.sums.len();
        if given.main.sums.len() != rows || [given.branch, given.so_far].iter().flatten().any(|x| x.sums.len() != rows)
        {
            return Some((rows, f64::INFINITY, 0.0));
        }
        let bound = self.bound(dtype, columns, unit, given.so_far.is_some());
        let blocks = (0..rows).step_by(TOGETHER).map(|first| first..rows.min(first + TOGETHER));
        blocks.filter(|block| !given.within(block, &bound)).flatten().find_map(|row| {
            let of = |(sums, sizes): (&[f32], &[f32])| (f64::from(sums[0]), f64::from(sizes[0]));
            let [got, main, branch, so_far] = given.parts(&(row..row + 1)).map(of);
            let (difference, reach, limit) = bound.of(got, main, branch, so_far);
            // Of operands that are not finite, or nearly so, no more can be said.
            if reach.is_nan() || reach > NOTHING_SAID {
                return None;
            }
            // An overflow of a half dtype is no fault: the operands ask for it. Anything else that is not finite is.
            let overflow = dtype == DType::F16 && reach > 65504.0 && !got.0.is_finite();
            let wrong = difference > limit || !difference.is_finite();
            (wrong && !overflow).then_some((row, difference, limit))
        })
    }

    /// Of a result of this dtype, whose sums have so many elements.
    fn bound(&self, dtype: DType, columns: usize, unit: f64, so_far: bool) -> Bound {
        let gamma = |k: usize| k as f64 * unit / (1.0 - k as f64 * unit);
        let half = |dtype: DType| f64::from(half_ulp(dtype));
        let predicting = |terms: usize| gamma(terms + roundings(terms) + roundings(columns) + 4);
        let rounded = half(dtype);
        let adding = gamma(roundings(columns) + 1);
        let (mut of_so_far, mut branch, mut inner) = (adding, 0.0, 0.0);
        if let Some(Branch { terms, dtype, .. }) = &self.branch {
            // Rounded, scaled, and rounded again.
            branch = predicting(*terms) + 2.0 * half(*dtype);
        }
        if self.branch.is_some() || so_far || self.inner.is_some() {
            // Each part brought to the dtype of the sum, and the sum of all but the main one.
            inner = half(self.inner.unwrap_or(dtype)) + rounded;
            of_so_far += 2.0 * rounded;
            branch += 2.0 * rounded;
        }
        // Results below the dtype's normal range round by a fixed amount each; some units flush subnormals.
        let tiny = if dtype == DType::F16 { 2f64.powi(-24) } else { 2f64.powi(-125) };
        let tiny = (3 * columns + self.terms) as f64 * tiny;
        Bound {
            bias: self.bias,
            scaling: self.branch.as_ref().map_or(0.0, |branch| f64::from(branch.scaling)),
            main: predicting(self.terms),
            inner,
            result: rounded + adding,
            branch,
            so_far: of_so_far,
            tiny,
        }
    }
}

impl<'s> Given<'s> {
    /// Whether every row of a block is finite and within the bound: many rows at once, one loop for all kinds of product.
    fn within(&self, block: &Range<usize>, bound: &Bound) -> bool {
        let [got, main, branch, so_far] = self.parts(block);
        let plain = self.branch.is_none() && self.so_far.is_none() && bound.inner == 0.0;
        vectorised(
            #[inline(always)]
            || {
                let mut within = true;
                for row in 0..block.len() {
                    let of = |part: (&[f32], &[f32])| (f64::from(part.0[row]), f64::from(part.1[row]));
                    let (difference, reach, limit) = match plain {
                        true => bound.of_plain(of(got), of(main)),
                        false => bound.of(of(got), of(main), of(branch), of(so_far)),
                    };
                    within &= (difference <= limit) & (reach <= NOTHING_SAID);
                }
                within
            },
        )
    }

    /// Sums and sizes of these rows: the result, the main product, its low-rank part, what it is added to; zeros for what
    /// there is not.
    fn parts(&self, rows: &Range<usize>) -> [(&'s [f32], &'s [f32]); 4] {
        [Some(self.got), Some(self.main), self.branch, self.so_far].map(|part| match part {
            Some(View { sums, sizes }) => (&sums[rows.clone()], &sizes[rows.clone()]),
            None => (&NONE[..rows.len()], &NONE[..rows.len()]),
        })
    }
}

/// What each part's Σ|·| adds to the bound.
struct Bound {
    bias: (f64, f64),
    /// Of the low-rank part.
    scaling: f64,
    main: f64,
    /// Of the main part once it is a sum's part, which is no larger than the others and the result together.
    inner: f64,
    branch: f64,
    so_far: f64,
    result: f64,
    tiny: f64,
}

impl Bound {
    /// From (Σ, Σ|·|) of the parts of one row: how far the result's sum is off, how large it could be, the bound.
    #[inline(always)]
    fn of(&self, got: (f64, f64), main: (f64, f64), branch: (f64, f64), so_far: (f64, f64)) -> (f64, f64, f64) {
        let difference = (got.0 - main.0 - self.bias.0 - branch.0 * self.scaling - so_far.0).abs();
        let (weight, of_branch) = (main.1 + self.bias.1, branch.1 * self.scaling.abs());
        let all = got.1 + of_branch + so_far.1;
        let inner = if weight < all { weight } else { all };
        let relative = self.main * weight
            + self.inner * inner
            + self.branch * of_branch
            + self.so_far * so_far.1
            + self.result * got.1;
        (difference, weight + of_branch + so_far.1, 1.01 * relative + self.tiny)
    }

    /// The same of a product that is added to nothing.
    #[inline(always)]
    fn of_plain(&self, got: (f64, f64), main: (f64, f64)) -> (f64, f64, f64) {
        let weight = main.1 + self.bias.1;
        let relative = self.main * weight + self.result * got.1;
        ((got.0 - main.0 - self.bias.0).abs(), weight, 1.01 * relative + self.tiny)
    }
}
