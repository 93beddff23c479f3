//! The seven linears of a decoder block, in registration order, and which of them carry LoRA matrices.

use super::ModelConfig;
use crate::{Error, Result};

/// One linear of a decoder block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// Registration order (contract 6.5), in which adapters are drawn and optimizer states are numbered.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Last component of the module's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// `layers.3.self_attn.q_proj`: the module's path below `model.`.
    pub fn path(self, layer: usize) -> String {
        let parent = if self < Self::Gate { "self_attn" } else { "mlp" };
        format!("layers.{layer}.{parent}.{}", self.name())
    }

    /// (in, out) of its weight [out, in].
    pub fn shape(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, ffn) = (config.hidden, config.intermediate);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        match self {
            Self::Q => (hidden, q),
            Self::K | Self::V => (hidden, kv),
            Self::O => (q, hidden),
            Self::Gate | Self::Up => (hidden, ffn),
            Self::Down => (ffn, hidden),
        }
    }

    pub fn has_bias(self, config: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => config.qkv_bias,
            Self::O => config.o_bias,
            Self::Gate | Self::Up | Self::Down => config.mlp_bias,
        }
    }
}

/// The linears that `lora_target` selects, by layer, in registration order. A target selects a module whose path
/// is it or ends with `.` and it (PEFT's check_target_module_exists); exactly `["all"]` selects every one.
///
/// # Errors
/// A target that selects nothing, or lm_head or embed_tokens, is named.
pub fn select(targets: &[String], config: &ModelConfig) -> Result<Vec<(usize, Projection)>> {
    let modules = (0..config.layers).flat_map(|layer| Projection::ALL.map(|projection| (layer, projection)));
    if targets.len() == 1 && targets[0] == "all" {
        return Ok(modules.collect());
    }
    let matches = |target: &str, path: &str| {
        let full = format!("model.{path}");
        full == target || full.ends_with(&format!(".{target}"))
    };
    let paths: Vec<_> = modules.map(|(layer, projection)| (layer, projection, projection.path(layer))).collect();
    for target in targets {
        if !paths.iter().any(|(_, _, path)| matches(target, path)) {
            return Err(Error::refused(format!("no decoder linear of this model is called {target}"))
                .at("lora_target")
                .next("q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj or all are covered"));
        }
    }
    let selected = paths.into_iter().filter(|(_, _, path)| targets.iter().any(|target| matches(target, path)));
    Ok(selected.map(|(layer, projection, _)| (layer, projection)).collect())
}
