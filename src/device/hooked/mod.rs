//! A device whose results somebody looks at, or changes, between one operation and the next.
//!
//! Fault injection, checksums, recomputation on another device and reference arithmetics are hooks; this file says what
//! a hook is told, `forward` wires every operation of a device to it.

use std::sync::{Arc, PoisonError, RwLock};

mod forward;

use super::checks::Expect;
use super::{Compute, DType, Device, LowRank, Offsets, Tensor};
use crate::Result;

/// Which operations a hook looks at: what nobody looks at runs as if there were no hook, fused ones included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sees {
    Nothing,
    /// Matrix products, fused ones whole.
    Products,
    /// Every operation; fused ones as the operations they stand for.
    Everything,
}

/// Sees each operation after it ran.
pub trait Hook: Send + Sync {
    fn sees(&self) -> Sees {
        Sees::Everything
    }

    /// What it returns is the result from here on.
    ///
    /// # Errors
    /// Stops the pass.
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>>;

    /// Asked before a product: whether [`Device::product_sums`] will be asked for, and with what.
    ///
    /// # Errors
    /// Those of the device.
    fn before(&self, _product: &Product<'_>) -> Result<Option<Expect>> {
        Ok(None)
    }

    /// Whether [`Call::again`] is wanted for operations in place too; their operands are then copied first.
    fn repeats_in_place(&self) -> bool {
        false
    }
}

/// An operation to be run again, with its results.
pub type Again<'c> = &'c dyn Fn(&Elsewhere<'_>) -> Result<Vec<Tensor>>;

/// An operation in place, on the tensors it changes.
type InPlace<'c> = &'c dyn Fn(&dyn Device, &mut [&mut Tensor], &Elsewhere<'_>) -> Result<()>;

/// One operation with its operands.
pub struct Call<'c> {
    /// The method of [`Device`].
    pub operation: &'static str,
    pub operands: &'c [&'c Tensor],
    pub product: Option<Product<'c>>,
    /// The operation once more, on any device. None for one in place, unless [`Hook::repeats_in_place`].
    pub again: Option<Again<'c>>,
}

/// The operands of a matrix product.
#[derive(Clone, Copy)]
pub enum Product<'c> {
    /// x [n, in] · w [out, in]ᵀ (+ bias).
    Forward { x: &'c Tensor, w: &'c Tensor, bias: Option<&'c Tensor>, compute: Compute },
    /// dy [n, out] · w [out, in].
    InputGrad { dy: &'c Tensor, w: &'c Tensor, compute: Compute },
    /// Per unit dy[u]ᵀ · x[u].
    WeightGrad { dy: &'c Tensor, x: &'c Tensor, units: Offsets<'c>, compute: Compute },
    /// [`Device::linear_adapted`]: the product of `Forward`, and scaling · (branch.x · branch.wᵀ).
    Adapted {
        x: &'c Tensor,
        w: &'c Tensor,
        bias: Option<&'c Tensor>,
        compute: Compute,
        branch: LowRank<'c>,
        scaling: f32,
    },
    /// [`Device::linear_input_grad_onto`]: what there was, branch.x · branch.w, and dy · w rounded to `out`.
    Onto {
        so_far: Option<&'c Tensor>,
        branch: Option<LowRank<'c>>,
        dy: &'c Tensor,
        w: &'c Tensor,
        compute: Compute,
        out: DType,
    },
}

impl Product<'_> {
    /// What its operands are rounded to; of a fused one, those of the main product.
    pub fn compute(&self) -> Compute {
        match *self {
            Product::Forward { compute, .. }
            | Product::InputGrad { compute, .. }
            | Product::WeightGrad { compute, .. }
            | Product::Adapted { compute, .. }
            | Product::Onto { compute, .. } => compute,
        }
    }
}

/// A device that may not be the one the operands lie on.
pub struct Elsewhere<'e> {
    pub device: &'e dyn Device,
    /// Where the operands lie, if their elements have to be carried over.
    pub from: Option<&'e dyn Device>,
}

impl Elsewhere<'_> {
    fn bring(&self, x: &Tensor) -> Result<Tensor> {
        match self.from {
            None => Ok(x.clone()),
            Some(from) => self.device.upload(&from.download(x)?, &x.shape, x.dtype),
        }
    }
}

/// A hook that can be exchanged while the device is in use; without one, nothing is seen.
#[derive(Default)]
pub struct Switch(RwLock<Option<Arc<dyn Hook>>>);

impl Switch {
    pub fn set(&self, hook: Option<Arc<dyn Hook>>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = hook;
    }
    fn current(&self) -> Option<Arc<dyn Hook>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Hook for Switch {
    fn sees(&self) -> Sees {
        self.current().map_or(Sees::Nothing, |hook| hook.sees())
    }
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        match self.current() {
            None => Ok(result),
            Some(hook) => hook.after(device, call, result),
        }
    }
    fn before(&self, product: &Product<'_>) -> Result<Option<Expect>> {
        self.current().map_or(Ok(None), |hook| hook.before(product))
    }
    fn repeats_in_place(&self) -> bool {
        self.current().is_some_and(|hook| hook.repeats_in_place())
    }
}

/// `inner`, seen by `hook`.
pub struct Hooked {
    pub inner: Arc<dyn Device>,
    pub hook: Arc<dyn Hook>,
}

impl Hooked {
    fn sees_everything(&self) -> bool {
        self.hook.sees() == Sees::Everything
    }

    /// A product by the inner device, with its checksums if the hook wants them.
    fn product(&self, product: &Product<'_>, run: impl FnOnce(&dyn Device) -> Result<Tensor>) -> Result<Tensor> {
        let Some(expect) = self.hook.before(product)? else { return run(&*self.inner) };
        self.inner.expect_sums(Some(expect));
        let result = run(&*self.inner);
        self.inner.expect_sums(None);
        result
    }

    fn seen<const N: usize>(
        &self,
        operation: &'static str,
        operands: &[&Tensor],
        product: Option<Product<'_>>,
        again: Again<'_>,
        result: [Tensor; N],
    ) -> Result<[Tensor; N]> {
        match self.hook.sees() {
            Sees::Nothing => return Ok(result),
            Sees::Products if product.is_none() => return Ok(result),
            Sees::Products | Sees::Everything => {}
        }
        let call = Call { operation, operands, product, again: Some(again) };
        whole(self.hook.after(&*self.inner, &call, result.into())?, operation)
    }

    /// An operation that changes tensors in place, `operate`d on by any device.
    fn in_place<const N: usize>(
        &self,
        operation: &'static str,
        mut tensors: [&mut Tensor; N],
        operate: InPlace<'_>,
    ) -> Result<()> {
        let here = Elsewhere { device: &*self.inner, from: None };
        if !self.sees_everything() {
            return operate(&*self.inner, &mut tensors, &here);
        }
        let copy = |x: &Tensor| self.inner.upload(&self.inner.download(x)?, &x.shape, x.dtype);
        let before: Option<Vec<Tensor>> = match self.hook.repeats_in_place() {
            true => Some(tensors.iter().map(|x| copy(x)).collect::<Result<_>>()?),
            false => None,
        };
        operate(&*self.inner, &mut tensors, &here)?;
        let again = |there: &Elsewhere<'_>| {
            let mut brought = Vec::new();
            for x in before.iter().flatten() {
                brought.push(there.device.upload(&self.inner.download(x)?, &x.shape, x.dtype)?);
            }
            operate(there.device, &mut brought.iter_mut().collect::<Vec<_>>(), there)?;
            Ok(brought)
        };
        let again = before.is_some().then_some(&again as Again<'_>);
        let call = Call { operation, operands: &[], product: None, again };
        // The caller's tensors are given up, so that the hook's are the only ones and stay writable in place.
        let placeholder = self.inner.zeros(&[0], DType::F32)?;
        let result = tensors.iter_mut().map(|x| std::mem::replace(*x, placeholder.clone())).collect();
        let result: [Tensor; N] = whole(self.hook.after(&*self.inner, &call, result)?, operation)?;
        tensors.into_iter().zip(result).for_each(|(x, after)| *x = after);
        Ok(())
    }
}

fn whole<const N: usize>(result: Vec<Tensor>, operation: &str) -> Result<[Tensor; N]> {
    let count = result.len();
    result
        .try_into()
        .map_err(|_| crate::Error::internal(format!("a hook made {count} results of the {N} of {operation}")))
}
