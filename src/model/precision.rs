//! In which dtype each op site runs and where its one rounding happens (contract 4.2, 4.3).
//!
//! A tensor's dtype follows PyTorch's promotion from these few choices; nothing else in the model decides one.

use crate::device::{Compute, DType};
use crate::{Error, Result};

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
    /// Everything in f32.
    pub const F32: Self = Self {
        base: DType::F32,
        autocast: None,
        adapter: DType::F32,
        tf32: false,
        loss_scaling: false,
        upcast_norm: false,
    };

    /// Embedding output, and dtype of the rope tables: the base dtype, autocast or not (contract 4.3).
    pub fn residual(&self) -> DType {
        self.base
    }
    /// Output dtype of frozen linears, attention and lm_head.
    pub fn linear(&self) -> DType {
        self.autocast.unwrap_or(self.base)
    }
    /// Arithmetic of frozen linears.
    pub fn compute(&self) -> Compute {
        self.product(self.linear())
    }
    /// Dtype of a LoRA branch: autocast's, else that of the matrices (PEFT casts the input to it).
    pub fn branch(&self) -> DType {
        self.autocast.unwrap_or(self.adapter)
    }
    /// Arithmetic of a LoRA branch.
    pub fn branch_compute(&self) -> Compute {
        self.product(self.branch())
    }
    /// Dtype in which norm weights are held.
    pub fn norm_weight(&self) -> DType {
        if self.upcast_norm { DType::F32 } else { self.base }
    }

    fn product(&self, dtype: DType) -> Compute {
        match dtype {
            DType::F32 if self.tf32 => Compute::Tf32,
            dtype => Compute::of(dtype),
        }
    }

    /// This plan's weights in another arithmetic, by its word: fp32, tf32, bf16, fp16 (with loss scaling) or
    /// pure_bf16. Any other word leaves the plan as it is.
    pub fn with_arithmetic(self, word: &str) -> Self {
        let wide = Self { upcast_norm: self.upcast_norm, ..Self::F32 };
        let over_own = Self { base: self.base, ..wide };
        match word {
            // Half weights hold the same values in f32: only the arithmetic widens.
            "fp32" => wide,
            "tf32" => Self { tf32: true, ..wide },
            "bf16" => Self { autocast: Some(DType::BF16), ..over_own },
            "fp16" => Self { autocast: Some(DType::F16), loss_scaling: true, ..over_own },
            "pure_bf16" => Self { base: DType::BF16, adapter: DType::BF16, ..Self::F32 },
            _ => self,
        }
    }

    /// Refuses combinations with which the trainer itself stops.
    ///
    /// # Errors
    /// upcast_layernorm over a half base without autocast (contract 4.3: f32 input into a half linear).
    pub fn check(&self) -> Result<()> {
        if self.upcast_norm && self.autocast.is_none() && self.base.is_half() {
            return Err(Error::refused("an f32 norm output cannot enter a half linear: the trainer stops here")
                .at("upcast_layernorm")
                .next("set bf16: true, or upcast_layernorm: false"));
        }
        Ok(())
    }
}

/// PyTorch's type promotion of two floating tensors: bf16 with fp16 gives f32.
pub fn promote(a: DType, b: DType) -> DType {
    if a == b { a } else { DType::F32 }
}
