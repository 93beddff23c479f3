//! Faults planted into a device: what triage is tested against, and what a user can try a method on.
//!
//! A fault names an operation by its place in the step (the n-th call since [`Faults::begin_step`]), one of its results and
//! an element. It strikes in the first step only (a transient), or in every one (a broken unit). Operations forward give
//! activations, those backward gradients, the optimizer's weights and their moments.

use std::sync::Mutex;

use super::Reorder;
use super::checksum::operand;
use crate::device::hooked::{Call, Hook, Product};
use crate::device::{Compute, DType, Device, Tensor};
use crate::{Error, Result};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// One bit of one element inverted, in the tensor's storage dtype.
    Flip { bit: u32 },
    /// One bit of every `every`-th element, from the named one on, always 1: a lane.
    StuckAtOne { bit: u32, every: usize },
    /// The element is that of another row: a tile read from the wrong address.
    OtherRow,
    /// The same for a run of [`LANES`] elements.
    OtherTile,
    /// One bit of the accumulator of a product's element, inverted when half of its terms are added.
    Accumulator { bit: u32 },
    /// One bit of an element of the weight that a product reads, inverted for this product.
    Weight { bit: u32 },
    /// The terms of a product are added in another order every time: not a fault, but not the same bits either.
    Order,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lasts {
    /// In the first step only.
    Once,
    /// Whenever the operation runs at this place, in every step.
    Always,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Calls since the beginning of the step, counting from 0.
    pub call: u64,
    pub output: usize,
    pub element: usize,
    pub wrong: Wrong,
    pub lasts: Lasts,
}

/// How a fault is written, for people.
pub const SYNTAX: &str = "CALL:OUTPUT:ELEMENT:KIND[:once]. CALL counts the operations of the step from 0 (--triage prints \
the place of what it finds), OUTPUT the operation's results (of adamw 0 weight, 1 first and 2 second moment), ELEMENT wraps. KIND: \
flip=BIT of that element, stuck=BIT (always 1 in every 16th element), row or tile (that element, or 16, of the next row), \
acc=BIT of a product's accumulator half-way through, weight=BIT of a product's weight (ELEMENT counts in it), order (a product \
adds its terms in another order each time). With :once it strikes in the first repeat only";

/// [`SYNTAX`].
///
/// # Errors
/// Anything else.
pub fn parse_fault(typed: &str) -> Result<Fault> {
    let wrong = || {
        Error::usage(format!("there is no fault {typed:?}"))
            .next("CALL:OUTPUT:ELEMENT:KIND, KIND one of flip=BIT, stuck=BIT, acc=BIT, weight=BIT, row, tile, order, and :once for a \
                   transient; 12:0:5:flip=14")
    };
    let parts: Vec<&str> = typed.split(':').collect();
    let [call, output, element, kind, rest @ ..] = parts.as_slice() else { return Err(wrong()) };
    let bit = |text: &str| text.parse().ok().filter(|bit| *bit < 32).ok_or_else(wrong);
    let wrong_how = match kind.split_once('=') {
        Some(("flip", typed)) => Wrong::Flip { bit: bit(typed)? },
        Some(("stuck", typed)) => Wrong::StuckAtOne { bit: bit(typed)?, every: LANES },
        Some(("acc", typed)) => Wrong::Accumulator { bit: bit(typed)? },
        Some(("weight", typed)) => Wrong::Weight { bit: bit(typed)? },
        None if *kind == "row" => Wrong::OtherRow,
        None if *kind == "tile" => Wrong::OtherTile,
        None if *kind == "order" => Wrong::Order,
        _ => return Err(wrong()),
    };
    let lasts = match rest {
        [] => Lasts::Always,
        ["once"] => Lasts::Once,
        _ => return Err(wrong()),
    };
    Ok(Fault {
        call: call.parse().map_err(|_| wrong())?,
        output: output.parse().map_err(|_| wrong())?,
        element: element.parse().map_err(|_| wrong())?,
        wrong: wrong_how,
        lasts,
    })
}

/// Lanes of an AVX-512 register of f32.
const LANES: usize = 16;

#[derive(Default)]
struct State {
    calls: u64,
    steps: u64,
    struck: Option<&'static str>,
}

/// The hook that plants one fault.
pub struct Faults {
    pub fault: Fault,
    state: Mutex<State>,
}

impl Faults {
    pub fn new(fault: Fault) -> Self {
        Self { fault, state: Mutex::default() }
    }
    /// The step in which the fault may strike begins (again).
    pub fn begin_step(&self) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.calls = 0;
        state.steps += 1;
    }
    /// The operation whose result was changed, if any value really changed.
    pub fn struck(&self) -> Option<&'static str> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).struck
    }
}

impl Hook for Faults {
    fn after(&self, device: &dyn Device, call: &Call<'_>, mut result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let here = state.calls == self.fault.call && (self.fault.lasts == Lasts::Always || state.steps <= 1);
        state.calls += 1;
        if !here || result.is_empty() {
            return Ok(result);
        }
        let index = self.fault.output % result.len();
        let x = &result[index];
        let mut values = device.download(x)?;
        if values.is_empty() {
            return Ok(result);
        }
        let before = values.clone();
        match spoilt_product(device, call, &self.fault, state.steps, x.dtype)? {
            Some(Spoilt::Whole(all)) => values = device.download(&all)?,
            Some(Spoilt::Element(value)) => {
                let element = self.fault.element % values.len();
                values[element] = value;
            }
            None => spoil(&mut values, x, &self.fault),
        }
        if values.iter().zip(&before).any(|(a, b)| a.to_bits() != b.to_bits()) {
            state.struck = Some(call.operation);
            result[index] = device.upload(&values, &x.shape.clone(), x.dtype)?;
        }
        Ok(result)
    }
}

/// What a fault inside a product makes of its result.
enum Spoilt {
    Whole(Tensor),
    Element(f32),
}

/// `None` where the fault is not of that kind, or the operation no product.
fn spoilt_product(
    device: &dyn Device,
    call: &Call<'_>,
    fault: &Fault,
    steps: u64,
    out: DType,
) -> Result<Option<Spoilt>> {
    let Some(product) = call.product else { return Ok(None) };
    match fault.wrong {
        Wrong::Accumulator { bit } => accumulated(device, &product, fault.element, bit).map(|x| x.map(Spoilt::Element)),
        Wrong::Weight { bit } => {
            let (Product::Forward { w, .. } | Product::InputGrad { w, .. }) = product else { return Ok(None) };
            let mut values = device.download(w)?;
            let element = fault.element % values.len().max(1);
            if let Some(value) = values.get_mut(element) {
                *value = with_bits(*value, w.dtype, |b| b ^ (1 << bit));
            }
            let w = device.upload(&values, &w.shape, w.dtype)?;
            Ok(Some(Spoilt::Whole(match product {
                Product::InputGrad { dy, compute, .. } => device.linear_input_grad(dy, &w, compute, out)?,
                Product::Forward { x, bias, compute, .. } => device.linear(x, &w, bias, compute, out)?,
                _ => return Ok(None),
            })))
        }
        Wrong::Order => {
            let y = device.zeros(&[0], out)?;
            let reordered = Reorder { seed: steps }.after(device, call, vec![y])?.pop();
            Ok(reordered.filter(|y| y.elements() > 0).map(Spoilt::Whole))
        }
        Wrong::Flip { .. } | Wrong::StuckAtOne { .. } | Wrong::OtherRow | Wrong::OtherTile => Ok(None),
    }
}

/// An element of a product as one chain of fused multiply-adds, with a bit of the sum inverted half-way.
fn accumulated(device: &dyn Device, product: &Product<'_>, element: usize, bit: u32) -> Result<Option<f32>> {
    let read = |x: &Tensor, compute: Compute| device.download(&operand(device, x, compute)?);
    let terms: Vec<(f32, f32)> = match *product {
        Product::Forward { x, w, compute, .. } => {
            let (k, n) = (x.columns(), w.rows());
            let (at, xs, ws) = (element % (x.rows() * n).max(1), read(x, compute)?, read(w, compute)?);
            (0..k).map(|i| (xs[at / n * k + i], ws[at % n * k + i])).collect()
        }
        Product::InputGrad { dy, w, compute } => {
            let (k, n) = (dy.columns(), w.columns());
            let (at, dys, ws) = (element % (dy.rows() * n).max(1), read(dy, compute)?, read(w, compute)?);
            (0..k).map(|i| (dys[at / n * k + i], ws[i * n + at % n])).collect()
        }
        Product::WeightGrad { dy, x, units, compute } => {
            let (m, n) = (dy.columns(), x.columns());
            let at = element % ((units.len() - 1) * m * n).max(1);
            let (unit, row, column) = (at / (m * n), at / n % m, at % n);
            let (dys, xs) = (read(dy, compute)?, read(x, compute)?);
            (units[unit]..units[unit + 1]).map(|i| (dys[i * m + row], xs[i * n + column])).collect()
        }
        Product::Adapted { .. } | Product::Onto { .. } => return Ok(None),
    };
    let add = |sum: f32, terms: &[(f32, f32)]| terms.iter().fold(sum, |sum, (a, b)| a.mul_add(*b, sum));
    let (first, second) = terms.split_at(terms.len() / 2);
    let bias = match *product {
        Product::Forward { bias: Some(bias), w, .. } => device.download(bias)?[element % w.rows().max(1)],
        _ => 0.0,
    };
    Ok(Some(add(f32::from_bits(add(0.0, first).to_bits() ^ (1 << bit)), second) + bias))
}

fn spoil(values: &mut [f32], x: &Tensor, fault: &Fault) {
    let element = fault.element % values.len();
    match fault.wrong {
        Wrong::Flip { bit } => values[element] = with_bits(values[element], x.dtype, |b| b ^ (1 << bit)),
        Wrong::StuckAtOne { bit, every } => {
            let from = element % every.max(1);
            let lane = values.iter_mut().skip(from).step_by(every.max(1));
            lane.for_each(|v| *v = with_bits(*v, x.dtype, |b| b | (1 << bit)));
        }
        Wrong::OtherRow => values[element] = values[(element + x.columns()) % values.len()],
        Wrong::OtherTile => {
            let before = values.to_vec();
            let end = (element + LANES).min((element / x.columns().max(1) + 1) * x.columns()).min(before.len());
            (element..end).for_each(|i| values[i] = before[(i + x.columns()) % before.len()]);
        }
        Wrong::Accumulator { .. } | Wrong::Weight { .. } | Wrong::Order => {}
    }
}

/// `x` with the bits of its stored form changed. Bits count from the lowest of that form; too large ones wrap.
fn with_bits(x: f32, dtype: DType, change: impl Fn(u32) -> u32) -> f32 {
    match dtype {
        DType::F32 => f32::from_bits(change(x.to_bits())),
        DType::BF16 => f32::from_bits((change(x.to_bits() >> 16) & 0xffff) << 16),
        DType::F16 => half::f16::from_bits((change(half::f16::from_f32(x).to_bits().into()) & 0xffff) as u16).to_f32(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::device::cpu::CpuDevice;
    use crate::device::hooked::Hooked;

    /// The elements of x·wᵀ (4 × 40, rank 24) that each kind changes.
    fn changed(typed: &str) -> Vec<usize> {
        let faults = parse_fault(typed).map(|fault| Arc::new(Faults::new(fault)));
        let faults = faults.unwrap_or_else(|e| panic!("{typed}: {e}"));
        let result = |faulty: bool| -> Result<Vec<f32>> {
            let inner: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1))?);
            let values = |n: u64, s| (0..n).map(|i| crate::device::noise::symmetric(1, s, i)).collect::<Vec<_>>();
            let x = inner.upload(&values(4 * 24, 0), &[4, 24], DType::F32)?;
            let w = inner.upload(&values(40 * 24, 1), &[40, 24], DType::F32)?;
            let hook = Arc::clone(&faults) as Arc<dyn Hook>;
            let device = if faulty { Arc::new(Hooked { inner, hook }) as Arc<dyn Device> } else { inner };
            device.download(&device.linear(&x, &w, None, Compute::F32, DType::F32)?)
        };
        let (good, bad) = (result(false).unwrap_or_default(), result(true).unwrap_or_default());
        (0..160).filter(|&i| good[i].to_bits() != bad[i].to_bits()).collect()
    }

    #[test]
    fn each_kind_changes_what_it_says() {
        assert_eq!(changed("0:0:45:flip=20"), vec![45]);
        assert_eq!(changed("0:0:45:row"), vec![45]);
        assert_eq!(changed("0:0:45:tile"), (45..61).collect::<Vec<_>>());
        assert_eq!(changed("0:0:75:tile"), (75..80).collect::<Vec<_>>(), "a tile ends with its row");
        assert_eq!(changed("0:0:45:acc=25"), vec![45]);
        // Element 3 of row 7 of the weight reaches column 7 of every row.
        assert_eq!(changed(&format!("0:0:{}:weight=28", 7 * 24 + 3)), vec![7, 47, 87, 127]);
        assert!(changed("0:0:5:stuck=30").iter().all(|i| i % 16 == 5));
        assert!(!changed("0:0:0:order").is_empty());
        assert_eq!(changed("1:0:45:flip=20"), Vec::<usize>::new(), "another call");
    }
}
