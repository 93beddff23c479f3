//! A Hugging Face model folder → [`BaseModel`]: every frozen tensor by name, mapped from its safetensors file.
//!
//! Owns which tensors a decoder needs, their shapes, and finding them in one file or in shards. Copies nothing;
//! rounding weights to the dtype a run holds them in is the engine's.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};

use super::{ModelConfig, Projection};
use crate::device::cpu::MappedBytes;
use crate::device::{DType, Device, Storage, Tensor};
use crate::{Error, Result};

const RESTORE: &str = "copy or download the model folder again";

/// The frozen weights of a decoder, as stored.
#[derive(Debug, Clone)]
pub struct BaseModel {
    pub config: ModelConfig,
    pub dir: PathBuf,
    /// By name in the checkpoint (`model.layers.0.mlp.up_proj.weight`), in the dtype of the file.
    tensors: BTreeMap<String, Tensor>,
}

impl BaseModel {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` names, and checks that every
    /// tensor the configuration asks for is there with its shape.
    ///
    /// # Errors
    /// Names the file, and the tensor where there is one: missing, truncated or corrupt files, missing tensors,
    /// wrong shapes, dtypes other than f32, bf16 and fp16.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = ModelConfig::open(dir)?;
        let mut found = HashMap::new();
        for file in files(dir)? {
            read_file(&file, &mut found)?;
        }
        let mut tensors = BTreeMap::new();
        for (name, shape) in expected(&config) {
            let (tensor, file) = found
                .remove(&name)
                .ok_or_else(|| Error::input("the tensor is missing").at(&name).at_path(dir).next(RESTORE))?;
            if tensor.shape != shape {
                let what = format!("shape {:?}, but config.json asks for {shape:?}", tensor.shape);
                let error = Error::input(what).at(&name).at_path(&file);
                return Err(error.next("config.json and the weights belong to different models"));
            }
            tensors.insert(name, tensor);
        }
        Ok(Self { config, dir: dir.to_owned(), tensors })
    }

    /// A tensor that [`BaseModel::open`] checked.
    ///
    /// # Errors
    /// Internal: the name is not one of this model's.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::internal("not a tensor of this model").at(name))
    }

    /// Names and tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Dtype of the weights when config.json names none: that of the embedding (transformers takes the first
    /// floating tensor of the checkpoint).
    pub fn stored_dtype(&self) -> DType {
        self.tensors.get(EMBEDDING).map_or(DType::F32, |t| t.dtype)
    }

    /// Tensors that hold NaN or infinities, with how many. Reads every weight once.
    pub fn nonfinite(&self, device: &dyn Device) -> Result<Vec<(String, u64)>> {
        let mut broken = Vec::new();
        for (name, tensor) in self.tensors() {
            let all = device.statistics(tensor, &[0, tensor.rows()], tensor.dtype).map_err(|e| e.at(name))?;
            let count = all.iter().map(|s| s.nan + s.pos_inf + s.neg_inf).sum();
            if count > 0 {
                broken.push((name.to_owned(), count));
            }
        }
        Ok(broken)
    }
}

pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";
pub(super) const FINAL_NORM: &str = "model.norm.weight";
pub(super) const HEAD: &str = "lm_head.weight";

/// `model.layers.0.mlp.up_proj.weight`: `leaf` is `weight` or `bias`.
pub(super) fn projection_name(layer: usize, projection: Projection, leaf: &str) -> String {
    format!("model.{}.{leaf}", projection.path(layer))
}

/// Names and shapes of every tensor that the forward pass reads.
fn expected(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden;
    let mut all = vec![(EMBEDDING.to_owned(), vec![config.vocab, hidden]), (FINAL_NORM.to_owned(), vec![hidden])];
    if !config.tied {
        all.push((HEAD.to_owned(), vec![config.vocab, hidden]));
    }
    for layer in 0..config.layers {
        let mut norm = |name: &str, width| all.push((format!("model.layers.{layer}.{name}.weight"), vec![width]));
        norm("input_layernorm", hidden);
        norm("post_attention_layernorm", hidden);
        if config.qk_norm {
            norm("self_attn.q_norm", config.head_dim);
            norm("self_attn.k_norm", config.head_dim);
        }
        for projection in Projection::ALL {
            let (fan_in, fan_out) = projection.shape(config);
            all.push((projection_name(layer, projection, "weight"), vec![fan_out, fan_in]));
            if projection.has_bias(config) {
                all.push((projection_name(layer, projection, "bias"), vec![fan_out]));
            }
        }
    }
    all
}

/// The safetensors files of a folder.
pub(crate) fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.exists() {
        return Ok(vec![follow_link(single)?]);
    }
    let index = dir.join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&index).map_err(|e| {
        Error::input(format!("neither model.safetensors nor model.safetensors.index.json can be read: {e}"))
            .at_path(dir)
            .next("convert the weights with save_pretrained(…, safe_serialization=True)")
    })?;
    let json: serde_json::Value = serde_json::from_str(&text)
        .map_err(|e| Error::input(format!("not valid JSON: {e}")).at_path(&index).next(RESTORE))?;
    let map = json.get("weight_map").and_then(|m| m.as_object());
    let map = map.ok_or_else(|| Error::input("no weight_map").at_path(&index).next(RESTORE))?;
    let mut names: Vec<&str> = map.values().filter_map(|v| v.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    // A name that leaves the folder would read a file the user did not point at.
    if let Some(name) = names.iter().find(|n| n.contains(['/', '\\'])) {
        return Err(Error::input(format!("shard {name} lies outside the model folder")).at_path(&index));
    }
    names.into_iter().map(|name| follow_link(dir.join(name))).collect()
}

/// Longest file that can be a stand-in for weights rather than weights.
const LINK_BYTES: u64 = 1024;

/// Symbolic links become text files that hold the target in checkouts and archives without links; Git LFS leaves a
/// pointer where weights were not fetched.
fn follow_link(file: PathBuf) -> Result<PathBuf> {
    let short = std::fs::metadata(&file).is_ok_and(|m| m.len() <= LINK_BYTES);
    let Some(text) = short.then(|| std::fs::read_to_string(&file).ok()).flatten() else { return Ok(file) };
    if text.starts_with("version https://git-lfs") {
        return Err(Error::input("a Git LFS pointer, not weights").at_path(&file).next("git lfs pull"));
    }
    let target =
        file.parent().map(|dir| dir.join(text.trim())).filter(|t| text.contains(".safetensors") && t.is_file());
    Ok(target.unwrap_or(file))
}

/// Adds every floating tensor of one file to `found`.
fn read_file(file: &Path, found: &mut HashMap<String, (Tensor, PathBuf)>) -> Result<()> {
    let bytes = MappedBytes::open(file)?;
    let corrupt = |what: String| Error::input(what).at_path(file).next(RESTORE);
    let (header, metadata) = SafeTensors::read_metadata(bytes.as_slice())
        .map_err(|e| corrupt(format!("truncated or corrupt safetensors file: {e}")))?;
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            // Buffers such as old rotary tables are not read; a weight of another dtype is reported as missing.
            _ => continue,
        };
        let (start, end) = info.data_offsets;
        let data = bytes
            .slice(8 + header + start, end - start)
            .ok_or_else(|| corrupt("the tensor's data lie past the end of the file".to_owned()).at(&name))?;
        let tensor = Tensor { shape: info.shape.clone(), dtype, storage: Storage::Mapped(data) };
        found.insert(name, (tensor, file.to_owned()));
    }
    Ok(())
}
