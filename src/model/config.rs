//! config.json → [`ModelConfig`]: the shapes and constants of a decoder, as transformers resolves them.
//!
//! Owns which model types and rope types are covered; what is not is refused by name. Reads no weights.

use std::path::Path;

use serde_json::Value;

use crate::device::DType;
use crate::{Error, Result};

/// Model types whose forward pass this crate implements (`model_type` of config.json).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// How rotary frequencies are derived from theta (transformers modeling_rope_utils.py).
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeType {
    Default,
    /// `_compute_llama3_parameters`.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: f64,
    },
}

/// A decoder's shapes and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub model_type: ModelType,
    /// `dtype` (transformers 5) or `torch_dtype` (4); `None` when the file names none.
    pub dtype: Option<DType>,
    pub vocab: usize,
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub max_position: usize,
    pub rms_eps: f32,
    pub rope_theta: f64,
    pub rope: RopeType,
    /// lm_head shares the embedding's weight.
    pub tied: bool,
    /// Biases of q, k and v.
    pub qkv_bias: bool,
    /// Bias of o.
    pub o_bias: bool,
    /// Biases of gate, up and down.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k (qwen3).
    pub qk_norm: bool,
    /// Per layer: number of most recent positions a query sees, itself included; `None`: all earlier ones.
    pub windows: Vec<Option<usize>>,
}

impl ModelConfig {
    /// Reads `config.json` of a Hugging Face model folder.
    ///
    /// # Errors
    /// The file is missing or not JSON, a key is missing or of the wrong type, or the model is not covered.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| {
            Error::input(format!("cannot read the model's configuration: {e}"))
                .at_path(&path)
                .next("check model_name_or_path: it must be a Hugging Face model folder")
        })?;
        let json: Value = serde_json::from_str(&text).map_err(|e| {
            Error::input(format!("not valid JSON: {e}")).at_path(&path).next("restore the file from the model's source")
        })?;
        Self::from_json(&json).map_err(|e| e.at_path(&path).or_next("restore the file from the model's source"))
    }

    /// Resolves the parsed config.json.
    ///
    /// # Errors
    /// As [`ModelConfig::open`], without the file.
    pub fn from_json(json: &Value) -> Result<Self> {
        let keys = Keys(json);
        let model_type = model_type(&keys)?;
        refuse_uncovered(&keys)?;
        let hidden = keys.count("hidden_size")?;
        let heads = keys.count("num_attention_heads")?;
        let kv_heads = match json.get("num_key_value_heads") {
            // Written as null: every configuration class then takes the number of heads.
            Some(Value::Null) => heads,
            _ => keys.optional_count("num_key_value_heads")?.unwrap_or(default_kv_heads(model_type, heads)),
        };
        let default_head_dim = if model_type == ModelType::Qwen3 { 128 } else { hidden / heads };
        let head_dim = keys.optional_count("head_dim")?.unwrap_or(default_head_dim);
        if heads % kv_heads != 0 {
            return Err(Error::input(format!("num_attention_heads {heads} is not a multiple of {kv_heads}"))
                .at("num_key_value_heads"));
        }
        if head_dim % 2 != 0 {
            return Err(Error::input(format!("{head_dim} is odd; rotary embeddings need pairs")).at("head_dim"));
        }
        let layers = keys.count("num_hidden_layers")?;
        if layers > MOST_LAYERS {
            return Err(Error::input(format!("{layers} layers are more than any model has")).at("num_hidden_layers"));
        }
        let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let max_position = keys.count("max_position_embeddings")?;
        let (rope_theta, rope) = rope(&keys, max_position)?;
        let biased = matches!(model_type, ModelType::Llama | ModelType::Qwen3) && attention_bias;
        Ok(Self {
            model_type,
            dtype: dtype(&keys)?,
            vocab: keys.count("vocab_size")?,
            hidden,
            intermediate: keys.count("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_position,
            rms_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6) as f32,
            rope_theta,
            rope,
            tied: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            // Qwen2Attention: bias=True for q, k, v and False for o, whatever the configuration says.
            qkv_bias: biased || model_type == ModelType::Qwen2,
            o_bias: biased,
            mlp_bias: model_type == ModelType::Llama && keys.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: model_type == ModelType::Qwen3,
            windows: windows(&keys, model_type, layers)?,
        })
    }
}

/// What a damaged file claims is not allocated before the weights are looked for.
const MOST_LAYERS: usize = 10_000;

/// config.json, with errors that name the key.
struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }
    fn optional_count(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if (1..=1 << 32).contains(&n) => Ok(Some(n as usize)),
                _ => Err(Error::input(format!("{v} is not a positive count")).at(key)),
            },
        }
    }
    fn count(&self, key: &str) -> Result<usize> {
        self.optional_count(key)?.ok_or_else(|| Error::input("missing").at(key))
    }
    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.get(key)
            .map(|v| v.as_f64().ok_or_else(|| Error::input(format!("{v} is not a number")).at(key)))
            .transpose()
    }
    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key)
            .map(|v| v.as_bool().ok_or_else(|| Error::input(format!("{v} is not true or false")).at(key)))
            .transpose()
    }
    fn text(&self, key: &str) -> Option<&str> {
        self.get(key).and_then(Value::as_str)
    }
}

fn model_type(keys: &Keys<'_>) -> Result<ModelType> {
    match keys.text("model_type") {
        Some("llama") => Ok(ModelType::Llama),
        Some("mistral") => Ok(ModelType::Mistral),
        Some("qwen2") => Ok(ModelType::Qwen2),
        Some("qwen3") => Ok(ModelType::Qwen3),
        Some(other) => Err(Error::refused(format!("models of type {other} are not covered"))
            .at("model_type")
            .next("llama, mistral, qwen2 and qwen3 are")),
        None => Err(Error::input("missing").at("model_type")),
    }
}

/// What the configuration class assumes when the key is absent.
fn default_kv_heads(model_type: ModelType, heads: usize) -> usize {
    match model_type {
        ModelType::Llama => heads,
        ModelType::Mistral => 8,
        ModelType::Qwen2 | ModelType::Qwen3 => 32,
    }
}

fn refuse_uncovered(keys: &Keys<'_>) -> Result<()> {
    if let Some(act) = keys.text("hidden_act").filter(|&a| a != "silu") {
        return Err(Error::refused(format!("activation {act} is not covered")).at("hidden_act").next("silu is"));
    }
    if keys.number("attention_dropout")?.is_some_and(|p| p != 0.0) {
        return Err(Error::refused("attention dropout cannot be replayed").at("attention_dropout"));
    }
    if keys.get("quantization_config").is_some() {
        return Err(Error::refused("quantized base weights are not covered")
            .at("quantization_config")
            .next("replay with the unquantized base model"));
    }
    Ok(())
}

fn dtype(keys: &Keys<'_>) -> Result<Option<DType>> {
    match keys.text("dtype").or_else(|| keys.text("torch_dtype")) {
        None | Some("auto") => Ok(None),
        Some("float32") => Ok(Some(DType::F32)),
        Some("bfloat16") => Ok(Some(DType::BF16)),
        Some("float16") => Ok(Some(DType::F16)),
        Some(other) => Err(Error::refused(format!("weights of dtype {other} are not covered")).at("dtype")),
    }
}

/// (theta, type). transformers 5 writes `rope_parameters`, 4 writes `rope_theta` and `rope_scaling`.
fn rope(keys: &Keys<'_>, max_position: usize) -> Result<(f64, RopeType)> {
    let none = Value::Null;
    let at = if keys.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
    let parameters = Keys(keys.get(at).unwrap_or(&none));
    let theta = match parameters.number("rope_theta").map_err(|e| e.at(at))? {
        Some(theta) => theta,
        None => keys.number("rope_theta")?.unwrap_or(10_000.0),
    };
    if !(theta > 0.0 && theta.is_finite()) {
        return Err(Error::input(format!("{theta} is not a positive number")).at("rope_theta"));
    }
    if parameters.number("partial_rotary_factor")?.or(keys.number("partial_rotary_factor")?).is_some_and(|f| f != 1.0) {
        return Err(Error::refused("partial rotary embeddings are not covered").at("partial_rotary_factor"));
    }
    let kind = parameters.text("rope_type").or_else(|| parameters.text("type")).unwrap_or("default");
    let need = |key: &str| {
        parameters.number(key).and_then(|v| v.ok_or_else(|| Error::input("missing").at(key))).map_err(|e| e.at(at))
    };
    match kind {
        "default" => Ok((theta, RopeType::Default)),
        "llama3" => {
            let original = parameters.number("original_max_position_embeddings")?.unwrap_or(max_position as f64);
            let rope = RopeType::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position: original,
            };
            Ok((theta, rope))
        }
        other => Err(Error::refused(format!("rope type {other} is not covered"))
            .at(format!("{at}.rope_type"))
            .next("default and llama3 are")),
    }
}

/// Sliding windows per layer (MistralModel: every layer; Qwen2Config.__post_init__: layers from max_window_layers).
fn windows(keys: &Keys<'_>, model_type: ModelType, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = keys.optional_count("sliding_window")?;
    match model_type {
        ModelType::Llama => Ok(vec![None; layers]),
        // An explicit null means no window; an absent key means the class default.
        ModelType::Mistral if keys.0.get("sliding_window").is_none() => Ok(vec![Some(4096); layers]),
        ModelType::Mistral => Ok(vec![window; layers]),
        ModelType::Qwen2 | ModelType::Qwen3 => {
            if !keys.flag("use_sliding_window")?.unwrap_or(false) {
                return Ok(vec![None; layers]);
            }
            let window = window.or(keys.0.get("sliding_window").is_none().then_some(4096));
            if let Some(types) = keys.get("layer_types").and_then(Value::as_array) {
                if types.len() != layers {
                    return Err(Error::input(format!("{} entries for {layers} layers", types.len())).at("layer_types"));
                }
                return Ok(types.iter().map(|t| window.filter(|_| t == "sliding_attention")).collect());
            }
            let full = keys.number("max_window_layers")?.unwrap_or(28.0) as usize;
            Ok((0..layers).map(|layer| window.filter(|_| layer >= full)).collect())
        }
    }
}
