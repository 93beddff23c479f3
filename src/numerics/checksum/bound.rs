//! How far the sum of a product's row may honestly lie from the sum that its operands predict.
//!
//! With u the unit roundoff and γ_k = k·u/(1 − k·u) (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
//! §3.1), Σ|x||w| over a row's products called its weight W:
//! - a sum of k products, f32 all along: γ_k·W, in whatever order they are added;
//! - the predicted sum: factors added up with [`roundings`] and rounded to f32, then [`roundings`] more: γ·W;
//! - the measured sum: γ·Σ|y|;
//! - each rounding to a dtype of half a unit ρ in the last place: ρ·Σ|·| of what is rounded. Of a fused product's parts
//!   only their weights are known, and of its main part |main| ≤ |y| + |branch| + |so far|.
//!
//! W and Σ|y| are measured with the same roundings; a hundredth more covers them, γ², and ρ².

use std::ops::Range;
use std::sync::Arc;

use crate::device::checks::{PartSums, Sums, roundings};
use crate::device::noise::half_ulp;
use crate::device::{Compute, DType, Device};

/// A product's row sums from its operands, with their weights, over so many products each.
pub struct Term {
    pub sums: Arc<Sums>,
    pub terms: usize,
    /// What it is multiplied with.
    pub scaling: f32,
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

/// Rows that are judged at once.
const TOGETHER: usize = 256;
static NONE: [f64; TOGETHER] = [0.0; TOGETHER];

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
        let main = Term { sums: Arc::default(), terms, scaling: 1.0 };
        Self { main, bias: (0.0, 0.0), branch: None, so_far: None, inner: None }
    }

    /// What a device summed of the operands.
    pub fn take(&mut self, part: &PartSums) {
        self.main.sums = Arc::clone(&part.main);
        if let Some((term, _)) = &mut self.branch {
            term.sums = part.branch.clone().unwrap_or_default();
        }
    }

    /// The first row whose sum is off by more than rounding: row, difference, bound. `dtype` and `columns` of the result.
    pub fn first_wrong(&self, got: &Sums, (dtype, columns): (DType, usize), unit: f64) -> Option<(usize, f64, f64)> {
        let rows = got.sums.len().min(self.main.sums.sums.len());
        if got.sums.len() != self.main.sums.sums.len() {
            return Some((rows, f64::INFINITY, 0.0));
        }
        let bound = self.bound(dtype, columns, unit);
        let blocks = (0..rows).step_by(TOGETHER).map(|first| first..rows.min(first + TOGETHER));
        blocks.filter(|block| !self.within(got, block, &bound)).flatten().find_map(|row| {
            let [sum, main, branch, so_far] = self.parts(got, &(row..row + 1)).map(|(sums, sizes)| (sums[0], sizes[0]));
            let (difference, reach, limit) = bound.of(sum, main, branch, so_far);
            // Of operands that are not finite, or nearly so, no more can be said.
            if reach.is_nan() || reach > NOTHING_SAID {
                return None;
            }
            // An overflow of a half dtype is no fault: the operands ask for it. Anything else that is not finite is.
            let overflow = dtype == DType::F16 && reach > 65504.0 && !sum.0.is_finite();
            let wrong = difference > limit || !difference.is_finite();
            (wrong && !overflow).then_some((row, difference, limit))
        })
    }

    /// Whether every row of a block is finite and within the bound; without a branch, for many rows at once.
    fn within(&self, got: &Sums, block: &Range<usize>, bound: &Bound) -> bool {
        let [sum, main, branch, so_far] = self.parts(got, block);
        let n = block.len();
        let (sum, main) = ((&sum.0[..n], &sum.1[..n]), (&main.0[..n], &main.1[..n]));
        let (branch, so_far) = ((&branch.0[..n], &branch.1[..n]), (&so_far.0[..n], &so_far.1[..n]));
        let mut within = true;
        for row in 0..n {
            let of = |part: (&[f64], &[f64])| (part.0[row], part.1[row]);
            let (difference, reach, limit) = bound.of(of(sum), of(main), of(branch), of(so_far));
            within &= (difference <= limit) & (reach <= NOTHING_SAID);
        }
        within
    }

    /// Sums and sizes of these rows: the result, the main product, its low-rank part, what it is added to; zeros for what
    /// there is not.
    fn parts<'s>(&'s self, got: &'s Sums, rows: &Range<usize>) -> [(&'s [f64], &'s [f64]); 4] {
        let part = |sums: Option<&'s Arc<Sums>>| match sums {
            Some(sums) => (&sums.sums[rows.clone()], &sums.sizes[rows.clone()]),
            None => (&NONE[..rows.len()], &NONE[..rows.len()]),
        };
        let result = (&got.sums[rows.clone()], &got.sizes[rows.clone()]);
        [
            result,
            part(Some(&self.main.sums)),
            part(self.branch.as_ref().map(|(term, _)| &term.sums)),
            part(self.so_far.as_ref()),
        ]
    }

    /// Of a result of this dtype, whose sums have so many elements.
    fn bound(&self, dtype: DType, columns: usize, unit: f64) -> Bound {
        let gamma = |k: usize| k as f64 * unit / (1.0 - k as f64 * unit);
        let half = |dtype: DType| f64::from(half_ulp(dtype));
        let predicting = |terms: usize| gamma(terms + roundings(terms) + roundings(columns) + 3);
        let rounded = half(dtype);
        let adding = gamma(roundings(columns));
        let (mut so_far, mut branch, mut inner) = (adding, 0.0, 0.0);
        if let Some((term, dtype)) = &self.branch {
            // Rounded, scaled, and rounded again.
            branch = predicting(term.terms) + 2.0 * half(*dtype);
        }
        if self.branch.is_some() || self.so_far.is_some() || self.inner.is_some() {
            // Each part brought to the dtype of the sum, and the sum of all but the main one.
            inner = half(self.inner.unwrap_or(dtype)) + rounded;
            so_far += 2.0 * rounded;
            branch += 2.0 * rounded;
        }
        // Results below the dtype's normal range round by a fixed amount each; some units flush subnormals.
        let tiny = if dtype == DType::F16 { 2f64.powi(-24) } else { 2f64.powi(-125) };
        let tiny = (3 * columns + self.main.terms) as f64 * tiny;
        Bound {
            bias: self.bias,
            scaling: self.branch.as_ref().map_or(0.0, |(term, _)| f64::from(term.scaling)),
            main: predicting(self.main.terms),
            inner,
            result: rounded + adding,
            branch,
            so_far,
            tiny,
        }
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
}
