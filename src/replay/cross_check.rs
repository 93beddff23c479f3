//! A step's losses and gradients computed a second time, by candle's autograd: is a departure this program's
//! arithmetic, or the run?
//!
//! Owns which states and windows are compared and what a difference means. The second implementation is
//! [`crate::model::Oracle`]: it shares no arithmetic with the engine, works in f32 row by row, and knows no dropout.

use serde_json::{Value, json};

use super::scene::Scene;
use super::{Intervention, Observer, Replayer, Start, start, steps, walk};
use crate::device::{DType, Device};
use crate::model::{Adapter, Engine, Gradients, Oracle, PassOptions, PrecisionPlan, Ragged};
use crate::report::json::number;
use crate::run::AdapterWeights;
use crate::step::TrainState;
use crate::{Error, Result};

/// What two f32 implementations that sum in other orders may always differ by.
const FLOOR: f64 = 1e-4;
/// How often the effect of noise of half an ulp on every block's input they may differ by, where that is more: on
/// memorised data gradients are what is left when their terms cancel. Between two such inputs each implementation
/// rounds dozens of times, sums of hundreds of terms among them (28 times the noise was seen on the demonstration's
/// run). A wrong formula shows as a hundredth and more of the whole.
const WIDEN: f64 = 100.0;
/// The most that counts as rounding, however noisy the step.
const CEILING: f64 = 1e-2;

/// One step computed three times from the same state and rows.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossCheck {
    pub step: u64,
    /// Σ of the micro-batches' back-propagated losses: candle's, the engine's in f32, the engine's in the run's
    /// precision (equal to the second where that is f32).
    pub losses: [f64; 3],
    /// ‖engine in f32 − candle‖₂ / ‖candle‖₂ over all gradients together.
    pub relative_l2: f64,
    /// Largest such distance that is still rounding, measured with a perturbed pass.
    pub allowed: f64,
    /// A and B of each module, in optimizer order.
    pub tensors: Vec<TensorCheck>,
}

/// One LoRA matrix's gradient.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorCheck {
    /// `layers.0.self_attn.q_proj.lora_A`.
    pub name: String,
    /// ‖engine in f32 − candle‖₂ / ‖candle‖₂: this program's arithmetic.
    pub relative_l2: f64,
    /// ‖engine in the run's precision − engine in f32‖₂ / ‖engine in f32‖₂: what the precision does.
    pub precision_l2: f64,
}

impl CrossCheck {
    /// |engine in f32 − candle| / |candle| of the loss.
    pub fn loss_rel(&self) -> f64 {
        super::relative(self.losses[1], self.losses[0])
    }

    /// True if both implementations compute the same up to f32 rounding. NaN agrees with nothing.
    pub fn agrees(&self) -> bool {
        let finite = self.tensors.iter().all(|t| !t.relative_l2.is_nan());
        finite && self.loss_rel() <= FLOOR && self.relative_l2 <= self.allowed
    }

    /// The tensor on which they differ most, a NaN before all.
    pub fn worst(&self) -> Option<&TensorCheck> {
        let size = |t: &TensorCheck| if t.relative_l2.is_nan() { f64::INFINITY } else { t.relative_l2 };
        self.tensors.iter().max_by(|a, b| size(a).total_cmp(&size(b)))
    }

    /// For `replay --json`.
    pub fn json(&self) -> Value {
        let tensors: Vec<Value> = self.tensors.iter().map(|t| {
            json!({"name": t.name, "relative_l2": number(t.relative_l2), "precision_l2": number(t.precision_l2)})
        }).collect();
        let [candle, f32, run] = self.losses.map(number);
        json!({
            "step": self.step,
            "agrees": self.agrees(),
            "allowed": number(self.allowed),
            "relative_l2": number(self.relative_l2),
            "loss": {"candle": candle, "f32": f32, "run": run},
            "tensors": tensors,
        })
    }
}

/// Computes `step` of the replay from `start` both ways.
///
/// # Errors
/// Steps outside the replay; weights that candle cannot read.
pub fn cross_check(
    replayer: &Replayer,
    start: &Start,
    step: u64,
    interventions: &[Intervention],
) -> Result<CrossCheck> {
    let scene = replayer.scene_for(interventions)?;
    let state = state_before(replayer, &scene, start, step, interventions)?;
    compute(replayer, &scene, &state, step, interventions)
}

/// The same of a step of the unchanged run. `ready` is called when only the step itself is left to compute.
///
/// # Errors
/// As [`cross_check`].
pub fn second_opinion(replayer: &Replayer, start: &Start, step: u64, ready: &mut dyn FnMut()) -> Result<CrossCheck> {
    let scene = replayer.scene_for(&[])?;
    let state = state_before(replayer, &scene, start, step, &[])?;
    ready();
    compute(replayer, &scene, &state, step, &[])
}

/// Bytes that the second implementation holds the model in.
pub fn second_opinion_bytes(replayer: &Replayer) -> usize {
    replayer.scene().base().tensors().map(|(_, tensor)| 4 * tensor.elements()).sum()
}

fn compute(
    replayer: &Replayer,
    scene: &Scene,
    state: &TrainState,
    step: u64,
    interventions: &[Intervention],
) -> Result<CrossCheck> {
    let segment = scene.segment(step).ok_or_else(|| super::replayer::no_such_step(scene, step))?;
    let window = steps::window(scene, segment, step, interventions)?;
    let batch = walk::ragged(scene, &window, &PassOptions::default())?;
    let labels = batch.unit_labels.windows(2).map(|w| (w[1] - w[0]) as u64);
    let seeds: Vec<f32> =
        window.micro_batches.iter().zip(labels).map(|(m, c)| segment.rules.loss.of(&m.fetched, c).seed).collect();
    // A micro-batch without labels has no loss; its seed may be 1/0.
    let seeds: Vec<f32> = seeds.into_iter().map(|s| if s.is_finite() { s } else { 0.0 }).collect();

    let device = scene.engine.device();
    let weights = state.adapter.weights(device)?;
    let folder = scene.run.path(&scene.run.config.model_name_or_path);
    let oracle = Oracle::open(&folder, DType::F32)?;
    let expected = oracle.run(&weights, f64::from(state.adapter.scaling), &batch, &seeds)?;
    let loss = |sums: &[f32]| sums.iter().zip(&seeds).map(|(s, seed)| f64::from(*s) * f64::from(*seed)).sum();

    let wide = Engine::new(replayer.shared_device(), scene.base(), PrecisionPlan::F32)?;
    let (wide_sums, wide_gradients) = own(&wide, &state.adapter, &weights, (&batch, &seeds), None)?;
    let (_, noisy_gradients) = own(&wide, &state.adapter, &weights, (&batch, &seeds), Some(1))?;
    let (run_sums, run_gradients) = own(&scene.engine, &state.adapter, &weights, (&batch, &seeds), None)?;
    let tensors = wide_gradients.iter().zip(&run_gradients).zip(&expected.gradients).enumerate();
    let tensors = tensors.map(|(index, ((wide, run), candle))| TensorCheck {
        name: format!("{}.lora_{}", weights.modules[index / 2].path, ["A", "B"][index % 2]),
        relative_l2: relative_l2(wide, candle),
        precision_l2: relative_l2(run, wide),
    });
    let tensors: Vec<TensorCheck> = tensors.collect();
    let all = wide_gradients.concat();
    let allowed = (WIDEN * relative_l2(&noisy_gradients.concat(), &all)).clamp(FLOOR, CEILING);
    let relative_l2 = relative_l2(&all, &expected.gradients.concat());
    let losses = [loss(&expected.loss_sums), loss(&wide_sums), loss(&run_sums)];
    Ok(CrossCheck { step, losses, relative_l2, allowed, tensors })
}

/// The engine's loss sums and gradients, without dropout or faults.
fn own(
    engine: &Engine,
    adapter: &Adapter,
    weights: &AdapterWeights,
    (batch, seeds): (&Ragged, &[f32]),
    perturb: Option<u64>,
) -> Result<(Vec<f32>, Vec<Vec<f32>>)> {
    let (device, plan) = (engine.device(), engine.plan());
    let paths: Vec<String> = weights.modules.iter().map(|m| m.path.clone()).collect();
    let adapter = Adapter::new(device, engine.config(), &paths, weights, f64::from(adapter.scaling), plan.adapter)?;
    let mut gradients = Gradients::zeros(device, &adapter)?;
    let out =
        engine.pass(&adapter, batch, seeds, &PassOptions { perturb, ..PassOptions::default() }, &mut gradients)?;
    let values = gradients.tensors.iter().map(|t| device.download(t)).collect::<Result<_>>()?;
    Ok((out.units.iter().map(|u| u.loss_sum).collect(), values))
}

/// ‖a − b‖₂ / ‖b‖₂ in f64; 0 if both are zero.
fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let difference: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let size: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    if difference == 0.0 { 0.0 } else { (difference / size).sqrt() }
}

/// The state from which the replay computes `step`.
fn state_before(
    replayer: &Replayer,
    scene: &Scene,
    start: &Start,
    step: u64,
    interventions: &[Intervention],
) -> Result<TrainState> {
    struct Keep {
        step: u64,
        state: Option<TrainState>,
    }
    impl Observer for Keep {
        fn wants_state(&mut self, step: u64) -> bool {
            step == self.step
        }
        fn state(&mut self, _device: &dyn Device, state: &TrainState) -> Result<()> {
            self.state = Some(state.clone());
            Ok(())
        }
    }
    let (first, _) = start::start_state(scene, start)?;
    if step == first.step + 1 {
        return Ok(first);
    }
    let mut keep = Keep { step: step - 1, state: None };
    replayer.replay(start, step - 1, interventions, &mut keep)?;
    keep.state.ok_or_else(|| Error::internal(format!("no state after step {}", step - 1)))
}
