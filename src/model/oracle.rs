//! A second opinion: the same step, f32, on candle-core's autograd, row by row.
//!
//! Shares no arithmetic with the engine: candle reads the weights, multiplies and differentiates. `--cross-check`
//! and the gradient tests compare the two. Plain and slow on purpose.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{D, DType as CandleDType, Device, Tensor, Var};

use super::weights::files;
use super::{ModelConfig, Projection, Ragged, inverse_frequencies};
use crate::device::DType;
use crate::run::AdapterWeights;
use crate::{Error, Result};

/// A base model in candle's hands.
pub struct Oracle {
    config: ModelConfig,
    tensors: HashMap<String, Tensor>,
}

/// Losses and gradients of a pass in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct OracleOutput {
    /// Σ cross-entropy per micro-batch.
    pub loss_sums: Vec<f32>,
    /// A then B of each module of the adapter, row-major, summed over micro-batches with their seeds.
    pub gradients: Vec<Vec<f32>>,
}

/// The matrices of one module as differentiable variables.
struct Lora {
    a: Var,
    b: Var,
}

type Candle<T> = candle_core::Result<T>;

impl Oracle {
    /// Loads every safetensors file of a model folder, rounding weights to `base`.
    ///
    /// # Errors
    /// The configuration or a file cannot be read.
    pub fn open(dir: &Path, base: DType) -> Result<Self> {
        let config = ModelConfig::open(dir)?;
        let mut tensors = HashMap::new();
        for path in files(dir)? {
            let load = || candle_core::safetensors::load(&path, &Device::Cpu);
            tensors.extend(load().map_err(|e| Error::input(e.to_string()).at_path(&path))?);
        }
        let held = match base {
            DType::F32 => CandleDType::F32,
            DType::BF16 => CandleDType::BF16,
            DType::F16 => CandleDType::F16,
        };
        for tensor in tensors.values_mut() {
            *tensor = tensor.to_dtype(held).and_then(|t| t.to_dtype(CandleDType::F32)).map_err(failed)?;
        }
        Ok(Self { config, tensors })
    }

    /// Losses, and gradients of Σ seedᵢ · sᵢ.
    ///
    /// # Errors
    /// A tensor is missing, or candle refuses an operation.
    pub fn run(&self, adapter: &AdapterWeights, scaling: f64, batch: &Ragged, seeds: &[f32]) -> Result<OracleOutput> {
        self.candle_run(adapter, scaling, batch, seeds).map_err(failed)
    }

    fn candle_run(
        &self,
        adapter: &AdapterWeights,
        scaling: f64,
        batch: &Ragged,
        seeds: &[f32],
    ) -> Candle<OracleOutput> {
        let cpu = &Device::Cpu;
        let mut loras = HashMap::new();
        for m in &adapter.modules {
            let a = Var::from_tensor(&Tensor::from_slice(&m.a, (m.rank, m.fan_in), cpu)?)?;
            let b = Var::from_tensor(&Tensor::from_slice(&m.b, (m.fan_out, m.rank), cpu)?)?;
            loras.insert(m.path.clone(), Lora { a, b });
        }
        let lengths = adapter.modules.iter().flat_map(|m| [m.a.len(), m.b.len()]);
        let mut gradients: Vec<Vec<f32>> = lengths.map(|n| vec![0.0; n]).collect();
        let mut loss_sums = Vec::with_capacity(batch.units());
        for (unit, &seed) in seeds.iter().enumerate() {
            let mut sum = 0f32;
            for row in batch.unit_rows[unit]..batch.unit_rows[unit + 1] {
                let Some(loss) = self.row_loss(&loras, scaling, batch, row)? else { continue };
                sum += loss.to_scalar::<f32>()?;
                let store = (loss * f64::from(seed))?.backward()?;
                let matrices = adapter.modules.iter().flat_map(|m| [&loras[&m.path].a, &loras[&m.path].b]);
                for (total, matrix) in gradients.iter_mut().zip(matrices) {
                    let Some(gradient) = store.get(matrix) else { continue };
                    let values = gradient.flatten_all()?.to_vec1::<f32>()?;
                    total.iter_mut().zip(values).for_each(|(t, g)| *t += g);
                }
            }
            loss_sums.push(sum);
        }
        Ok(OracleOutput { loss_sums, gradients })
    }

    /// Σ cross-entropy over the labelled tokens of one row; `None` without any.
    fn row_loss(
        &self,
        loras: &HashMap<String, Lora>,
        scaling: f64,
        batch: &Ragged,
        row: usize,
    ) -> Candle<Option<Tensor>> {
        let (start, end) = (batch.rows[row], batch.rows[row + 1]);
        let labels = batch.labelled.iter().zip(&batch.targets);
        let (index, targets): (Vec<u32>, Vec<u32>) = labels
            .filter(|(t, _)| (start..end).contains(&(**t as usize)))
            .map(|(t, label)| (t - start as u32, *label))
            .unzip();
        if index.is_empty() {
            return Ok(None);
        }
        let cpu = &Device::Cpu;
        let ids = Tensor::from_slice(&batch.ids[start..end], end - start, cpu)?;
        let mut h = self.get("model.embed_tokens.weight")?.index_select(&ids, 0)?;
        for layer in 0..self.config.layers {
            h = self.block(loras, scaling, layer, &h)?;
        }
        let labelled = Tensor::from_slice(&index, index.len(), cpu)?;
        let h = self.norm(&h.index_select(&labelled, 0)?, "model.norm.weight")?;
        let head = if self.config.tied { "model.embed_tokens.weight" } else { "lm_head.weight" };
        let logits = h.matmul(&self.get(head)?.t()?)?;
        let targets = Tensor::from_slice(&targets, (targets.len(), 1), cpu)?;
        let picked = logits.gather(&targets, 1)?;
        let max = logits.max_keepdim(D::Minus1)?.detach();
        let log_sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?.log()?;
        // The large terms first: what is left of them is exact, and small where a token is nearly certain.
        Ok(Some(log_sum.sub(&picked.sub(&max)?)?.sum_all()?))
    }

    fn block(&self, loras: &HashMap<String, Lora>, scaling: f64, layer: usize, h: &Tensor) -> Candle<Tensor> {
        let config = &self.config;
        let linear = |x: &Tensor, projection: Projection| {
            let path = projection.path(layer);
            let mut y = x.matmul(&self.get(&format!("model.{path}.weight"))?.t()?)?;
            if projection.has_bias(config) {
                y = y.broadcast_add(self.get(&format!("model.{path}.bias"))?)?;
            }
            match loras.get(&path) {
                None => Ok(y),
                Some(Lora { a, b }) => y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * scaling)?,
            }
        };
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        let x = self.norm(h, &name("input_layernorm"))?;
        let split = |y: Tensor, heads: usize| y.reshape((y.dim(0)?, heads, config.head_dim));
        let mut q = split(linear(&x, Projection::Q)?, config.heads)?;
        let mut k = split(linear(&x, Projection::K)?, config.kv_heads)?;
        let v = split(linear(&x, Projection::V)?, config.kv_heads)?;
        if config.qk_norm {
            q = self.norm(&q, &name("self_attn.q_norm"))?;
            k = self.norm(&k, &name("self_attn.k_norm"))?;
        }
        let attended = self.attention(&self.rotate(&q)?, &self.rotate(&k)?, &v, config.windows[layer])?;
        let h = (h + linear(&attended, Projection::O)?)?;
        let x = self.norm(&h, &name("post_attention_layernorm"))?;
        let gate = linear(&x, Projection::Gate)?;
        let act = gate.div(&(gate.neg()?.exp()? + 1.0)?)?;
        h + linear(&act.mul(&linear(&x, Projection::Up)?)?, Projection::Down)?
    }

    fn norm(&self, x: &Tensor, weight: &str) -> Candle<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let r = (mean + f64::from(self.config.rms_eps))?.sqrt()?.recip()?;
        x.broadcast_mul(&r)?.broadcast_mul(self.get(weight)?)
    }

    /// x [tokens, heads, head_dim], rotated by its positions.
    fn rotate(&self, x: &Tensor) -> Candle<Tensor> {
        let (tokens, half) = (x.dim(0)?, self.config.head_dim / 2);
        let frequencies = inverse_frequencies(&self.config);
        let angle: Vec<f32> = (0..tokens).flat_map(|p| frequencies.iter().map(move |w| p as f32 * w)).collect();
        let angle = Tensor::from_vec(angle, (tokens, 1, half), &Device::Cpu)?;
        let (cos, sin) = (angle.cos()?, angle.sin()?);
        let (x1, x2) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let y1 = x1.broadcast_mul(&cos)?.sub(&x2.broadcast_mul(&sin)?)?;
        let y2 = x2.broadcast_mul(&cos)?.add(&x1.broadcast_mul(&sin)?)?;
        Tensor::cat(&[y1, y2], D::Minus1)
    }

    /// q, k, v [tokens, heads, head_dim] → [tokens, heads · head_dim].
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, window: Option<usize>) -> Candle<Tensor> {
        let (tokens, heads, head_dim) = q.dims3()?;
        let groups = heads / k.dim(1)?;
        let visible = |i: usize, j: usize| j <= i && window.is_none_or(|w| i - j < w);
        let mask = (0..tokens * tokens).map(|n| if visible(n / tokens, n % tokens) { 0f32 } else { -1e30 });
        let mask = Tensor::from_vec(mask.collect(), (tokens, tokens), &Device::Cpu)?;
        let mut out = Vec::with_capacity(heads);
        for head in 0..heads {
            let one = |x: &Tensor, head: usize| x.narrow(1, head, 1)?.squeeze(1)?.contiguous();
            let (q, k, v) = (one(q, head)?, one(k, head / groups)?, one(v, head / groups)?);
            let scores = ((q.matmul(&k.t()?)? * (head_dim as f64).powf(-0.5))? + &mask)?;
            let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
            let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
            out.push(weights.matmul(&v)?);
        }
        Tensor::cat(&out, D::Minus1)
    }

    fn get(&self, name: &str) -> Candle<&Tensor> {
        self.tensors.get(name).ok_or_else(|| candle_core::Error::Msg(format!("{name}: the tensor is missing")))
    }
}

fn failed(error: candle_core::Error) -> Error {
    Error::internal(format!("candle: {error}")).at("cross-check")
}
