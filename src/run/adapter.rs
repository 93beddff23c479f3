//! adapter_model.safetensors → [`AdapterWeights`] in the model's registration order (contract 6.5, 7.2).

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::{AdapterModule, AdapterWeights};
use crate::{Error, Result};

/// Registration order of the linears of a decoder layer (llama, mistral, qwen2, qwen3).
const LINEARS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

const PREFIX: &str = "base_model.model.";

/// One matrix as it lies in the file.
struct Matrix {
    shape: [usize; 2],
    values: Vec<f32>,
}

impl AdapterWeights {
    /// Reads the adapter of a checkpoint or adapter folder.
    ///
    /// # Errors
    /// Missing or damaged file; tensors that are no LoRA matrices of the supported linears; an A without its B; shapes
    /// that do not fit together.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("adapter_model.safetensors");
        if !path.is_file() && dir.join("adapter_model.bin").is_file() {
            return Err(Error::refused("the adapter is stored as a pickle (adapter_model.bin)")
                .at_path(dir)
                .next("save it as safetensors (save_safetensors: true)"));
        }
        let bytes = std::fs::read(&path).map_err(|e| {
            Error::input(format!("the adapter cannot be read: {e}"))
                .at_path(&path)
                .next("copy the adapter's folder again, or start from another checkpoint")
        })?;
        Self::parse(&bytes).map_err(|e| e.at_path(&path))
    }

    /// Parses the bytes of a safetensors file. See [`AdapterWeights::read`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| {
            Error::input(format!("not a readable safetensors file: {e}"))
                .next("the file is damaged or only partly copied; copy it again or use another checkpoint")
        })?;
        let mut sides: BTreeMap<(usize, usize, String), [Option<Matrix>; 2]> = BTreeMap::new();
        let mut stored: Option<String> = None;
        for (name, view) in file.tensors() {
            let (path, side) = split_name(&name).ok_or_else(|| {
                Error::refused("not a LoRA matrix of a linear layer").at(&name).next(
                    "only adapters on q, k, v, o, gate, up and down projections are replayed (no additional_target)",
                )
            })?;
            let key = order_of(path)
                .ok_or_else(|| Error::refused("a module that is not one of a decoder layer's projections").at(&name))?;
            let dtype = format!("{:?}", view.dtype());
            stored = match stored {
                Some(other) if other != dtype => Some("mixed".to_owned()),
                _ => Some(dtype),
            };
            let matrix = read_matrix(view.dtype(), view.shape(), view.data()).map_err(|e| e.at(&name))?;
            sides.entry((key.0, key.1, path.to_owned())).or_default()[side] = Some(matrix);
        }
        let modules = sides.into_iter().map(|((_, _, path), sides)| pair(path, sides)).collect::<Result<Vec<_>>>()?;
        let stored = stored.ok_or_else(|| Error::input("the adapter holds no tensor"))?;
        Ok(Self { modules, stored })
    }
}

/// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → (`layers.0.self_attn.q_proj`, 0 for A or 1 for B).
fn split_name(name: &str) -> Option<(&str, usize)> {
    let rest = name.strip_prefix(PREFIX)?.strip_suffix(".weight")?;
    // PEFT's in-memory names carry the adapter's name.
    let rest = rest.strip_suffix(".default").unwrap_or(rest);
    let (path, side) = match rest.strip_suffix(".lora_A") {
        Some(path) => (path, 0),
        None => (rest.strip_suffix(".lora_B")?, 1),
    };
    Some((path.strip_prefix("model.").unwrap_or(path), side))
}

/// (layer, place within the layer).
fn order_of(path: &str) -> Option<(usize, usize)> {
    let rest = path.strip_prefix("layers.")?;
    let (layer, rest) = rest.split_once('.')?;
    let linear = rest.rsplit('.').next()?;
    Some((layer.parse().ok()?, LINEARS.iter().position(|&l| l == linear)?))
}

fn read_matrix(dtype: Dtype, shape: &[usize], data: &[u8]) -> Result<Matrix> {
    let &[rows, columns] = shape else {
        return Err(Error::input(format!("expected a matrix, found shape {shape:?}")));
    };
    let values: Vec<f32> = match dtype {
        Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::BF16 => data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F16 => data.chunks_exact(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        other => return Err(Error::input(format!("dtype {other:?} is not supported")).next("F32, BF16 and F16 are")),
    };
    // safetensors has checked that the data is as long as shape and dtype say.
    Ok(Matrix { shape: [rows, columns], values })
}

fn pair(path: String, sides: [Option<Matrix>; 2]) -> Result<AdapterModule> {
    let [Some(a), Some(b)] = sides else {
        return Err(Error::input("one of lora_A and lora_B is missing").at(path));
    };
    if a.shape[0] != b.shape[1] {
        return Err(Error::input(format!("lora_A {:?} and lora_B {:?} do not share a rank", a.shape, b.shape))
            .at(path)
            .next("the file is damaged or not a LoRA adapter; copy it again"));
    }
    Ok(AdapterModule { path, rank: a.shape[0], fan_in: a.shape[1], fan_out: b.shape[0], a: a.values, b: b.values })
}
