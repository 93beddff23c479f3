//! Random models of a few KB, rows for them, and comparisons.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, TensorView, serialize};
use spikeprobe::device::Device;
use spikeprobe::device::cpu::CpuDevice;
use spikeprobe::model::{ModelConfig, Projection, Ragged, Row, select};
use spikeprobe::run::{AdapterModule, AdapterWeights};

pub fn cpu(threads: usize) -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(Some(threads)).unwrap())
}

pub fn vectors() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vectors")
}

/// Splitmix64: values in [-1, 1).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }
    pub fn values(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| ((self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * size).collect()
    }
}

/// An f32 safetensors file of these tensors.
pub fn write_safetensors(path: &Path, tensors: &[(String, Vec<usize>, Vec<f32>)]) {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, v)| v.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), data)| (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap()));
    std::fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// f32 tensors of a safetensors file by name.
pub fn read_safetensors(path: &Path) -> HashMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let values = |data: &[u8]| data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    file.iter().map(|(name, view)| (name.to_owned(), values(view.data()))).collect()
}

/// Writes config.json and random weights that it asks for.
pub fn write_model(dir: &Path, config: &serde_json::Value, seed: u64) -> ModelConfig {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let parsed = ModelConfig::from_json(config).unwrap();
    write_safetensors(&dir.join("model.safetensors"), &random_weights(&parsed, seed));
    parsed
}

pub fn random_weights(config: &ModelConfig, seed: u64) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let mut random = Random(seed);
    let mut all = Vec::new();
    let mut push = |name: String, shape: Vec<usize>, center: f32, size: f32| {
        let values = random.values(shape.iter().product(), size);
        all.push((name, shape, values.into_iter().map(|v| center + v).collect()));
    };
    let hidden = config.hidden;
    push("model.embed_tokens.weight".into(), vec![config.vocab, hidden], 0.0, 0.5);
    push("model.norm.weight".into(), vec![hidden], 1.0, 0.3);
    if !config.tied {
        push("lm_head.weight".into(), vec![config.vocab, hidden], 0.0, 0.4);
    }
    for layer in 0..config.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        push(name("input_layernorm"), vec![hidden], 1.0, 0.3);
        push(name("post_attention_layernorm"), vec![hidden], 1.0, 0.3);
        if config.qk_norm {
            push(name("self_attn.q_norm"), vec![config.head_dim], 1.0, 0.3);
            push(name("self_attn.k_norm"), vec![config.head_dim], 1.0, 0.3);
        }
        for projection in Projection::ALL {
            let (fan_in, fan_out) = projection.shape(config);
            let path = projection.path(layer);
            push(format!("model.{path}.weight"), vec![fan_out, fan_in], 0.0, 1.5 / (fan_in as f32).sqrt());
            if projection.has_bias(config) {
                push(format!("model.{path}.bias"), vec![fan_out], 0.0, 0.3);
            }
        }
    }
    all
}

/// Random A and B on the linears that `targets` select.
pub fn random_adapter(config: &ModelConfig, targets: &[String], rank: usize, seed: u64) -> AdapterWeights {
    let mut random = Random(seed);
    let modules = select(targets, config).unwrap().into_iter().map(|(layer, projection)| {
        let (fan_in, fan_out) = projection.shape(config);
        let a = random.values(rank * fan_in, 1.0 / (fan_in as f32).sqrt());
        let b = random.values(fan_out * rank, 0.2);
        AdapterModule { path: projection.path(layer), a, b, rank, fan_in, fan_out }
    });
    AdapterWeights { modules: modules.collect(), stored: "F32".into() }
}

pub fn all() -> Vec<String> {
    vec!["all".into()]
}

/// Micro-batches of rows with random ids; about half of the labels masked.
pub fn random_rows(vocab: usize, lengths: &[&[usize]], seed: u64) -> Ragged {
    let mut random = Random(seed);
    let units: Vec<Vec<(Vec<u32>, Vec<i32>)>> = lengths
        .iter()
        .map(|unit| {
            let row = |&length: &usize| {
                let ids: Vec<u32> = (0..length).map(|_| random.below(vocab) as u32).collect();
                let labels = ids.iter().map(|&id| if random.below(2) == 0 { -100 } else { id as i32 }).collect();
                (ids, labels)
            };
            unit.iter().map(row).collect()
        })
        .collect();
    let rows: Vec<Vec<Row<'_>>> =
        units.iter().map(|unit| unit.iter().map(|(ids, labels)| Row { ids, labels, pack: None }).collect()).collect();
    Ragged::build(rows, vocab).unwrap()
}

/// ‖a − b‖₂ / ‖b‖₂; NaN (and so failing any bound) if either holds a NaN.
pub fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&x, &y)| square(f64::from(x) - f64::from(y))).sum();
    let size: f64 = b.iter().map(|&y| square(f64::from(y))).sum();
    if size == 0.0 && difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}
