//! Initial LoRA matrices as a function of the seed (contract 4.1).
//!
//! After `set_seed` nothing draws from torch's CPU generator before PEFT does, so the matrices follow from the
//! seed, the targets and the shapes alone.

use super::{ModelConfig, select};
use crate::Result;
use crate::batches::Mt19937;
use crate::device::DType;
use crate::run::{AdapterModule, AdapterWeights};

/// Draws A of every selected linear and sets B to zero. A is rounded to `base`, the dtype of the base weights, as
/// PEFT does before it widens the adapter to f32 again.
///
/// # Errors
/// As [`select`].
pub fn initial_weights(
    config: &ModelConfig,
    targets: &[String],
    rank: usize,
    seed: u64,
    base: DType,
) -> Result<AdapterWeights> {
    let mut generator = Mt19937::new(seed);
    let modules = select(targets, config)?.into_iter().map(|(layer, projection)| {
        let (fan_in, fan_out) = projection.shape(config);
        // nn.Linear(in, r) and nn.Linear(r, out) initialise themselves; PEFT then overwrites both.
        for _ in 0..rank * fan_in + fan_out * rank {
            generator.next_u32();
        }
        let a = kaiming_uniform(&mut generator, rank * fan_in, fan_in, base);
        AdapterModule { path: projection.path(layer), a, b: vec![0.0; fan_out * rank], rank, fan_in, fan_out }
    });
    Ok(AdapterWeights { modules: modules.collect(), stored: "F32".to_owned() })
}

/// torch.nn.init.kaiming_uniform_(a = √5) in f32, rounded to `base`.
fn kaiming_uniform(generator: &mut Mt19937, count: usize, fan_in: usize, base: DType) -> Vec<f32> {
    let gain = (2.0 / (1.0 + 5f64.sqrt().powi(2))).sqrt();
    let bound = 3f64.sqrt() * (gain / (fan_in as f64).sqrt());
    let (low, high) = (-bound as f32, bound as f32);
    let draw = |x: u32| {
        let u = (x & 0x00FF_FFFF) as f32 * (-24f32).exp2();
        let value = u.mul_add(high - low, low);
        match base {
            DType::F32 => value,
            DType::BF16 => half::bf16::from_f32(value).to_f32(),
            DType::F16 => half::f16::from_f32(value).to_f32(),
        }
    };
    (0..count).map(|_| draw(generator.next_u32())).collect()
}
