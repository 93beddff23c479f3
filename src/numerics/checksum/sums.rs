//! Sums of a product's operands: of frozen weights once, of activations as the product rounds them.

use std::collections::HashMap;
use std::sync::Arc;

use crate::Result;
use crate::device::checks::{Sums, Weights};
use crate::device::{Compute, DType, Device, Tensor};

/// A matrix of fewer elements is summed anew each time: adapters change with every step.
const WORTH_KEEPING: usize = 1 << 16;
/// Kept sums; beyond it all are dropped.
const KEPT: usize = 4096;

/// Factors of frozen weights, with the tensor whose memory they belong to: while it is held, its address is its own.
#[derive(Default)]
pub struct Kept(HashMap<(usize, bool, Compute), (Tensor, Arc<Sums>)>);

impl Kept {
    /// Those of a weight that does not change.
    pub fn frozen(
        &mut self,
        device: &dyn Device,
        w: &Tensor,
        compute: Compute,
        over_rows: bool,
    ) -> Result<Option<Arc<Sums>>> {
        (w.elements() >= WORTH_KEEPING).then(|| self.factors(device, w, compute, over_rows)).transpose()
    }

    /// Sums of a right operand over its rows (`over_rows`) or columns.
    pub fn factors(&mut self, device: &dyn Device, w: &Tensor, compute: Compute, over_rows: bool) -> Result<Arc<Sums>> {
        let key = (w.storage.identity(), over_rows, compute);
        if let Some((_, factors)) = self.0.get(&key) {
            return Ok(Arc::clone(factors));
        }
        let rounded = operand(device, w, compute)?;
        let sums = match over_rows {
            true => device.column_checks(&rounded, &[0, w.rows()])?,
            false => of_rows(device, &rounded, Weights::Ones)?,
        };
        let factors = Arc::new(sums);
        if w.elements() >= WORTH_KEEPING {
            if self.0.len() >= KEPT {
                self.0.clear();
            }
            self.0.insert(key, (w.clone(), Arc::clone(&factors)));
        }
        Ok(factors)
    }
}

/// A tensor and its row sums: asked for again by the next product.
#[derive(Default)]
pub struct Last(Option<(Tensor, Arc<Sums>)>);

impl Last {
    pub fn rows(&mut self, device: &dyn Device, x: &Tensor) -> Result<Arc<Sums>> {
        match &self.0 {
            Some((held, sums)) if same(held, x) => Ok(Arc::clone(sums)),
            _ => {
                let sums = Arc::new(of_rows(device, x, Weights::Ones)?);
                self.0 = Some((x.clone(), Arc::clone(&sums)));
                Ok(sums)
            }
        }
    }
}

/// Whether two tensors, both held, are one.
pub fn same(a: &Tensor, b: &Tensor) -> bool {
    a.storage.identity() == b.storage.identity() && a.shape == b.shape && a.dtype == b.dtype
}

pub fn of_rows(device: &dyn Device, x: &Tensor, weights: Weights<'_>) -> Result<Sums> {
    Ok(device.row_checks(x, &[weights])?.pop().unwrap_or_default())
}

/// Σ and Σ|·| of all elements.
pub fn of_all(device: &dyn Device, x: &Tensor) -> Result<(f64, f64)> {
    let sums = of_rows(device, x, Weights::Ones)?;
    let add = |all: &[f32]| all.iter().map(|x| f64::from(*x)).sum();
    Ok((add(&sums.sums), add(&sums.sizes)))
}

/// Per unit and column of a narrow operand: Σ_k narrow[k, column] · (Σ of the wide one's row k).
pub fn of_units(narrow: &[f32], tokens: &Sums, units: &[usize]) -> Sums {
    let columns = narrow.len() / tokens.sums.len().max(1);
    let mut all = Sums::default();
    for unit in units.windows(2) {
        let (mut sums, mut sizes) = (vec![0f64; columns], vec![0f64; columns]);
        for k in unit[0]..unit[1] {
            for ((sum, size), &d) in sums.iter_mut().zip(&mut sizes).zip(&narrow[k * columns..(k + 1) * columns]) {
                *sum += f64::from(d) * f64::from(tokens.sums[k]);
                *size += f64::from(d).abs() * f64::from(tokens.sizes[k]);
            }
        }
        all.sums.extend(sums.iter().map(|x| *x as f32));
        all.sizes.extend(sizes.iter().map(|x| *x as f32));
    }
    all
}

/// A tensor as the product rounds it.
pub fn operand(device: &dyn Device, x: &Tensor, compute: Compute) -> Result<Tensor> {
    match compute {
        Compute::Bf16 if x.dtype != DType::BF16 => device.cast(x, DType::BF16),
        Compute::F16 if x.dtype != DType::F16 => device.cast(x, DType::F16),
        Compute::Tf32 => {
            let values: Vec<f32> = device.download(x)?.into_iter().map(tf32).collect();
            device.upload(&values, &x.shape, DType::F32)
        }
        Compute::F32 | Compute::Bf16 | Compute::F16 => Ok(x.clone()),
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
