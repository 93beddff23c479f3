//! Where a tensor arises in a pass.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::model::Projection;

/// What of a module is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    Output,
    /// Gradient with respect to the output.
    OutputGrad,
    /// A x of a LoRA branch.
    LoraHidden,
    /// One micro-batch's gradient of A, as it is added to `.grad`.
    LoraAGrad,
    /// One micro-batch's gradient of B.
    LoraBGrad,
}

/// A module of the decoder that produces a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Part {
    Embedding,
    /// Its output is the input of q, k and v.
    InputNorm,
    Projection(Projection),
    /// q after per-head norm and rotary embedding, as attention reads it.
    RotatedQ,
    RotatedK,
    /// Its output is the input of o.
    Attention,
    /// Residual stream after attention.
    AttentionResidual,
    /// Its output is the input of gate and up.
    PostAttentionNorm,
    /// silu(gate) · up: the input of down.
    Gated,
    /// Residual stream after the MLP: the block's output.
    Residual,
    FinalNorm,
    Logits,
}

/// One place of a pass. `layer` is `None` outside the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Site {
    pub layer: Option<usize>,
    pub part: Part,
    pub role: Role,
}

impl Site {
    pub fn outside(part: Part, role: Role) -> Self {
        Self { layer: None, part, role }
    }
    pub fn block(layer: usize, part: Part, role: Role) -> Self {
        Self { layer: Some(layer), part, role }
    }
    /// True for tensors of the backward pass.
    pub fn is_backward(&self) -> bool {
        matches!(self.role, Role::OutputGrad | Role::LoraAGrad | Role::LoraBGrad)
    }
}

impl fmt::Display for Site {
    /// `layers.3.mlp.down_proj output`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let (Some(layer), Part::Projection(projection)) = (self.layer, self.part) {
            return write!(f, "{} {}", projection.path(layer), self.role.name());
        }
        if let Some(layer) = self.layer {
            write!(f, "layers.{layer}.")?;
        }
        write!(f, "{} {}", self.part.name(), self.role.name())
    }
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Output => "output",
            Self::OutputGrad => "output gradient",
            Self::LoraHidden => "lora_A output",
            Self::LoraAGrad => "lora_A gradient",
            Self::LoraBGrad => "lora_B gradient",
        }
    }
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embed_tokens",
            Self::InputNorm => "input_layernorm",
            Self::Projection(projection) => projection.name(),
            Self::RotatedQ => "self_attn.q",
            Self::RotatedK => "self_attn.k",
            Self::Attention => "self_attn.attention",
            Self::AttentionResidual => "self_attn.residual",
            Self::PostAttentionNorm => "post_attention_layernorm",
            Self::Gated => "mlp.act",
            Self::Residual => "residual",
            Self::FinalNorm => "norm",
            Self::Logits => "lm_head",
        }
    }
}
