//! The explicit backward pass against candle's autograd, and against itself: threads, chunks, recomputation.

use std::sync::Arc;

use serde_json::{Value, json};
use spikeprobe::device::DType;
use spikeprobe::model::{
    Adapter, BaseModel, Engine, Gradients, Memory, Oracle, PassOptions, PassOutput, PrecisionPlan, Ragged,
};
use spikeprobe::run::AdapterWeights;

use super::support::{all, cpu, random_adapter, random_rows, relative_l2, write_model};

const SCALING: f64 = 1.5;

fn config(model_type: &str, heads: usize, kv_heads: usize, extra: &Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": null,
    });
    let (all, extra) = (config.as_object_mut().unwrap(), extra.as_object().unwrap());
    all.extend(extra.iter().map(|(k, v)| (k.clone(), v.clone())));
    config
}

/// Every architecture the engine covers, by name.
fn architectures() -> Vec<(&'static str, Value)> {
    let llama3 = json!({"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}});
    vec![
        ("llama, untied, groups of 2", config("llama", 4, 2, &json!({}))),
        ("llama, tied, one kv head", config("llama", 4, 1, &json!({"tie_word_embeddings": true}))),
        ("llama with every bias", config("llama", 4, 4, &json!({"attention_bias": true, "mlp_bias": true}))),
        ("llama3 rope, groups of 3", config("llama", 6, 2, &llama3)),
        ("mistral, window of 5", config("mistral", 4, 2, &json!({"sliding_window": 5}))),
        ("qwen2, tied", config("qwen2", 4, 2, &json!({"tie_word_embeddings": true}))),
        ("qwen2, window in layer 1", {
            let windows = json!({"use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1});
            config("qwen2", 3, 1, &windows)
        }),
        ("qwen3, qk-norm and biases", config("qwen3", 4, 2, &json!({"attention_bias": true}))),
    ]
}

struct Case {
    _dir: tempfile::TempDir,
    base: Arc<BaseModel>,
    weights: AdapterWeights,
    targets: Vec<String>,
}

impl Case {
    fn new(config: &Value, targets: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let parsed = write_model(dir.path(), config, 7);
        let base = Arc::new(BaseModel::open(dir.path()).unwrap());
        Self { base, weights: random_adapter(&parsed, targets, 3, 11), targets: targets.to_vec(), _dir: dir }
    }

    /// Output and gradients of one pass.
    fn pass(&self, plan: PrecisionPlan, batch: &Ragged, memory: Memory, threads: usize) -> (PassOutput, Vec<Vec<f32>>) {
        let engine = Engine::new(cpu(threads), Arc::clone(&self.base), plan).unwrap();
        let device = engine.device();
        let adapter =
            Adapter::new(device, &self.base.config, &self.targets, &self.weights, SCALING, plan.adapter).unwrap();
        let mut gradients = Gradients::zeros(device, &adapter).unwrap();
        let options = PassOptions { memory, ..PassOptions::default() };
        let out = engine.pass(&adapter, batch, &seeds(batch), &options, &mut gradients).unwrap();
        (out, gradients.tensors.iter().map(|t| device.download(t).unwrap()).collect())
    }
}

fn seeds(batch: &Ragged) -> Vec<f32> {
    (0..batch.units()).map(|unit| 0.02 + 0.01 * unit as f32).collect()
}

/// Three micro-batches of unlike rows: one row, two rows, and one whose second row is a single token.
fn batch() -> Ragged {
    random_rows(61, &[&[13], &[7, 21], &[9, 1]], 3)
}

const WHOLE: Memory = Memory::Chunks { tokens: 1000, recompute: false };

fn assert_agrees(name: &str, case: &Case) {
    let batch = batch();
    let oracle = Oracle::open(&case.base.dir, DType::F32).unwrap();
    let expected = oracle.run(&case.weights, SCALING, &batch, &seeds(&batch)).unwrap();
    let (out, gradients) = case.pass(PrecisionPlan::F32, &batch, WHOLE, 2);
    for (unit, expected) in out.units.iter().zip(&expected.loss_sums) {
        assert!((unit.loss_sum / expected - 1.0).abs() < 2e-6, "{name}: loss {} {expected}", unit.loss_sum);
    }
    for (index, (got, want)) in gradients.iter().zip(&expected.gradients).enumerate() {
        let error = relative_l2(got, want);
        let path = &case.weights.modules[index / 2].path;
        assert!(error <= 1e-5, "{name}, {path} {}: relative error {error:e}", ["A", "B"][index % 2]);
        assert!(want.iter().any(|&g| g != 0.0), "{name}, {path}: the reference gradient is zero");
    }
}

#[test]
fn gradients_agree_with_candles_autograd_for_every_architecture() {
    for (name, config) in architectures() {
        assert_agrees(name, &Case::new(&config, &all()));
    }
}

#[test]
fn gradients_agree_when_only_some_linears_are_adapted() {
    let config = &architectures()[0].1;
    for targets in [vec!["q_proj", "v_proj"], vec!["down_proj"], vec!["layers.1.self_attn.k_proj"]] {
        let targets: Vec<String> = targets.into_iter().map(String::from).collect();
        assert_agrees(&format!("{targets:?}"), &Case::new(config, &targets));
    }
}

fn plans() -> [(&'static str, PrecisionPlan); 4] {
    let bf16 = PrecisionPlan { base: DType::BF16, ..PrecisionPlan::F32 };
    [
        ("f32", PrecisionPlan::F32),
        ("bf16 autocast", PrecisionPlan { autocast: Some(DType::BF16), ..bf16 }),
        ("fp16 autocast over bf16", PrecisionPlan { autocast: Some(DType::F16), ..bf16 }),
        ("bf16 base without autocast", bf16),
    ]
}

#[test]
fn chunks_recomputation_and_threads_change_no_bit() {
    for (name, config) in architectures() {
        let case = Case::new(&config, &all());
        let batch = batch();
        for (precision, plan) in plans() {
            let whole = case.pass(plan, &batch, WHOLE, 1);
            let chunks = |tokens, recompute| Memory::Chunks { tokens, recompute };
            for memory in [WHOLE, chunks(1, false), chunks(30, false), chunks(1000, true), chunks(1, true)] {
                for threads in [1, 2] {
                    let again = case.pass(plan, &batch, memory, threads);
                    assert!(whole == again, "{name}, {precision}, {memory:?}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn a_micro_batchs_numbers_do_not_depend_on_its_neighbours() {
    let case = Case::new(&architectures()[0].1, &all());
    let rows = [13, 21];
    let alone = case.pass(PrecisionPlan::F32, &random_rows(61, &[&rows], 5), WHOLE, 1).0.units[0];
    let beside = case.pass(PrecisionPlan::F32, &random_rows(61, &[&rows, &[8], &[31]], 5), WHOLE, 1).0.units[0];
    assert_eq!(alone, beside);
}

#[test]
fn per_micro_batch_norms_are_those_of_separate_passes() {
    let case = Case::new(&architectures()[0].1, &all());
    let batch = random_rows(61, &[&[13], &[7, 21]], 3);
    let together = case.pass(PrecisionPlan::F32, &batch, WHOLE, 1).0;
    let first = random_rows(61, &[&[13]], 3);
    let (alone, gradients) = case.pass(PrecisionPlan::F32, &first, WHOLE, 1);
    let squares: f64 = gradients.iter().flatten().map(|&g| f64::from(g) * f64::from(g)).sum();
    assert!((together.units[0].grad_norm / squares.sqrt() - 1.0).abs() < 1e-6);
    assert_eq!(together.units[0].grad_norm, alone.units[0].grad_norm);
}
