//! Products whose terms are added in another order, or in parts: what honest arithmetic may make of the same step.

use crate::Result;
use crate::device::hooked::{Call, Hook, Product};
use crate::device::{DType, Device, Tensor, noise};

/// The hook that shuffles the inner dimension of every forward product and input gradient.
pub struct Reorder {
    pub seed: u64,
}

impl Hook for Reorder {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let [y] = result.as_slice() else { return Ok(result) };
        match call.product {
            Some(Product::Forward { x, w, bias, compute }) => {
                let order = self.order(x.columns());
                let (x, w) = (columns(device, x, &order)?, columns(device, w, &order)?);
                Ok(vec![device.linear(&x, &w, bias, compute, y.dtype)?])
            }
            Some(Product::InputGrad { dy, w, compute }) => {
                let order = self.order(dy.columns());
                let rows: Vec<u32> = order.iter().map(|&k| k as u32).collect();
                let (dy, w) = (columns(device, dy, &order)?, device.gather_rows(w, &rows)?);
                Ok(vec![device.linear_input_grad(&dy, &w, compute, y.dtype)?])
            }
            _ => Ok(result),
        }
    }
}

impl Reorder {
    /// A permutation of 0..n (Fisher, Yates).
    fn order(&self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, (noise::bits(self.seed, n as u64, i as u64) % (i as u64 + 1)) as usize);
        }
        order
    }
}

/// The hook that cuts the inner dimension of those products in parts, whose sums are rounded to the result's dtype
/// before they are added: what cuBLAS may do unless CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION is set.
pub struct SplitK {
    pub parts: usize,
}

impl Hook for SplitK {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let [y] = result.as_slice() else { return Ok(result) };
        let (bias, inner) = match call.product {
            Some(Product::Forward { x, bias, .. }) => (bias, x.columns()),
            Some(Product::InputGrad { dy, .. }) => (None, dy.columns()),
            _ => return Ok(result),
        };
        let mut sum: Option<Tensor> = None;
        for part in 0..self.parts {
            let range: Vec<usize> = (inner * part / self.parts..inner * (part + 1) / self.parts).collect();
            if range.is_empty() {
                continue;
            }
            let one = match call.product {
                Some(Product::Forward { x, w, compute, .. }) => {
                    // The bias is part of one of the sums, as a beta of 1 would make it.
                    let bias = bias.filter(|_| part == 0);
                    device.linear(&columns(device, x, &range)?, &columns(device, w, &range)?, bias, compute, y.dtype)?
                }
                Some(Product::InputGrad { dy, w, compute }) => {
                    let rows: Vec<u32> = range.iter().map(|&k| k as u32).collect();
                    let (dy, w) = (columns(device, dy, &range)?, device.gather_rows(w, &rows)?);
                    device.linear_input_grad(&dy, &w, compute, y.dtype)?
                }
                _ => return Ok(result),
            };
            sum = Some(match sum {
                None => one,
                Some(sum) => device.add(&sum, &one, DType::F32)?,
            });
        }
        match sum {
            Some(sum) if sum.dtype != y.dtype => Ok(vec![device.cast(&sum, y.dtype)?]),
            Some(sum) => Ok(vec![sum]),
            None => Ok(result),
        }
    }
}

/// Columns of x, in the order named.
fn columns(device: &dyn Device, x: &Tensor, order: &[usize]) -> Result<Tensor> {
    let values = device.download(x)?;
    let rows = values.chunks(x.columns().max(1));
    let picked: Vec<f32> = rows.flat_map(|row| order.iter().map(|&k| row[k])).collect();
    device.upload(&picked, &[x.rows(), order.len()], x.dtype)
}
