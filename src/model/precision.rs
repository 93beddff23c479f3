//! In which dtype each op site runs and where its one rounding happens (contract 4.2, 4.3).

use crate::device::{Compute, DType};

/// The precision of a run. Built from the configuration, the versions and the checkpoint's evidence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrecisionPlan {
    /// Dtype in which the frozen weights are held (and in which they are rounded before any use).
    pub base: DType,
    /// Autocast dtype of linears, attention and lm_head; `None`: no autocast.
    pub autocast: Option<DType>,
    /// Dtype of the LoRA matrices and of their optimizer state.
    pub adapter: DType,
    /// Operands of f32 products rounded to 10 mantissa bits (torch.backends.cuda.matmul.allow_tf32).
    pub tf32: bool,
    /// Dynamic loss scaling (fp16: true on a device that honours it).
    pub loss_scaling: bool,
    /// Frozen norm weights held in f32 (upcast_layernorm).
    pub upcast_norm: bool,
}

impl PrecisionPlan {
    /// Residual stream, embedding output and norm output: the base dtype, autocast or not (contract 4.3).
    pub fn residual(&self) -> DType {
        self.base
    }
    /// Output dtype of frozen linears.
    pub fn linear(&self) -> DType {
        self.autocast.unwrap_or(self.base)
    }
    /// Arithmetic of frozen linears.
    pub fn compute(&self) -> Compute {
        match self.linear() {
            DType::F32 if self.tf32 => Compute::Tf32,
            dtype => Compute::of(dtype),
        }
    }
}
