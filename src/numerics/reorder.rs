//! Products whose terms are added in another order: what honest arithmetic may make of the same step.

use crate::Result;
use crate::device::hooked::{Call, Hook, Product};
use crate::device::{Device, Tensor, noise};

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

fn columns(device: &dyn Device, x: &Tensor, order: &[usize]) -> Result<Tensor> {
    let values = device.download(x)?;
    let shuffled: Vec<f32> = values.chunks(order.len()).flat_map(|row| order.iter().map(|&k| row[k])).collect();
    device.upload(&shuffled, &x.shape, x.dtype)
}
