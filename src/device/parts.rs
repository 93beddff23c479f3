//! Operations that a device may fuse, as the operations they stand for: what [`Device`] does unless a device knows
//! better, and what hooks that look at every operation see.

use super::{Compute, DType, Device, LowRank, Norm, Tensor, Update, UpdateRule};
use crate::Result;

/// [`Device::linear_adapted`].
pub fn linear_adapted<D: Device + ?Sized>(
    device: &D,
    (x, w, bias): (&Tensor, &Tensor, Option<&Tensor>),
    (compute, out): (Compute, DType),
    branch: &LowRank<'_>,
    scaling: f32,
) -> Result<Tensor> {
    let y = device.linear(x, w, bias, compute, out)?;
    let v = device.linear(branch.x, branch.w, None, branch.compute, branch.dtype)?;
    let v = device.scale(&v, scaling, branch.dtype)?;
    let sum = device.add(&y, &v, if out == branch.dtype { out } else { DType::F32 })?;
    if sum.dtype == out { Ok(sum) } else { device.cast(&sum, out) }
}

/// [`Device::linear_input_grad_onto`].
pub fn input_grad_onto<D: Device + ?Sized>(
    device: &D,
    so_far: Option<Tensor>,
    branch: Option<&LowRank<'_>>,
    (dy, w): (&Tensor, &Tensor),
    (compute, out, dtype): (Compute, DType, DType),
) -> Result<Tensor> {
    let onto = |sum: Option<Tensor>, d: Tensor| {
        let d = if d.dtype == dtype { d } else { device.cast(&d, dtype)? };
        match sum {
            None => Ok(d),
            Some(sum) => device.add(&sum, &d, dtype),
        }
    };
    let mut sum = so_far;
    if let Some(branch) = branch {
        sum = Some(onto(sum, device.linear_input_grad(branch.x, branch.w, branch.compute, branch.dtype)?)?);
    }
    onto(sum, device.linear_input_grad(dy, w, compute, out)?)
}

/// [`Device::accumulate_units`].
pub fn accumulate_units<D: Device + ?Sized>(device: &D, acc: &mut Tensor, units: &Tensor) -> Result<()> {
    let count = units.shape.first().copied().unwrap_or(0);
    let flat = Tensor { shape: vec![count, acc.elements()], ..units.clone() };
    for unit in 0..count {
        let one = device.gather_rows(&flat, &[unit as u32])?;
        device.accumulate(acc, &Tensor { shape: acc.shape.clone(), ..one })?;
    }
    Ok(())
}

/// [`Device::update`].
pub fn update<D: Device + ?Sized>(device: &D, tensors: &mut [Update<'_>], factors: [f32; 2]) -> Result<f64> {
    let mut squares = 0.0;
    for Update { p, g, rule } in tensors {
        let mut g = g.clone();
        for factor in factors.into_iter().filter(|&f| f != 1.0) {
            device.scale_in_place(&mut g, factor)?;
        }
        let before = p.clone();
        match rule {
            UpdateRule::AdamW { m, v, with } => device.adamw(p, &g, m, v, with)?,
            UpdateRule::Sgd { learning_rate, weight_decay } => device.sgd(p, &g, *learning_rate, *weight_decay)?,
        }
        let moved = device.add(p, &device.scale(&before, -1.0, before.dtype)?, DType::F32)?;
        for (norm, _) in device.norms(&moved, &[0, moved.rows()])? {
            squares += f64::from(norm).powi(2);
        }
    }
    Ok(squares.sqrt())
}

/// [`Device::norms_of`].
pub fn norms_of<D: Device + ?Sized>(device: &D, tensors: &[Tensor], factor: f32) -> Result<Vec<Norm>> {
    let mut norms = Vec::with_capacity(tensors.len());
    for x in tensors {
        let scaled = if factor == 1.0 { x.clone() } else { device.scale(x, factor, x.dtype)? };
        norms.extend(device.norms(&scaled, &[0, x.rows()])?);
    }
    Ok(norms)
}
