//! Checksums of matrix products (algorithm-based fault tolerance: Huang, Abraham, IEEE Trans. Computers C-33, 1984).
//!
//! The sum of a row of y = x·wᵀ equals x · (sum of w's rows), for the cost of one more column. It is exact but for
//! rounding, whose bound is derived: a product of k terms with f32 accumulation is off by at most
//! γ_k Σ|x||w| with γ_k = k·u/(1 − k·u), u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §3.1),
//! rounding to the result's dtype by half a unit in the last place of each element. Whatever exceeds both is no rounding.

use std::sync::Mutex;

use serde::Serialize;

use crate::Result;
use crate::device::hooked::{Call, Hook, Product};
use crate::device::noise::half_ulp;
use crate::device::{Compute, DType, Device, Tensor};

/// A row of a product whose sum is not what its operands say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Violation {
    /// Products since the hook was made, counting from 0.
    pub product: u64,
    pub operation: &'static str,
    pub row: usize,
    /// |sum of the row − sum from the operands|, and the bound of rounding.
    pub difference: f64,
    pub bound: f64,
}

#[derive(Default)]
struct Found {
    products: u64,
    violations: Vec<Violation>,
}

/// The hook that checks every forward product and input gradient, and weight gradients by unit.
#[derive(Default)]
pub struct Checksums(Mutex<Found>);

impl Checksums {
    /// Products seen and what was wrong with them, first the earliest.
    pub fn found(&self) -> (u64, Vec<Violation>) {
        let found = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (found.products, found.violations.clone())
    }
}

/// left [n, k] · right [k, m] as the rows of a product see it: elements by row and column.
struct Operands<'o> {
    left: &'o [f32],
    /// Element (row, k) of left.
    left_at: (usize, usize),
    right: &'o [f32],
    /// Element (k, column) of right.
    right_at: (usize, usize),
    size: (usize, usize, usize),
    bias: Option<&'o [f32]>,
}

impl Operands<'_> {
    /// Per k: Σ_columns right and Σ_columns |right|.
    fn column_sums(&self) -> Vec<(f64, f64)> {
        let (_, inner, columns) = self.size;
        let mut sums = vec![(0f64, 0f64); inner];
        let mut add = |k: usize, c: usize| {
            let value = f64::from(self.right[k * self.right_at.0 + c * self.right_at.1]);
            sums[k].0 += value;
            sums[k].1 += value.abs();
        };
        // In the order in which the elements lie.
        if self.right_at.0 < self.right_at.1 {
            (0..columns).for_each(|c| (0..inner).for_each(|k| add(k, c)));
        } else {
            (0..inner).for_each(|k| (0..columns).for_each(|c| add(k, c)));
        }
        sums
    }

    /// The first row of y [n, m] whose sum is off by more than rounding.
    fn first_wrong(&self, y: &[f32], out: DType) -> Option<(usize, f64, f64)> {
        let (rows, inner, columns) = self.size;
        let sums = self.column_sums();
        let bias = self
            .bias
            .map_or((0.0, 0.0), |b| b.iter().fold((0.0, 0.0), |(s, a), &x| (s + f64::from(x), a + f64::from(x).abs())));
        let roundings = (inner + 1) as f64 * f64::from(f32::EPSILON) / 2.0;
        let gamma = roundings / (1.0 - roundings);
        (0..rows).find_map(|row| {
            let (mut expected, mut weight) = bias;
            for (k, (sum, absolute)) in sums.iter().enumerate() {
                let x = f64::from(self.left[row * self.left_at.0 + k * self.left_at.1]);
                expected += x * sum;
                weight += x.abs() * absolute;
            }
            let line = &y[row * columns..(row + 1) * columns];
            let (sum, absolute) =
                line.iter().fold((0f64, 0f64), |(s, a), &v| (s + f64::from(v), a + f64::from(v).abs()));
            // Non-finite operands make non-finite sums: what comes out must be non-finite as well, and no more can be said.
            if !expected.is_finite() {
                return None;
            }
            let own = if out == DType::F32 { f64::from(half_ulp(DType::F32)) } else { f64::from(half_ulp(out)) };
            // Results below the dtype's normal range round by a fixed amount each.
            let tiny = columns as f64 * if out == DType::F16 { 2f64.powi(-25) } else { 2f64.powi(-134) };
            let bound = gamma * weight + own * absolute.max(expected.abs()) + tiny;
            let difference = (sum - expected).abs();
            // NaN counts as wrong.
            (!(difference <= bound)).then_some((row, difference, bound))
        })
    }
}

/// A tensor's elements as the product rounds them.
fn operand(device: &dyn Device, x: &Tensor, compute: Compute) -> Result<Vec<f32>> {
    match compute {
        Compute::Bf16 if x.dtype != DType::BF16 => device.download(&device.cast(x, DType::BF16)?),
        Compute::F16 if x.dtype != DType::F16 => device.download(&device.cast(x, DType::F16)?),
        Compute::Tf32 => Ok(device.download(x)?.into_iter().map(tf32).collect()),
        _ => device.download(x),
    }
}

/// f32 rounded to ten bits below the leading one, to nearest even.
fn tf32(x: f32) -> f32 {
    let bits = x.to_bits();
    if !x.is_finite() {
        return x;
    }
    f32::from_bits(bits.wrapping_add(0x0fff + ((bits >> 13) & 1)) & !0x1fff)
}

/// Checks one product. `None`: every row agrees.
///
/// # Errors
/// Those of the device.
fn check(device: &dyn Device, product: &Product<'_>, y: &Tensor) -> Result<Option<(usize, f64, f64)>> {
    let values = device.download(y)?;
    match *product {
        Product::Forward { x, w, bias, compute } => {
            let (left, right) = (operand(device, x, compute)?, operand(device, w, compute)?);
            let bias = bias.map(|b| device.download(b)).transpose()?;
            let (n, k, m) = (x.rows(), x.columns(), w.rows());
            let operands = Operands {
                left: &left,
                left_at: (k, 1),
                right: &right,
                right_at: (1, k),
                size: (n, k, m),
                bias: bias.as_deref(),
            };
            Ok(operands.first_wrong(&values, y.dtype))
        }
        Product::InputGrad { dy, w, compute } => {
            let (left, right) = (operand(device, dy, compute)?, operand(device, w, compute)?);
            let (n, k, m) = (dy.rows(), dy.columns(), w.columns());
            let operands =
                Operands { left: &left, left_at: (k, 1), right: &right, right_at: (m, 1), size: (n, k, m), bias: None };
            Ok(operands.first_wrong(&values, y.dtype))
        }
        Product::WeightGrad { dy, x, units, compute } => {
            let (left, right) = (operand(device, dy, compute)?, operand(device, x, compute)?);
            let (n, m) = (dy.columns(), x.columns());
            for (u, unit) in units.windows(2).enumerate() {
                let operands = Operands {
                    left: &left[unit[0] * n..unit[1] * n],
                    left_at: (1, n),
                    right: &right[unit[0] * m..unit[1] * m],
                    right_at: (m, 1),
                    size: (n, unit[1] - unit[0], m),
                    bias: None,
                };
                if let Some((row, difference, bound)) =
                    operands.first_wrong(&values[u * n * m..(u + 1) * n * m], y.dtype)
                {
                    return Ok(Some((u * n + row, difference, bound)));
                }
            }
            Ok(None)
        }
    }
}

impl Hook for Checksums {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let (Some(product), [y]) = (&call.product, result.as_slice()) else { return Ok(result) };
        let wrong = check(device, product, y)?;
        let mut found = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((row, difference, bound)) = wrong {
            let product = found.products;
            found.violations.push(Violation { product, operation: call.operation, row, difference, bound });
        }
        found.products += 1;
        Ok(result)
    }
}
