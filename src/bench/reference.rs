//! The reference of gradient errors: matrix products accumulated in f64.
//!
//! A hook over a device in f32 arithmetic. Only what sums many terms is done here; elementwise operations of an f32
//! plan round at 2⁻²⁴ a time, far below what half formats are judged by. Slow, and used for a few windows.

use crate::Result;
use crate::device::hooked::{Call, Hook, Product};
use crate::device::{Device, Offsets, Tensor};

/// Replaces every product by its f64 sum.
pub struct Reference;

impl Hook for Reference {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let [y] = result.as_slice() else { return Ok(result) };
        let values = match call.product {
            Some(Product::Forward { x, w, bias, .. }) => linear(device, x, w, bias)?,
            Some(Product::InputGrad { dy, w, .. }) => linear_input_grad(device, dy, w)?,
            Some(Product::WeightGrad { dy, x, units, .. }) => linear_weight_grad(device, dy, x, units)?,
            // Fused products come in parts to a hook that sees everything.
            Some(Product::Adapted { .. } | Product::Onto { .. }) | None => return Ok(result),
        };
        Ok(vec![device.upload(&values, &y.shape, y.dtype)?])
    }
}

/// Σ_k a[i, k] · b[k, j] for the layouts of the three products, f64, rounded once to f32.
fn product(
    shape: (usize, usize, usize),
    at: impl Fn(usize, usize) -> f32,
    bt: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let (rows, inner, columns) = shape;
    let mut out = Vec::with_capacity(rows * columns);
    let mut sums = vec![0f64; columns];
    for i in 0..rows {
        sums.fill(0.0);
        for k in 0..inner {
            let a = f64::from(at(i, k));
            sums.iter_mut().enumerate().for_each(|(j, sum)| *sum += a * f64::from(bt(k, j)));
        }
        out.extend(sums.iter().map(|s| *s as f32));
    }
    out
}

fn linear(device: &dyn Device, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Vec<f32>> {
    let (n, fan_in, fan_out) = (x.rows(), x.columns(), w.rows());
    let (xs, ws) = (device.download(x)?, device.download(w)?);
    // Columns of wᵀ side by side, so that the inner loop reads in order.
    let mut turned = vec![0f32; ws.len()];
    for (o, row) in ws.chunks_exact(fan_in).enumerate() {
        row.iter().enumerate().for_each(|(i, value)| turned[i * fan_out + o] = *value);
    }
    let mut y = product((n, fan_in, fan_out), |i, k| xs[i * fan_in + k], |k, j| turned[k * fan_out + j]);
    if let Some(bias) = bias {
        let bias = device.download(bias)?;
        y.chunks_exact_mut(fan_out).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y += b));
    }
    Ok(y)
}

fn linear_input_grad(device: &dyn Device, dy: &Tensor, w: &Tensor) -> Result<Vec<f32>> {
    let (n, fan_out, fan_in) = (dy.rows(), dy.columns(), w.columns());
    let (dys, ws) = (device.download(dy)?, device.download(w)?);
    Ok(product((n, fan_out, fan_in), |i, k| dys[i * fan_out + k], |k, j| ws[k * fan_in + j]))
}

fn linear_weight_grad(device: &dyn Device, dy: &Tensor, x: &Tensor, units: Offsets<'_>) -> Result<Vec<f32>> {
    let (fan_out, fan_in) = (dy.columns(), x.columns());
    let (dys, xs) = (device.download(dy)?, device.download(x)?);
    let mut all = Vec::new();
    for unit in units.windows(2) {
        let rows = unit[1] - unit[0];
        let (dys, xs) = (&dys[unit[0] * fan_out..unit[1] * fan_out], &xs[unit[0] * fan_in..unit[1] * fan_in]);
        all.extend(product((fan_out, rows, fan_in), |i, k| dys[k * fan_out + i], |k, j| xs[k * fan_in + j]));
    }
    Ok(all)
}
