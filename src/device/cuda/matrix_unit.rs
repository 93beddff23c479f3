//! Products by the matrix unit itself, without a library: for the fingerprint of the hardware (kernels/mma.cu).

use super::kernels::tag;
use super::{CudaDevice, expect, narrow};
use crate::Result;
use crate::device::{Compute, DType, Tensor};

impl CudaDevice {
    /// x [n, k] · w [m, k]ᵀ → [n, m] f32; `None` on a card or for an arithmetic without such a unit.
    pub(super) fn mma(&self, x: &Tensor, w: &Tensor, compute: Compute) -> Result<Option<Tensor>> {
        let (stored, code) = match compute {
            Compute::F32 => return Ok(None),
            Compute::Tf32 => (DType::F32, 3),
            Compute::Bf16 => (DType::BF16, tag(DType::BF16)),
            Compute::F16 => (DType::F16, tag(DType::F16)),
        };
        if !self.kernels.has("mma_linear") {
            return Ok(None);
        }
        let (n, k, m) = (x.rows(), x.columns(), w.rows());
        let whole = n % 16 == 0 && m % 8 == 0 && k % 16 == 0 && w.columns() == k;
        expect(whole && x.dtype == stored && w.dtype == stored, "matrix_unit", || {
            format!("x {:?} {:?}, w {:?} {:?}: not whole tiles of {compute:?}", x.shape, x.dtype, w.shape, w.dtype)
        })?;
        let (a, b, y) = (self.operand(x)?, self.operand(w)?, self.empty(&[n, m], DType::F32)?);
        let c = self.operand(&y)?;
        let launch = self.kernels.launch("mma_linear").value(a.address).value(b.address).value(c.address);
        let launch = launch.value(code).value(m as u64).value(k as u64);
        let grid = (narrow(n / 16, "tiles")?, narrow(m / 8, "tiles")?);
        // SAFETY: x, w and y hold n·k, m·k and n·m elements of the dtypes checked above, whole tiles of 16 × 8.
        unsafe { launch.run(grid, 32)? };
        Ok(Some(y))
    }
}
