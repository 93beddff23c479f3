//! What interventions mean at one step: which window, which learning rate, which noise, which flipped bits.

use super::scene::{Scene, Segment};
use super::{BitFlip, FlipTarget, Intervention, generators};
use crate::batches::{Mt19937, Window};
use crate::device::{DType, Device, Tensor};
use crate::model::{Dropout, Masks, Memory, PassOptions, WeightFlip};
use crate::step::{StepRules, TrainState};
use crate::{Error, Result};

/// The window that `step` runs on.
///
/// # Errors
/// Steps outside the run.
pub(super) fn window(scene: &Scene, segment: &Segment, step: u64, interventions: &[Intervention]) -> Result<Window> {
    let swapped = interventions.iter().rev().find_map(|i| match i {
        Intervention::SwapWindow { step: at, with } if *at == step => Some(*with),
        _ => None,
    });
    match swapped {
        None => segment.plan.window(step),
        Some(with) => {
            let other = scene.segment(with).ok_or_else(|| Error::input(format!("there is no step {with}")))?;
            Ok(Window { step, ..other.plan.window(with)? })
        }
    }
}

/// How the pass of `window` differs from a plain one. `generators`: those of the state before it.
pub(super) fn pass_options(
    scene: &Scene,
    segment: &Segment,
    window: &Window,
    generators: &[Mt19937],
    interventions: &[Intervention],
) -> PassOptions {
    let step = window.step;
    let grouped_attention = segment.rules.grouped_attention;
    let mut options = PassOptions { grouped_attention, ..PassOptions::default() };
    let mut drawn = generators.is_empty().then_some(0);
    for intervention in interventions {
        match intervention {
            Intervention::Perturb { seed } => options.perturb = Some(of_step(*seed, step)),
            Intervention::Dropout { seed } => drawn = Some(*seed),
            Intervention::ExactShapes => options.memory = Memory::MicroBatches,
            Intervention::FlipBit(flip) if flip.step == step && flip.target == FlipTarget::BaseTransient => {
                options.weight_flips.push(WeightFlip {
                    tensor: flip.tensor.clone(),
                    element: flip.element,
                    bit: flip.bit,
                });
            }
            _ => {}
        }
    }
    let p = segment.config.lora_dropout;
    if p > 0.0 {
        let masks = match drawn {
            Some(seed) => Masks::Drawn { seed: of_step(seed, step) },
            None => Masks::Torch(generators::masks(scene, segment, generators, window)),
        };
        options.dropout = Some(Dropout { p, masks });
    }
    options
}

/// Another seed for each step.
fn of_step(seed: u64, step: u64) -> u64 {
    (seed ^ 0x5DEE_CE66_D1CE_4E5B).wrapping_add(step.wrapping_mul(0x9E37_79B9_7F4A_7C15))
}

/// Learning rates of the update of `step`, where interventions change them; `scheduled` are the schedule's own.
pub(super) fn learning_rates(scheduled: &[f64], step: u64, interventions: &[Intervention]) -> Option<Vec<f64>> {
    let mut rates: Option<Vec<f64>> = None;
    for intervention in interventions {
        match intervention {
            Intervention::ScaleLearningRate(factor) => {
                for rate in rates.get_or_insert_with(|| scheduled.to_vec()) {
                    *rate *= factor;
                }
            }
            Intervention::HoldLearningRate { from_step, value } if step >= *from_step => {
                let rates = rates.get_or_insert_with(|| scheduled.to_vec());
                // The other groups keep their multiple of the first.
                let first = scheduled.first().copied().unwrap_or(0.0);
                for (rate, own) in rates.iter_mut().zip(scheduled) {
                    *rate = if first == 0.0 { *value } else { value * (own / first) };
                }
            }
            _ => {}
        }
    }
    rates
}

/// Interventions on the state before `step`.
///
/// # Errors
/// Flips of tensors or elements that do not exist.
pub(super) fn change_state(
    device: &dyn Device,
    rules: &StepRules,
    state: &mut TrainState,
    step: u64,
    interventions: &[Intervention],
) -> Result<()> {
    for intervention in interventions {
        match intervention {
            Intervention::ResetOptimizer { before_step } if *before_step == step => {
                state.moments = rules.optimizer.fresh(device, &state.adapter)?;
            }
            Intervention::FlipBit(flip) if flip.step == step && flip.target != FlipTarget::BaseTransient => {
                flip_state(device, state, flip).map_err(|e| e.at(format!("flip in {}", flip.tensor)))?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn flip_state(device: &dyn Device, state: &mut TrainState, flip: &BitFlip) -> Result<()> {
    let known = |path: &str| path == flip.tensor;
    let index = state.adapter.modules.iter().position(|m| known(&m.projection.path(m.layer)));
    let index = index.ok_or_else(|| Error::input("no adapted module of this path"))?;
    let of_moments = matches!(flip.target, FlipTarget::ExpAvg | FlipTarget::ExpAvgSq);
    // Moments of A come first; an element past them counts on in those of B.
    let inside = state.adapter.modules[index].a.elements();
    let in_b = of_moments && flip.element >= inside;
    let element = if in_b { flip.element - inside } else { flip.element };
    let target: &mut Tensor = match flip.target {
        FlipTarget::LoraA => &mut state.adapter.modules[index].a,
        FlipTarget::LoraB => &mut state.adapter.modules[index].b,
        FlipTarget::BaseTransient => return Ok(()),
        FlipTarget::ExpAvg | FlipTarget::ExpAvgSq => {
            let moments = state.moments.get_mut(2 * index + usize::from(in_b));
            let moments = moments.ok_or_else(|| Error::input("the optimizer has no moments"))?;
            if flip.target == FlipTarget::ExpAvg { &mut moments.exp_avg } else { &mut moments.exp_avg_sq }
        }
    };
    let mut values = device.download(target)?;
    let count = values.len();
    let outside = || Error::input(format!("element {element}, bit {}: there are {count} elements", flip.bit));
    let value = values.get_mut(element).ok_or_else(outside)?;
    *value = flipped(*value, flip.bit, target.dtype).ok_or_else(outside)?;
    *target = device.upload(&values, &target.shape, target.dtype)?;
    Ok(())
}

/// `value` with one bit of its `dtype` representation inverted; bit 0 is the least significant.
fn flipped(value: f32, bit: u32, dtype: DType) -> Option<f32> {
    if bit as usize >= 8 * dtype.size() {
        return None;
    }
    Some(match dtype {
        DType::F32 => f32::from_bits(value.to_bits() ^ (1 << bit)),
        DType::BF16 => half::bf16::from_bits(half::bf16::from_f32(value).to_bits() ^ (1 << bit)).to_f32(),
        DType::F16 => half::f16::from_bits(half::f16::from_f32(value).to_bits() ^ (1 << bit)).to_f32(),
    })
}
