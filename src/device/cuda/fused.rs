//! Operations that stand for several: the same bits, fewer passes over memory. The products stay cuBLAS's own, so that they
//! add as the separate ones do; what follows them is one kernel of elementwise.cu, in the product's memory where it fits.

use super::{CudaDevice, expect};
use crate::Result;
use crate::device::{Compute, DType, LowRank, Tensor};

impl CudaDevice {
    /// y + scaling · branch, in y's memory. Against the separate operations the scaled branch is neither written nor
    /// read back: 3 passes over y's elements instead of 5.
    #[allow(clippy::too_many_arguments)] // the trait's
    pub(super) fn adapted(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        compute: Compute,
        out: DType,
        branch: &LowRank<'_>,
        scaling: f32,
    ) -> Result<Tensor> {
        let mut y = self.product(x, w, bias, compute, out)?;
        let v = self.product(branch.x, branch.w, None, branch.compute, branch.dtype)?;
        expect(y.shape == v.shape, "linear_adapted", || format!("shapes {:?} and {:?}", y.shape, v.shape))?;
        let (at, term, n) = (self.exclusive(&mut y)?, self.operand(&v)?, y.elements());
        let meter = self.meter(&y, 1)?;
        let name = if meter.is_some() { "add_scaled_measured" } else { "add_scaled" };
        let launch = self.kernels.launch(name).tagged(at, out).tagged(term.address, term.dtype).value(scaling);
        // SAFETY: elementwise.cu, in place: each element is read before it is written, by one thread. Both hold n.
        unsafe { self.make(launch, meter, &[&y], n)? };
        Ok(y)
    }

    /// so_far, the branch's product and the linear's, added one after another in `dtype`: 4 passes instead of 6, and no
    /// casts of their own.
    #[allow(clippy::too_many_arguments)] // the trait's
    pub(super) fn input_grad_onto(
        &self,
        so_far: Option<Tensor>,
        branch: Option<&LowRank<'_>>,
        dy: &Tensor,
        w: &Tensor,
        compute: Compute,
        out: DType,
        dtype: DType,
    ) -> Result<Tensor> {
        // The branch first: autograd's order, and a streamed weight has longer to arrive.
        let term = branch.map(|b| self.product_input_grad(b.x, b.w, b.compute, b.dtype)).transpose()?;
        let mut own = self.product_input_grad(dy, w, compute, out)?;
        if so_far.is_none() && term.is_none() {
            return self.cast_to(&own, dtype);
        }
        let fits = |x: &Option<Tensor>| x.as_ref().is_none_or(|x| x.shape == own.shape);
        let same_dtype = so_far.as_ref().is_none_or(|x| x.dtype == dtype);
        expect(fits(&so_far) && fits(&term) && same_dtype, "linear_input_grad_onto", || {
            let seen = |x: &Option<Tensor>| x.as_ref().map(|x| (x.shape.clone(), x.dtype));
            format!("own {:?}, so far {:?}, branch {:?}, to {dtype:?}", own.shape, seen(&so_far), seen(&term))
        })?;
        let n = own.elements();
        let (result, from) = if own.dtype == dtype {
            let at = self.exclusive(&mut own)?;
            (own, at)
        } else {
            let from = self.operand(&own)?.address;
            (self.empty(&own.shape, dtype)?, from)
        };
        let held = [&so_far, &term].map(|x| x.as_ref().map(|x| self.operand(x)).transpose());
        let [before, term] = held;
        let (before, term) = (before?, term?);
        let to = self.operand(&result)?;
        let meter = self.meter(&result, 1)?;
        let name = if meter.is_some() { "add_in_turn_measured" } else { "add_in_turn" };
        let launch = self.kernels.launch(name).tagged(to.address, dtype);
        let launch = launch.value(before.as_ref().map_or(0, |x| x.address));
        let launch = match &term {
            Some(term) => launch.tagged(term.address, term.dtype),
            None => launch.tagged(0, DType::F32),
        };
        // SAFETY: elementwise.cu; all that are given hold n elements, `so_far` in `dtype` (checked).
        unsafe { self.make(launch.tagged(from, out), meter, &[&result], n)? };
        Ok(result)
    }

    /// acc + each unit in turn: acc is read and written once, whatever the number of units.
    pub(super) fn add_units_to(&self, acc: &mut Tensor, units: &Tensor) -> Result<()> {
        let (n, count) = (acc.elements(), units.shape.first().copied().unwrap_or(0));
        expect(units.elements() == count * n, "accumulate_units", || {
            format!("shapes {:?} and {:?}", acc.shape, units.shape)
        })?;
        if count == 0 {
            return Ok(());
        }
        let (at, from) = (self.exclusive(acc)?, self.operand(units)?);
        let launch = self.kernels.launch("accumulate_units").tagged(at, acc.dtype).tagged(from.address, from.dtype);
        // SAFETY: elementwise.cu; acc holds n elements, units count · n.
        unsafe { launch.value(count as u64).value(n as u64).run_over(n) }
    }
}
