//! What can be asked for dot products: a device's matrix product, or the software model of an arithmetic.

use super::Arithmetic;
use crate::device::{Compute, DType, Device};
use crate::{Error, Result};

/// A source of dot products whose arithmetic is unknown.
pub trait Multiplier {
    /// What its operands are rounded to.
    fn operand(&self) -> Compute;
    /// a [rows, k] · b [k] → [rows], accumulated in f32 as far as anybody says.
    ///
    /// # Errors
    /// Those of the device.
    fn dots(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>>;
    /// The same with results stored in the operands' dtype: a library may then keep its partial sums in it too.
    ///
    /// # Errors
    /// Those of the device.
    fn rounded_dots(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
        self.dots(a, b)
    }
}

impl Multiplier for Arithmetic {
    fn operand(&self) -> Compute {
        self.operand
    }
    fn dots(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
        Ok(a.chunks_exact(b.len()).map(|row| self.dot(row, b)).collect())
    }
}

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Through {
    /// [`Device::linear`]: the library that training uses.
    Library,
    /// [`Device::matrix_unit`].
    MatrixUnit,
}

/// Products of a device, seen through one element of their result.
pub struct DeviceProduct<'d> {
    pub device: &'d dyn Device,
    pub compute: Compute,
    pub through: Through,
    /// Every row is asked this often, and every column of the result holds the same: 1 is a product with a vector,
    /// which libraries compute by other kernels.
    pub tile: usize,
}

impl Multiplier for DeviceProduct<'_> {
    fn operand(&self) -> Compute {
        self.compute
    }
    fn dots(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
        self.stored_dots(a, b, DType::F32)
    }
    fn rounded_dots(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
        self.stored_dots(a, b, self.stored())
    }
}

impl DeviceProduct<'_> {
    /// Whether the device can be asked this way.
    ///
    /// # Errors
    /// Those of the device.
    pub fn exists(&self) -> Result<bool> {
        if self.through == Through::Library {
            return Ok(true);
        }
        let x = self.device.zeros(&[16, 16], self.stored())?;
        Ok(self.device.matrix_unit(&x, &x, self.compute)?.is_some())
    }

    /// The operands' dtype.
    fn stored(&self) -> DType {
        match self.compute {
            Compute::F32 | Compute::Tf32 => DType::F32,
            Compute::Bf16 => DType::BF16,
            Compute::F16 => DType::F16,
        }
    }

    fn stored_dots(&self, a: &[f32], b: &[f32], out: DType) -> Result<Vec<f32>> {
        let stored = self.stored();
        let (k, tile) = (b.len(), self.tile);
        let rows: Vec<f32> = a.chunks_exact(k).flat_map(|row| row.repeat(tile)).collect();
        let x = self.device.upload(&rows, &[rows.len() / k, k], stored)?;
        let w = self.device.upload(&b.repeat(tile), &[tile, k], stored)?;
        let y = match self.through {
            Through::Library => self.device.linear(&x, &w, None, self.compute, out)?,
            Through::MatrixUnit => {
                let y = self.device.matrix_unit(&x, &w, self.compute)?;
                y.ok_or_else(|| Error::internal("this device has no matrix unit of its own"))?
            }
        };
        let y = self.device.download(&y)?;
        // A middle element of each tile, not the first lane of anything.
        Ok(y.chunks_exact(tile * tile).map(|block| block[block.len() / 2]).collect())
    }
}
