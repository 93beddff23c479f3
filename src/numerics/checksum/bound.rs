//! How far the sum of a product's row may honestly lie from the sum that its operands predict.
//!
//! With u the unit roundoff and γ_k = k·u/(1 − k·u) (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
//! §3.1), Σ|x||w| over a row's products called its weight W:
//! - a sum of k products, f32 all along: γ_k·W, in whatever order they are added;
//! - the predicted sum: its factors rounded to f32 once, [`roundings`] additions: γ·W;
//! - the measured sum: γ·Σ|y|;
//! - each rounding to a dtype of half a unit ρ in the last place: ρ·Σ|·| of what is rounded. Of a fused product's parts
//!   only their weights are known, and of its main part |main| ≤ |y| + |branch| + |so far|.
//!
//! W and Σ|y| are measured with the same roundings; a hundredth more covers them, γ², and ρ².

use std::sync::Arc;

use crate::device::checks::{Sums, roundings};
use crate::device::noise::half_ulp;
use crate::device::{Compute, DType, Device};

/// A product's row sums from its operands, with their weights, over so many products each.
pub struct Term {
    pub sums: Sums,
    pub terms: usize,
}

/// What the rows of a result should sum to.
pub struct Expected {
    pub main: Term,
    /// Σ and Σ|·| of the bias: the same in every row.
    pub bias: (f64, f64),
    /// A low-rank part, scaled, and what it is rounded to.
    pub branch: Option<(Term, DType)>,
    pub so_far: Option<Arc<Sums>>,
    /// What the main part is rounded to before it is added; `None`: the result's own dtype.
    pub inner: Option<DType>,
}

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
    /// A product of so many terms an element and nothing else; its sums are still to come.
    pub fn of(terms: usize) -> Self {
        let main = Term { sums: Sums::default(), terms };
        Self { main, bias: (0.0, 0.0), branch: None, so_far: None, inner: None }
    }

    /// The first row whose sum is off by more than rounding: row, difference, bound. `dtype` and `columns` of the result.
    pub fn first_wrong(&self, got: &Sums, (dtype, columns): (DType, usize), unit: f64) -> Option<(usize, f64, f64)> {
        (0..got.sums.len().max(self.main.sums.sums.len())).find_map(|row| {
            let (Some(&sum), Some(&predicted)) = (got.sums.get(row), self.main.sums.sums.get(row)) else {
                return Some((row, f64::INFINITY, 0.0));
            };
            let part = |sums: &Sums| (sums.sums[row], sums.sizes[row]);
            let branch = self.branch.as_ref().map_or((0.0, 0.0), |(term, _)| part(&term.sums));
            let so_far = self.so_far.as_ref().map_or((0.0, 0.0), |sums| part(sums));
            let (weight, size) = (self.main.sums.sizes[row] + self.bias.1, got.sizes[row]);
            // Of operands that are not finite, or nearly so, no more can be said.
            let reach = weight + branch.1 + so_far.1;
            if reach.is_nan() || reach > NOTHING_SAID {
                return None;
            }
            let difference = (sum - predicted - self.bias.0 - branch.0 - so_far.0).abs();
            let sizes = Sizes { main: weight, branch: branch.1, so_far: so_far.1, result: size };
            let bound = self.bound(&sizes, dtype, columns, unit);
            // An overflow of a half dtype is no fault: the operands ask for it. Anything else that is not finite is.
            let overflow = dtype == DType::F16 && reach > 65504.0 && !sum.is_finite();
            let wrong = difference > bound || !difference.is_finite();
            (wrong && !overflow).then_some((row, difference, bound))
        })
    }

    fn bound(&self, sizes: &Sizes, dtype: DType, columns: usize, unit: f64) -> f64 {
        let gamma = |k: usize| k as f64 * unit / (1.0 - k as f64 * unit);
        let half = |dtype: DType| f64::from(half_ulp(dtype));
        let predicting = |terms: usize| gamma(terms + roundings(terms) + 3);
        let rounded = half(dtype);
        let mut bound = predicting(self.main.terms) * sizes.main
            + (rounded + gamma(roundings(columns))) * sizes.result
            + gamma(roundings(columns)) * sizes.so_far;
        if let Some((term, branch)) = &self.branch {
            // Rounded, scaled, and rounded again.
            bound += (predicting(term.terms) + 2.0 * half(*branch)) * sizes.branch;
        }
        if self.branch.is_some() || self.so_far.is_some() || self.inner.is_some() {
            let main = sizes.main.min(sizes.result + sizes.branch + sizes.so_far);
            let inner = half(self.inner.unwrap_or(dtype));
            // Each part brought to the dtype of the sum, and the sum of all but the main one.
            bound += (inner + rounded) * main + 2.0 * rounded * (sizes.branch + sizes.so_far);
        }
        // Results below the dtype's normal range round by a fixed amount each; some units flush subnormals.
        let tiny = if dtype == DType::F16 { 2f64.powi(-24) } else { 2f64.powi(-125) };
        1.01 * bound + (3 * columns + self.main.terms) as f64 * tiny
    }
}

/// Σ|·| of the parts of one row.
struct Sizes {
    main: f64,
    branch: f64,
    so_far: f64,
    result: f64,
}
