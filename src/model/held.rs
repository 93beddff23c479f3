//! The frozen weights as a run holds them: [`BaseModel`]'s tensors, rounded to the plan's base dtype where the
//! file holds more, and with hypothetical bit flips applied.

use super::weights::{EMBEDDING, FINAL_NORM, HEAD, projection_name};
use super::{BaseModel, PrecisionPlan, Projection};
use crate::device::{DType, Device, Tensor};
use crate::{Error, Result};

/// One frozen linear.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    /// [out, in].
    pub w: Tensor,
    /// [out].
    pub bias: Option<Tensor>,
}

/// The frozen weights of one block.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub input_norm: Tensor,
    pub post_norm: Tensor,
    /// Per-head norms of q and k (qwen3).
    pub head_norms: Option<(Tensor, Tensor)>,
    /// In [`Projection::ALL`]'s order.
    pub linears: Vec<Linear>,
}

/// Every frozen weight. Cheap to clone: tensors are shared.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub embedding: Tensor,
    pub layers: Vec<Layer>,
    pub final_norm: Tensor,
    /// lm_head; the embedding when tied (contract 4.5).
    pub head: Tensor,
}

impl Held {
    /// Every tensor with its module's path.
    pub fn named(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let outside = [("embed_tokens", &self.embedding), ("norm", &self.final_norm), ("lm_head", &self.head)];
        let layers = self.layers.iter().enumerate().flat_map(|(layer, held)| {
            let norms = [("input_layernorm", &held.input_norm), ("post_attention_layernorm", &held.post_norm)];
            let heads = held.head_norms.iter().flat_map(|(q, k)| [("self_attn.q_norm", q), ("self_attn.k_norm", k)]);
            let norms = norms.into_iter().chain(heads).map(move |(name, w)| (format!("layers.{layer}.{name}"), w));
            norms.chain(Projection::ALL.iter().zip(&held.linears).map(move |(p, linear)| (p.path(layer), &linear.w)))
        });
        outside.into_iter().map(|(name, w)| (name.to_owned(), w)).chain(layers)
    }
}

/// One bit of a frozen weight inverted, for the duration of a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFlip {
    /// Name in the checkpoint (`model.layers.0.mlp.up_proj.weight`), or the module's path.
    pub tensor: String,
    /// Row-major.
    pub element: usize,
    /// 0: least significant bit of the base dtype.
    pub bit: u32,
}

impl Held {
    /// Collects the weights, rounding those whose stored dtype `plan.base` cannot hold exactly.
    pub fn new(device: &dyn Device, base: &BaseModel, plan: &PrecisionPlan) -> Result<Self> {
        Self::collect(base, |_, tensor| hold(device, tensor, plan.base))
    }

    /// These weights with bits flipped. `base` supplies names; flips of a tied embedding reach lm_head too.
    ///
    /// # Errors
    /// A flip whose tensor, element or bit does not exist is named.
    pub fn flipped(
        &self,
        device: &dyn Device,
        base: &BaseModel,
        plan: &PrecisionPlan,
        flips: &[WeightFlip],
    ) -> Result<Self> {
        for flip in flips {
            let known = base.tensors().any(|(name, _)| names(&flip.tensor, name));
            if !known {
                return Err(Error::input("no frozen tensor of this name").at(&flip.tensor));
            }
        }
        Self::collect(base, |name, tensor| {
            let mut held = hold(device, tensor, plan.base)?;
            for flip in flips.iter().filter(|flip| names(&flip.tensor, name)) {
                held = flip_bit(device, &held, plan.base, flip.element, flip.bit).map_err(|e| e.at(name))?;
            }
            Ok(held)
        })
    }

    fn collect(base: &BaseModel, hold: impl Fn(&str, &Tensor) -> Result<Tensor>) -> Result<Self> {
        let config = &base.config;
        let get = |name: &str| hold(name, base.tensor(name)?);
        let layers = (0..config.layers).map(|layer| {
            let norm = |name: &str| get(&format!("model.layers.{layer}.{name}.weight"));
            let linear = |projection: Projection| {
                let bias = projection.has_bias(config).then(|| get(&projection_name(layer, projection, "bias")));
                Ok(Linear { w: get(&projection_name(layer, projection, "weight"))?, bias: bias.transpose()? })
            };
            Ok(Layer {
                input_norm: norm("input_layernorm")?,
                post_norm: norm("post_attention_layernorm")?,
                head_norms: match config.qk_norm {
                    true => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
                    false => None,
                },
                linears: Projection::ALL.into_iter().map(linear).collect::<Result<_>>()?,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        let embedding = get(EMBEDDING)?;
        let head = if config.tied { embedding.clone() } else { get(HEAD)? };
        Ok(Self { embedding, layers, final_norm: get(FINAL_NORM)?, head })
    }
}

/// True if `wanted` is the tensor's name, or the path of the module whose weight it is.
fn names(wanted: &str, name: &str) -> bool {
    wanted == name
        || name.strip_suffix(".weight").is_some_and(|m| m == wanted || m.strip_prefix("model.") == Some(wanted))
}

/// A tensor whose values are those of dtype `base`. Widening is exact and left to the operations.
fn hold(device: &dyn Device, tensor: &Tensor, base: DType) -> Result<Tensor> {
    if tensor.dtype == base || base == DType::F32 {
        return Ok(tensor.clone());
    }
    device.upload(&device.download(tensor)?, &tensor.shape, base)
}

/// A copy of `x` with one bit of one element's `dtype` representation inverted.
pub(super) fn flip_bit(device: &dyn Device, x: &Tensor, dtype: DType, element: usize, bit: u32) -> Result<Tensor> {
    let mut values = device.download(x)?;
    let count = values.len();
    let out_of_range = || Error::input(format!("element {element}, bit {bit}: there are {count} of {dtype:?}"));
    let value = values.get_mut(element).ok_or_else(out_of_range)?;
    if bit as usize >= 8 * dtype.size() {
        return Err(out_of_range());
    }
    *value = match dtype {
        DType::F32 => f32::from_bits(value.to_bits() ^ (1 << bit)),
        DType::BF16 => half::bf16::from_bits(half::bf16::from_f32(*value).to_bits() ^ (1 << bit)).to_f32(),
        DType::F16 => half::f16::from_bits(half::f16::from_f32(*value).to_bits() ^ (1 << bit)).to_f32(),
    };
    device.upload(&values, &x.shape, dtype)
}
