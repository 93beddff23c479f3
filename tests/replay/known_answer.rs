//! tiny_llama of the replay contract: four optimizer steps against transformers 5.6's own numbers, and the same
//! run's log under 4.48.2.

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::SafeTensors;
use serde_json::Value;
use spikeprobe::batches::{Fetched, MicroBatch, Window};
use spikeprobe::device::{DType, Device};
use spikeprobe::model::{Adapter, BaseModel, Engine, PassOptions, PrecisionPlan, Ragged, Row};
use spikeprobe::run::{AdapterModule, AdapterWeights, LoggedLearningRate, LossRule};
use spikeprobe::step::{
    LossRules, Optimizer, Rule, RunningLoss, Schedule, ScheduleSpec, StepInput, StepOutput, StepRules, TrainState, step,
};

pub fn folder() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vectors")
}

pub fn json(name: &str) -> Value {
    let path = folder().join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Tensors of a safetensors file by name, PEFT's prefix and `.default` removed.
fn tensors(name: &str) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = std::fs::read(folder().join("tiny_llama").join(name)).expect(name);
    let file = SafeTensors::deserialize(&bytes).expect(name);
    let short = |key: &str| key.replace("base_model.model.model.", "").replace(".default", "").replace(".weight", "");
    file.tensors()
        .into_iter()
        .map(|(key, t)| {
            let values = t.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four"))).collect();
            (short(&key), (t.shape().to_vec(), values))
        })
        .collect()
}

/// Largest |a − b|; a NaN on either side fails.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (x, y)| {
        let d = (x - y).abs();
        assert!(!d.is_nan(), "{x} and {y}");
        worst.max(d)
    })
}

struct Known {
    run: Value,
    engine: Engine,
    state: TrainState,
    rules: StepRules,
}

fn known(logged: LoggedLearningRate) -> Known {
    let run = json("tiny_llama/run.json");
    let device = spikeprobe::device::open("cpu", Some(1)).expect("cpu");
    let base = Arc::new(BaseModel::open(&folder().join("tiny_llama/base")).expect("base"));
    let engine = Engine::new(device, base, PrecisionPlan::F32).expect("engine");
    let initial = tensors("adapter_init.safetensors");
    let targets = vec!["all".to_owned()];
    let modules = spikeprobe::model::select(&targets, engine.config()).expect("targets").into_iter().map(|(l, p)| {
        let path = p.path(l);
        let (a_shape, a) = initial[&format!("{path}.lora_A")].clone();
        let (b_shape, b) = initial[&format!("{path}.lora_B")].clone();
        AdapterModule { path, a, b, rank: a_shape[0], fan_in: a_shape[1], fan_out: b_shape[0] }
    });
    let weights = AdapterWeights { modules: modules.collect(), stored: "F32".to_owned() };
    let adapter = Adapter::new(engine.device(), engine.config(), &targets, &weights, 2.0, DType::F32).expect("adapter");
    let optimizer = Optimizer {
        rule: Rule::AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, fused: false },
        weight_decay: 0.01,
        b_ratio: None,
    };
    let none = BTreeMap::new();
    let spec = ScheduleSpec { name: "cosine", kwargs: &none, base: 1e-2, total: 4, warmup: 1 };
    let rules = StepRules {
        optimizer,
        schedule: Schedule::new(&spec).expect("cosine"),
        loss: LossRules {
            rule: LossRule::TokenMean,
            accumulation: 3,
            world_size: 1,
            averages_tokens: false,
            divides_again: false,
        },
        max_grad_norm: 1.0,
        nan_filter: true,
        logging_steps: 1,
        logging_first_step: false,
        logged_learning_rate: logged,
        skip_advances_schedule: false,
        grouped_attention: true,
    };
    let state = TrainState {
        step: 0,
        optimizer,
        moments: optimizer.fresh(engine.device(), &adapter).expect("moments"),
        adapter,
        schedule_steps: 0,
        base_learning_rates: vec![1e-2],
        stored_learning_rates: None,
        scaler: None,
        running_loss: RunningLoss::new(1, 0),
        generators: Vec::new(),
    };
    Known { run, engine, state, rules }
}

impl Known {
    /// Runs the next optimizer step on the recorded, padded micro-batches, padding cut off.
    fn step(&mut self) -> StepOutput {
        let first = self.state.step as usize * 3;
        let micro = &self.run["micro"].as_array().expect("micro")[first..first + 3];
        let list = |v: &Value| -> Vec<i64> { serde_json::from_value(v.clone()).expect("integers") };
        let rows: Vec<Vec<(Vec<u32>, Vec<i32>)>> = micro
            .iter()
            .map(|m| {
                let count = m["input_ids"].as_array().expect("rows").len();
                (0..count)
                    .map(|r| {
                        let length = list(&m["attention_mask"][r]).iter().sum::<i64>() as usize;
                        let ids = list(&m["input_ids"][r])[..length].iter().map(|&i| i as u32).collect();
                        (ids, list(&m["labels"][r])[..length].iter().map(|&l| l as i32).collect())
                    })
                    .collect()
            })
            .collect();
        let units =
            rows.iter().map(|u| u.iter().map(|(ids, labels)| Row { ids, labels, pack: None }).collect::<Vec<_>>());
        let batch = Ragged::build(units, self.engine.config().vocab).expect("rows");
        let micro_batches = micro.iter().map(|m| MicroBatch {
            examples: Vec::new(),
            rank: 0,
            opens_epoch: false,
            fetched: Fetched {
                num_items: m["num_items_in_batch"].as_u64().expect("N"),
                micro_batches: 3,
                leaked: false,
            },
        });
        let window =
            Window { step: self.state.step + 1, epoch_index: 0, epoch: 0.0, micro_batches: micro_batches.collect() };
        let options = PassOptions::default();
        let input = StepInput { window: &window, batch: &batch, options: &options, learning_rates: None };
        step(&self.engine, &self.rules, &mut self.state, &input).expect("step")
    }

    fn weights(&self) -> AdapterWeights {
        self.state.adapter.weights(self.engine.device()).expect("weights")
    }
}

#[test]
fn four_steps_reproduce_losses_norms_and_parameters() {
    let mut known = known(LoggedLearningRate::Used);
    for index in 0..4 {
        let output = known.step();
        for (unit, loss) in output.micro_losses.iter().enumerate() {
            let expected = known.run["micro"][index * 3 + unit]["loss_as_returned"].as_f64().expect("loss");
            let difference = (f64::from(*loss) - expected).abs();
            assert!(difference <= 2e-6, "step {} micro-batch {unit}: {loss} for {expected}", index + 1);
        }
        let logged = &known.run["log_history"][index];
        let value = |key: &str| logged[key].as_f64().expect("logged");
        assert!((output.loss - value("loss")).abs() <= 2e-6, "{} for {logged}", output.loss);
        let norm = f64::from(output.clip.norm);
        assert!((norm / value("grad_norm") - 1.0).abs() <= 2e-6, "{norm} for {logged}");
        assert_eq!(output.learning_rate_logged.to_bits(), value("learning_rate").to_bits(), "{logged}");
        let expected = tensors(&format!("params_after_step{}.safetensors", index + 1));
        for module in known.weights().modules {
            for (matrix, ours) in [("lora_A", &module.a), ("lora_B", &module.b)] {
                let theirs = &expected[&format!("{}.{matrix}", module.path)].1;
                let d = distance(ours, theirs);
                assert!(d <= 1e-6, "step {}: {} {matrix} differs by {d:e}", index + 1, module.path);
            }
        }
    }
}

#[test]
fn transformers_4_48_logs_the_same_run_rounded_and_one_learning_rate_ahead() {
    let log = json("version_logs/main_4.48.2.json");
    let mut known = known(LoggedLearningRate::Next);
    for index in 0..4 {
        let output = known.step();
        let logged = &log["log_history"][index];
        let value = |key: &str| logged[key].as_f64().expect("logged");
        assert!((output.loss - value("loss")).abs() <= 5.2e-5, "{} for {logged}", output.loss);
        assert!((f64::from(output.clip.norm) / value("grad_norm") - 1.0).abs() <= 2e-6, "{logged}");
        assert_eq!(output.learning_rate_logged.to_bits(), value("learning_rate").to_bits(), "{logged}");
    }
}

#[test]
fn the_same_bits_come_out_at_any_thread_count() {
    let digest = |threads| {
        let mut known = known(LoggedLearningRate::Used);
        let device: Arc<dyn Device> = spikeprobe::device::open("cpu", Some(threads)).expect("cpu");
        let base = Arc::new(BaseModel::open(&folder().join("tiny_llama/base")).expect("base"));
        known.engine = Engine::new(device, base, PrecisionPlan::F32).expect("engine");
        for _ in 0..4 {
            known.step();
        }
        known.state.digest(known.engine.device()).expect("digest")
    };
    let one = digest(1);
    assert_eq!(one, digest(1), "run twice");
    assert_eq!(one, digest(2), "two threads");
}
