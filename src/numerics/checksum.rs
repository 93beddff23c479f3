//! Checksums of matrix products (algorithm-based fault tolerance: Huang, Abraham, IEEE Trans. Computers C-33, 1984).
//!
//! The sum of a row of y = x·wᵀ equals x · (sum of w's rows), for the cost of one more column. It is exact but for
//! rounding, whose bound is derived: a product of k terms with f32 accumulation is off by at most
//! γ_k Σ|x||w| with γ_k = k·u/(1 − k·u), u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §3.1),
//! rounding to the result's dtype by half a unit in the last place of each element. Whatever exceeds both is no rounding.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::Result;
use crate::device::checks::{column_checks, row_check};
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
    /// Sums of frozen weights, with the tensor whose memory they belong to: while it is held, its address is its own.
    weights: HashMap<(usize, bool, Compute), (Tensor, Arc<Sums>)>,
}

/// Σ and Σ|·| of a matrix's rows or columns.
type Sums = (Vec<f64>, Vec<f64>);

/// A matrix of fewer elements is summed anew each time: adapters change with every step.
const WORTH_KEEPING: usize = 1 << 16;
/// Kept sums; beyond it all are dropped.
const KEPT: usize = 4096;

/// The hook that checks every product.
#[derive(Default)]
pub struct Checksums(Mutex<Found>);

impl Checksums {
    /// Products seen and what was wrong with them, first the earliest.
    pub fn found(&self) -> (u64, Vec<Violation>) {
        let found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        (found.products, found.violations.clone())
    }

    /// Sums of a right operand over its rows (`over_rows`) or columns.
    fn sums(&self, device: &dyn Device, w: &Tensor, compute: Compute, over_rows: bool) -> Result<Arc<Sums>> {
        let key = (w.storage.identity(), over_rows, compute);
        if let Some((_, sums)) = self.0.lock().unwrap_or_else(PoisonError::into_inner).weights.get(&key) {
            return Ok(Arc::clone(sums));
        }
        let rounded = operand(device, w, compute)?;
        let sums = Arc::new(if over_rows {
            column_checks(&device.download(&rounded)?, w.columns())
        } else {
            device.row_checks(&rounded, None)?.into_iter().unzip()
        });
        if w.elements() >= WORTH_KEEPING {
            let kept = &mut self.0.lock().unwrap_or_else(PoisonError::into_inner).weights;
            if kept.len() >= KEPT {
                kept.clear();
            }
            kept.insert(key, (w.clone(), Arc::clone(&sums)));
        }
        Ok(sums)
    }

    /// The first row whose sum is off by more than rounding: row, difference, bound.
    fn check(&self, device: &dyn Device, product: &Product<'_>, y: &Tensor) -> Result<Option<(usize, f64, f64)>> {
        let got = device.row_checks(y, None)?;
        let (expected, terms) = match *product {
            Product::Forward { x, w, bias, compute } => {
                let sums = self.sums(device, w, compute, true)?;
                let mut expected = device.row_checks(&operand(device, x, compute)?, Some((&sums.0, &sums.1)))?;
                if let Some(bias) = bias {
                    let own = row_check(&device.download(bias)?, None);
                    expected.iter_mut().for_each(|e| *e = (e.0 + own.0, e.1 + own.1));
                }
                (expected, x.columns() + 1)
            }
            Product::InputGrad { dy, w, compute } => {
                let sums = self.sums(device, w, compute, false)?;
                (device.row_checks(&operand(device, dy, compute)?, Some((&sums.0, &sums.1)))?, dy.columns())
            }
            Product::WeightGrad { dy, x, units, compute } => {
                let tokens = device.row_checks(&operand(device, x, compute)?, None)?;
                let dy = device.download(&operand(device, dy, compute)?)?;
                let longest = units.windows(2).map(|u| u[1] - u[0]).max().unwrap_or(0);
                (weight_grad_sums(&dy, &tokens, units), longest)
            }
        };
        Ok(first_wrong(&got, &expected, terms, y))
    }
}

/// Per unit and row of dyᵀ·x: Σ_k dy[k, row] · (Σ of x's row k).
fn weight_grad_sums(dy: &[f32], tokens: &[(f64, f64)], units: &[usize]) -> Vec<(f64, f64)> {
    let rows = dy.len() / tokens.len().max(1);
    let mut all = Vec::with_capacity(rows * units.len());
    for unit in units.windows(2) {
        let mut sums = vec![(0f64, 0f64); rows];
        for k in unit[0]..unit[1] {
            for (sum, &d) in sums.iter_mut().zip(&dy[k * rows..(k + 1) * rows]) {
                sum.0 += f64::from(d) * tokens[k].0;
                sum.1 += f64::from(d).abs() * tokens[k].1;
            }
        }
        all.extend(sums);
    }
    all
}

/// `got` and `expected` per row of y: its sum with the sum of its magnitudes, and both from the operands.
fn first_wrong(got: &[(f64, f64)], expected: &[(f64, f64)], terms: usize, y: &Tensor) -> Option<(usize, f64, f64)> {
    let roundings = terms as f64 * f64::from(half_ulp(DType::F32));
    let gamma = roundings / (1.0 - roundings);
    // Results below the dtype's normal range round by a fixed amount each; some units flush subnormals.
    let tiny = y.columns() as f64 * if y.dtype == DType::F16 { 2f64.powi(-25) } else { 2f64.powi(-125) };
    got.iter().zip(expected).enumerate().find_map(|(row, (&(sum, size), &(expected, weight)))| {
        // From operands that are not finite no more can be said.
        if !weight.is_finite() {
            return None;
        }
        let bound = gamma * weight + f64::from(half_ulp(y.dtype)) * size + tiny;
        let difference = (sum - expected).abs();
        // An overflow of a half dtype is no fault: the operands ask for it. Anything else that is not finite is.
        let overflow = y.dtype == DType::F16 && weight > 65504.0 && !sum.is_finite();
        let wrong = difference > bound || !difference.is_finite();
        (wrong && !overflow).then_some((row, difference, bound))
    })
}

/// A tensor as the product rounds it.
fn operand(device: &dyn Device, x: &Tensor, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::Bf16 if x.dtype != DType::BF16 => device.cast(x, DType::BF16),
        Compute::F16 if x.dtype != DType::F16 => device.cast(x, DType::F16),
        Compute::Tf32 => {
            let values: Vec<f32> = device.download(x)?.into_iter().map(tf32).collect();
            device.upload(&values, &x.shape, DType::F32)
        }
        _ => Ok(x.clone()),
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

impl Hook for Checksums {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let (Some(product), [y]) = (&call.product, result.as_slice()) else { return Ok(result) };
        let wrong = self.check(device, product, y)?;
        let mut found = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((row, difference, bound)) = wrong {
            let product = found.products;
            found.violations.push(Violation { product, operation: call.operation, row, difference, bound });
        }
        found.products += 1;
        Ok(result)
    }
}
