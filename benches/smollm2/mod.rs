//! A model of SmolLM2-135M's width with random weights, an adapter of rank 8 on every linear, and a window of eight
//! micro-batches of one row of 91 tokens: what a step costs does not depend on what the weights say.

use std::path::Path;
use std::time::Instant;

use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use spikeprobe::device::{DType, Device, noise};
use spikeprobe::model::{Adapter, ModelConfig, Projection, Ragged, Row, select};
use spikeprobe::run::{AdapterModule, AdapterWeights};

pub const UNITS: usize = 8;
const TOKENS: usize = 91;
const RANK: usize = 8;

fn config(layers: usize) -> serde_json::Value {
    serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"],
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
        "tie_word_embeddings": true, "hidden_act": "silu", "torch_dtype": "bfloat16",
    })
}

/// So many of its thirty layers, its whole vocabulary, in bf16 in a safetensors file.
pub fn write_model(dir: &Path, layers: usize) {
    let json = config(layers);
    std::fs::write(dir.join("config.json"), json.to_string()).expect("config.json");
    let config = ModelConfig::from_json(&json).expect("a configuration");
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![config.vocab, config.hidden]),
        ("model.norm.weight".to_owned(), vec![config.hidden]),
    ];
    for layer in 0..config.layers {
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            shapes.push((format!("model.layers.{layer}.{norm}.weight"), vec![config.hidden]));
        }
        for projection in Projection::ALL {
            let (fan_in, fan_out) = projection.shape(&config);
            shapes.push((format!("model.{}.weight", projection.path(layer)), vec![fan_out, fan_in]));
        }
    }
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .zip(0..)
        .map(|((_, shape), seed)| {
            let (size, centre) = if shape.len() == 1 { (0.3, 1.0) } else { (1.5 / (shape[1] as f32).sqrt(), 0.0) };
            let value = |i| bf16::from_f32(centre + size * noise::symmetric(seed, 0, i));
            (0..shape.iter().product::<usize>() as u64).flat_map(|i| value(i).to_le_bytes()).collect()
        })
        .collect();
    let view = |shape: &Vec<usize>, data| TensorView::new(Dtype::BF16, shape.clone(), data).expect("a tensor");
    let views = shapes.iter().zip(&bytes).map(|((name, shape), data)| (name.as_str(), view(shape, data)));
    std::fs::write(dir.join("model.safetensors"), serialize(views, None).expect("weights")).expect("weights");
}

/// Rank 8 on every linear, f32.
pub fn adapter(device: &dyn Device, config: &ModelConfig) -> Adapter {
    let targets = ["all".to_owned()];
    let draw = |n: usize, seed| (0..n).map(|i| 0.1 * noise::symmetric(seed, 1, i as u64)).collect();
    let modules =
        select(&targets, config).expect("all linears").into_iter().zip(0..).map(|((layer, projection), i)| {
            let (fan_in, fan_out) = projection.shape(config);
            let (a, b) = (draw(RANK * fan_in, 2 * i), draw(fan_out * RANK, 2 * i + 1));
            AdapterModule { path: projection.path(layer), a, b, rank: RANK, fan_in, fan_out }
        });
    let weights = AdapterWeights { modules: modules.collect(), stored: "F32".into() };
    Adapter::new(device, config, &targets, &weights, 2.0, DType::F32).expect("an adapter")
}

/// Rows of random ids, the second half of each labelled.
pub fn window(vocab: usize) -> Ragged {
    let rows: Vec<(Vec<u32>, Vec<i32>)> = (0..UNITS as u64)
        .map(|row| {
            let id = |i: usize| (noise::unit(row, 2, i as u64) * vocab as f32) as u32 % vocab as u32;
            let ids: Vec<u32> = (0..TOKENS).map(id).collect();
            let labels = ids.iter().enumerate().map(|(i, &id)| if i < TOKENS / 2 { -100 } else { id as i32 });
            (ids.clone(), labels.collect())
        })
        .collect();
    Ragged::build(rows.iter().map(|(ids, labels)| [Row { ids, labels, pack: None }]), vocab).expect("rows")
}

/// Whether `name` was typed on the command line, or nothing of `all` was.
pub fn asked_for(name: &str, all: &[&str]) -> bool {
    let typed = |name: &str| std::env::args().any(|argument| argument == name);
    typed(name) || !all.iter().any(|name| typed(name))
}

/// Runs the two in turns, so that whatever else the machine does meets both, and prints the shortest time of each and
/// what the second costs more: of the shortest (another process on the machine only ever adds time), and in the median
/// of the turns.
pub fn compare(name: &str, turns: usize, alone: &mut dyn FnMut(), with: &mut dyn FnMut()) {
    let seconds = |run: &mut dyn FnMut()| {
        let began = Instant::now();
        run();
        began.elapsed().as_secs_f64()
    };
    alone();
    with();
    // Each goes first as often as the other.
    let turn = |turn: usize| match turn % 2 {
        0 => (seconds(alone), seconds(with)),
        _ => {
            let second = seconds(with);
            (seconds(alone), second)
        }
    };
    let turns: Vec<(f64, f64)> = (0..turns).map(turn).collect();
    let shortest = |of: fn(&(f64, f64)) -> f64| turns.iter().map(of).fold(f64::INFINITY, f64::min);
    let (a, b) = (shortest(|t| t.0), shortest(|t| t.1));
    let mut ratios: Vec<f64> = turns.iter().map(|t| t.1 / t.0).collect();
    ratios.sort_by(f64::total_cmp);
    let (of_shortest, median) = (100.0 * (b / a - 1.0), 100.0 * (ratios[ratios.len() / 2] - 1.0));
    println!(
        "{name:<28} alone {:8.2} ms  with {:8.2} ms  {of_shortest:+.1} % (median of turns {median:+.1} %)",
        1e3 * a,
        1e3 * b
    );
}
