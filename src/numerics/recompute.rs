//! Every operation of a step once more on another device, from the same operands: what it gave against what it should.
//!
//! Devices of one fingerprint give the same bits. Those of two kinds differ by rounding alone. For products the bound is derived: 2·γ_k·‖x‖·‖w‖ for an
//! element of x·wᵀ (Cauchy–Schwarz on Higham's γ_k Σ|x||w|, once per device), and a unit in the last place of a half
//! result. For the other operations it is an allowance: reductions over a row, exp and rsqrt of different libraries
//! stay within [`ALLOWANCE`] of the row's largest magnitude.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

use crate::Result;
use crate::device::hooked::{Call, Elsewhere, Hook, Product};
use crate::device::noise::half_ulp;
use crate::device::{DType, Device, Tensor};

/// Of the largest magnitude of a tensor: 2^-13, sixteen times what a sum of 2^7 terms of f32 roundings can give.
pub const ALLOWANCE: f64 = 1.0 / 8192.0;

/// An element that another device computes otherwise.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mismatch {
    /// Operations since the hook was set.
    pub call: usize,
    pub operation: &'static str,
    pub result: usize,
    pub row: usize,
    /// Within the row.
    pub column: usize,
    #[serde(serialize_with = "number")]
    pub ours: f32,
    #[serde(serialize_with = "number")]
    pub theirs: f32,
    pub bound: f64,
}

/// JSON has no infinities.
fn number<S: serde::Serializer>(x: &f32, to: S) -> std::result::Result<S::Ok, S::Error> {
    if x.is_finite() { to.serialize_f32(*x) } else { to.serialize_str(&x.to_string().to_lowercase()) }
}

#[derive(Default)]
struct Found {
    calls: usize,
    mismatches: Vec<Mismatch>,
}

/// The hook that recomputes.
pub struct Recompute {
    other: Arc<dyn Device>,
    /// Operands lie where `other` can read them.
    shares_memory: bool,
    found: Mutex<Found>,
}

impl Recompute {
    pub fn on(other: Arc<dyn Device>, shares_memory: bool) -> Self {
        Self { other, shares_memory, found: Mutex::default() }
    }
    pub fn mismatches(&self) -> Vec<Mismatch> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).mismatches.clone()
    }
}

impl Hook for Recompute {
    fn after(&self, device: &dyn Device, call: &Call<'_>, results: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let mismatch = match call.again {
            None => None,
            Some(again) => {
                let from = (!self.shares_memory).then_some(device);
                let theirs = again(&Elsewhere { device: &*self.other, from })?;
                compare(device, &*self.other, call.product.as_ref(), &results, &theirs)?
            }
        };
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((result, element, ours, theirs, bound)) = mismatch {
            let columns = results[result].columns().max(1);
            let (row, column) = (element / columns, element % columns);
            let (call, operation) = (found.calls, call.operation);
            found.mismatches.push(Mismatch { call, operation, result, row, column, ours, theirs, bound });
        }
        found.calls += 1;
        Ok(results)
    }
    fn repeats_in_place(&self) -> bool {
        true
    }
}

/// Result, element, our value, theirs, and the bound.
type Beyond = (usize, usize, f32, f32, f64);

/// The element furthest beyond its bound.
fn compare(
    device: &dyn Device,
    other: &dyn Device,
    product: Option<&Product<'_>>,
    ours: &[Tensor],
    theirs: &[Tensor],
) -> Result<Option<Beyond>> {
    let mut worst: Option<(f64, Beyond)> = None;
    for (result, (x, y)) in ours.iter().zip(theirs).enumerate() {
        let (a, b) = (device.download(x)?, other.download(y)?);
        if a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()) {
            continue;
        }
        let same_kind = device.fingerprint() == other.fingerprint();
        let bounds = if same_kind { Bounds::None } else { Bounds::of(device, product, x, &b)? };
        for (element, (&a, &b)) in a.iter().zip(&b).enumerate() {
            let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            let (difference, bound) = (f64::from(a - b).abs(), bounds.at(element, b));
            // A difference that is NaN or infinite exceeds every bound.
            let excess = if difference.is_finite() { difference / bound } else { f64::INFINITY };
            if !same && excess > 1.0 && worst.as_ref().is_none_or(|(most, _)| excess > *most) {
                worst = Some((excess, (result, element, a, b, bound)));
            }
        }
    }
    Ok(worst.map(|(_, found)| found))
}

/// How far honest results may lie apart.
enum Bounds {
    None,
    /// Norms of the operands' vectors by row and column of the result, times 2γ; columns of the result.
    Product {
        rows: Vec<f64>,
        columns: Vec<f64>,
        dtype: DType,
    },
    Whole {
        largest: f64,
        dtype: DType,
    },
}

impl Bounds {
    fn of(device: &dyn Device, product: Option<&Product<'_>>, x: &Tensor, values: &[f32]) -> Result<Self> {
        let finite = values.iter().map(|v| f64::from(v.abs())).filter(|v| v.is_finite());
        let whole = Bounds::Whole { largest: finite.fold(0.0, f64::max), dtype: x.dtype };
        let (left, right, terms) = match product {
            Some(Product::Forward { x, w, bias: None, .. }) => {
                (norms(device, x, true)?, norms(device, w, true)?, x.columns())
            }
            Some(Product::InputGrad { dy, w, .. }) => {
                (norms(device, dy, true)?, norms(device, w, false)?, dy.columns())
            }
            // Units of a weight gradient and biased sums are judged as a whole.
            _ => return Ok(whole),
        };
        let gamma = terms as f64 * f64::from(f32::EPSILON);
        let rows = left.into_iter().map(|n| n * gamma).collect();
        Ok(Bounds::Product { rows, columns: right, dtype: x.dtype })
    }

    fn at(&self, element: usize, value: f32) -> f64 {
        // Two roundings to a half dtype may fall to either side.
        let ulp =
            |dtype: DType, value: f64| if dtype.is_half() { 4.0 * f64::from(half_ulp(dtype)) * value } else { 0.0 };
        match self {
            Bounds::None => 0.0,
            Bounds::Product { rows, columns, dtype } => {
                let (row, column) = (element / columns.len(), element % columns.len());
                rows[row] * columns[column] + ulp(*dtype, f64::from(value.abs())) + f64::from(f32::MIN_POSITIVE)
            }
            Bounds::Whole { largest, dtype } => {
                largest * ALLOWANCE + ulp(*dtype, *largest) + f64::from(f32::MIN_POSITIVE)
            }
        }
    }
}

/// ‖·‖₂ of each row, or of each column.
fn norms(device: &dyn Device, x: &Tensor, by_row: bool) -> Result<Vec<f64>> {
    let values = device.download(x)?;
    let columns = x.columns().max(1);
    let square = |v: &f32| f64::from(*v) * f64::from(*v);
    if by_row {
        return Ok(values.chunks(columns).map(|row| row.iter().map(square).sum::<f64>().sqrt()).collect());
    }
    let mut sums = vec![0f64; columns];
    values.chunks(columns).for_each(|row| sums.iter_mut().zip(row).for_each(|(sum, v)| *sum += square(v)));
    Ok(sums.into_iter().map(f64::sqrt).collect())
}
