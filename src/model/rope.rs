//! Rotary tables: cos and sin of position · inverse frequency, as transformers' RotaryEmbedding computes them.

use super::{ModelConfig, RopeType, power, trigonometry};
use crate::Result;
use crate::device::{DType, Device, Tensor};

/// cos and sin, [positions, head_dim / 2], in the dtype of the embedding output (HF casts them to it).
#[derive(Debug, Clone)]
pub struct RopeTables {
    pub cos: Tensor,
    pub sin: Tensor,
}

impl RopeTables {
    /// Tables for positions 0..`positions`. Angles are f32 products (contract 4.4); cos and sin are PyTorch's.
    pub fn new(device: &dyn Device, config: &ModelConfig, positions: usize, dtype: DType) -> Result<Self> {
        let frequencies = inverse_frequencies(config);
        let shape = [positions, frequencies.len()];
        let table = |f: fn(f32) -> f32| -> Vec<f32> {
            (0..positions).flat_map(|p| frequencies.iter().map(move |&w| f(p as f32 * w))).collect()
        };
        Ok(Self {
            cos: device.upload(&table(trigonometry::cos), &shape, dtype)?,
            sin: device.upload(&table(trigonometry::sin), &shape, dtype)?,
        })
    }
}

/// inv_freq [head_dim / 2] = 1 / theta^(2i / head_dim), every operation rounded to f32 as torch does it.
pub fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let dim = config.head_dim as f32;
    let exponents: Vec<f32> = (0..config.head_dim / 2).map(|i| (2 * i) as f32 / dim).collect();
    let default = power::powers(config.rope_theta as f32, &exponents).into_iter().map(|p| 1.0 / p);
    match config.rope {
        RopeType::Default => default.collect(),
        RopeType::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            default.map(|w| llama3(w, factor, low_freq_factor, high_freq_factor, original_max_position)).collect()
        }
    }
}

/// `_compute_llama3_parameters`: long wavelengths are divided by `factor`, medium ones interpolated. Python floats
/// meet f32 tensors there, so each operation rounds to f32.
fn llama3(w: f32, factor: f64, low: f64, high: f64, original: f64) -> f32 {
    // torch evaluates `number / tensor` as reciprocal · number.
    let wavelength = (1.0 / w) * (2.0 * std::f64::consts::PI) as f32;
    let factor32 = factor as f32;
    if wavelength > (original / low) as f32 {
        return w / factor32;
    }
    if wavelength < (original / high) as f32 {
        return w;
    }
    let smooth = ((1.0 / wavelength) * original as f32 - low as f32) / (high - low) as f32;
    (1.0 - smooth) * w / factor32 + smooth * w
}
