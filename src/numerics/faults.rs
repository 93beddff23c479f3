//! Faults planted into a device: what triage is tested against, and what a user can try a method on.
//!
//! A fault names an operation by its place in the step (the n-th call since [`Faults::begin_step`]), one of its results and
//! an element. It strikes once (a transient), or in every call of that shape (a broken unit).

use std::sync::Mutex;

use crate::device::hooked::{Call, Hook};
use crate::device::{DType, Device, Tensor};
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

/// `CALL:OUTPUT:ELEMENT:flip=BIT|stuck=BIT|row[:once]`.
///
/// # Errors
/// Anything else.
pub fn parse_fault(typed: &str) -> Result<Fault> {
    let wrong = || {
        Error::usage(format!("there is no fault {typed:?}"))
            .next("CALL:OUTPUT:ELEMENT:flip=BIT, stuck=BIT or row, and :once for a transient; 12:0:5:flip=14")
    };
    let parts: Vec<&str> = typed.split(':').collect();
    let [call, output, element, kind, rest @ ..] = parts.as_slice() else { return Err(wrong()) };
    let bit = |text: &str| text.parse().ok().filter(|bit| *bit < 32).ok_or_else(wrong);
    let wrong_how = match kind.split_once('=') {
        Some(("flip", typed)) => Wrong::Flip { bit: bit(typed)? },
        Some(("stuck", typed)) => Wrong::StuckAtOne { bit: bit(typed)?, every: LANES },
        None if *kind == "row" => Wrong::OtherRow,
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
        spoil(&mut values, x, &self.fault);
        if values.iter().zip(&before).any(|(a, b)| a.to_bits() != b.to_bits()) {
            state.struck = Some(call.operation);
            result[index] = device.upload(&values, &x.shape.clone(), x.dtype)?;
        }
        Ok(result)
    }
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
