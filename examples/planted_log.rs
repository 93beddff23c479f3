//! Replays a run with one fault planted and prints the steps as the trainer would have logged them: the cases of
//! `scripts/generated_cases.py`. An example of the library's entrance.
//!
//! `planted_log RUN ROOT [flip=STEP,MODULE,BIT] [bit=STEP,TARGET,TENSOR,ELEMENT,BIT] [wrong=STEP,FAULT] [pure_bf16]
//! [adapter=STEP,FILE]`: `flip` sets a bit of the largest element of lora_B of that module (counted from 0) that has it at
//! 0, before that step; `bit` inverts one of any element of TARGET (lora_a, lora_b, exp_avg, exp_avg_sq, base) there; `wrong`
//! plants a fault in the operations of that step, written as for `numerics --inject`; `pure_bf16` trains a bf16 adapter;
//! `adapter` keeps the adapter after that step as a safetensors file, as a checkpoint holds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, tensor::TensorView};
use serde_json::json;
use spikeprobe::device::hooked::{Hook, Hooked, Switch};
use spikeprobe::device::{DType, Device};
use spikeprobe::model::PrecisionPlan;
use spikeprobe::numerics::{Faults, parse_fault};
use spikeprobe::probe::Probes;
use spikeprobe::replay::{BitFlip, FlipTarget, Intervention, Observer, Replayer, Source, Start, StepRecord};
use spikeprobe::run::AdapterWeights;
use spikeprobe::step::TrainState;
use spikeprobe::{Error, Result, device};

/// Keeps the adapter after one step; plants faults into the operations of another.
#[derive(Default)]
struct Keeper {
    at: u64,
    kept: Option<AdapterWeights>,
    wrong: Option<(u64, Arc<Faults>)>,
    switch: Arc<Switch>,
    begun: bool,
}

impl Observer for Keeper {
    fn probes(&mut self, step: u64) -> Probes {
        if let Some((_, faults)) = self.wrong.as_ref().filter(|(at, _)| *at == step) {
            // Asked while the replay looks ahead, and again when it runs the step.
            if !self.begun {
                faults.begin_step();
            }
            self.begun = true;
            self.switch.set(Some(Arc::clone(faults) as Arc<dyn Hook>));
        }
        Probes::Off
    }
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if self.wrong.as_ref().is_some_and(|(at, _)| *at == record.step) {
            self.switch.set(None);
        }
        Ok(())
    }
    fn wants_state(&mut self, step: u64) -> bool {
        step == self.at
    }
    fn state(&mut self, device: &dyn Device, state: &TrainState) -> Result<()> {
        self.kept = Some(state.adapter.weights(device)?);
        Ok(())
    }
}

fn main() -> Result<()> {
    let typed: Vec<String> = std::env::args().skip(1).collect();
    let [path, root, options @ ..] = &typed[..] else {
        return Err(Error::input("RUN and ROOT are missing"));
    };
    let source = Source { path: PathBuf::from(path), root: PathBuf::from(root), ..Source::default() };
    let switch = Arc::new(Switch::default());
    let watched = Hooked { inner: device::open("cpu", Some(1))?, hook: Arc::clone(&switch) as Arc<dyn Hook> };
    let replayer = Replayer::open(source, Arc::new(watched))?;
    let mut keeper = Keeper { switch, ..Keeper::default() };
    let mut changes = Vec::new();
    let mut adapter = None;
    for option in options {
        match option.split_once('=') {
            None if option == "pure_bf16" => {
                let plan = PrecisionPlan { adapter: DType::BF16, ..*replayer.scene().engine.plan() };
                changes.push(Intervention::Precision(plan));
            }
            Some(("flip", flip)) => changes.push(Intervention::FlipBit(largest(&replayer, &numbers(flip)?)?)),
            Some(("bit", flip)) => changes.push(Intervention::FlipBit(any(flip)?)),
            Some(("wrong", typed)) => {
                let (step, fault) = typed.split_once(',').ok_or_else(|| Error::input("expected STEP,FAULT"))?;
                keeper.wrong = Some((number(step)?, Arc::new(Faults::new(parse_fault(fault)?))));
            }
            Some(("adapter", kept)) => adapter = kept.split_once(','),
            _ => return Err(Error::input(format!("`{option}` is not an option"))),
        }
    }
    keeper.at = adapter.and_then(|(step, _)| step.parse().ok()).unwrap_or(0);
    let trace = replayer.replay(&Start::Initial, replayer.scene().last_step(), &changes, &mut keeper)?;
    if let (Some((_, file)), Some(weights)) = (adapter, &keeper.kept) {
        write(Path::new(file), weights, options.iter().any(|o| o == "pure_bf16"))?;
    }
    if let Some((step, faults)) = &keeper.wrong {
        let struck =
            faults.struck().ok_or_else(|| Error::input(format!("the fault of step {step} changed nothing")))?;
        eprintln!("step {step}: {struck}");
    }
    let number = |x: f64| if x.is_finite() { json!(x) } else { json!(format!("{x}").to_lowercase()) };
    for r in &trace.steps {
        let (loss, norm) = (number(r.loss_logged.unwrap_or(r.loss)), number(r.grad_norm));
        let row = json!({"step": r.step, "epoch": r.epoch, "loss": loss, "grad_norm": norm,
                         "learning_rate": r.learning_rate_logged});
        spikeprobe::output::print(&format!("{row}\n"))?;
    }
    Ok(())
}

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|_| Error::input(format!("`{text}` is not a number")))
}

fn numbers(text: &str) -> Result<Vec<u64>> {
    text.split(',').map(number).collect()
}

/// `STEP,TARGET,TENSOR,ELEMENT,BIT`.
fn any(typed: &str) -> Result<BitFlip> {
    let parts: Vec<&str> = typed.split(',').collect();
    let &[step, target, tensor, element, bit] = &parts[..] else {
        return Err(Error::input("expected STEP,TARGET,TENSOR,ELEMENT,BIT"));
    };
    let target = match target {
        "lora_a" => FlipTarget::LoraA,
        "lora_b" => FlipTarget::LoraB,
        "exp_avg" => FlipTarget::ExpAvg,
        "exp_avg_sq" => FlipTarget::ExpAvgSq,
        "base" => FlipTarget::BaseTransient,
        _ => return Err(Error::input(format!("`{target}` is not a target"))),
    };
    let (element, bit) = (number(element)? as usize, number(bit)? as u32);
    Ok(BitFlip { step: number(step)?, target, tensor: tensor.to_string(), element, bit })
}

/// The largest element of lora_B of a module that a flip of this bit enlarges.
fn largest(replayer: &Replayer, flip: &[u64]) -> Result<BitFlip> {
    let &[step, module, bit] = flip else { return Err(Error::input("expected STEP,MODULE,BIT")) };
    let mut keeper = Keeper { at: step - 1, ..Keeper::default() };
    replayer.replay(&Start::Initial, step - 1, &[], &mut keeper)?;
    let weights = keeper.kept.ok_or_else(|| Error::input("there is no such step"))?;
    let module = &weights.modules[module as usize % weights.modules.len()];
    // Where the bit is 0 the flip makes the element larger.
    let size = |i: &usize| if module.b[*i].to_bits() >> bit & 1 == 0 { module.b[*i].abs() } else { 0.0 };
    let element = (0..module.b.len()).max_by(|i, j| size(i).total_cmp(&size(j))).unwrap_or(0);
    Ok(BitFlip { step, target: FlipTarget::LoraB, tensor: module.path.clone(), element, bit: bit as u32 })
}

fn write(file: &Path, weights: &AdapterWeights, half: bool) -> Result<()> {
    let bytes = |values: &[f32]| -> Vec<u8> {
        match half {
            true => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            false => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }
    };
    let dtype = if half { Dtype::BF16 } else { Dtype::F32 };
    let mut all: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for m in &weights.modules {
        let name = |side: &str| format!("base_model.model.model.{}.lora_{side}.weight", m.path);
        all.insert(name("A"), (vec![m.rank, m.fan_in], bytes(&m.a)));
        all.insert(name("B"), (vec![m.fan_out, m.rank], bytes(&m.b)));
    }
    let broken = |e: safetensors::SafeTensorError| Error::internal(format!("an adapter as safetensors: {e}"));
    let views = all.iter().map(|(name, (shape, data))| Ok((name, TensorView::new(dtype, shape.clone(), data)?)));
    let views = views.collect::<std::result::Result<Vec<_>, _>>().map_err(broken)?;
    let file_bytes = safetensors::serialize(views, None).map_err(broken)?;
    std::fs::write(file, file_bytes).map_err(|e| Error::output(e.to_string()).at_path(file))
}
