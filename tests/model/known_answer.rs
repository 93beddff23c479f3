//! vectors/tiny_llama: four optimizer steps of transformers 5.6.0, f32 (contract 11).

use std::sync::Arc;

use spikeprobe::device::DType;
use spikeprobe::model::{Adapter, BaseModel, Engine, Gradients, PassOptions, PrecisionPlan, Ragged, Row};
use spikeprobe::run::{AdapterModule, AdapterWeights};

use super::support::{all, cpu, read_safetensors, relative_l2, vectors};

/// Adapter matrices of one of the fixture's files, in the order of run.json's parameter list.
fn matrices(file: &str, order: &[String]) -> Vec<Vec<f32>> {
    let mut tensors = read_safetensors(&vectors().join("tiny_llama").join(file));
    order.iter().map(|name| tensors.remove(name).unwrap()).collect()
}

fn weights(matrices: &[Vec<f32>], order: &[String]) -> AdapterWeights {
    let module = |(pair, names): (&[Vec<f32>], &[String])| {
        let path = names[0].strip_prefix("base_model.model.model.").unwrap();
        let path = path.strip_suffix(".lora_A.default.weight").unwrap().to_owned();
        let (a, b) = (pair[0].clone(), pair[1].clone());
        AdapterModule { path, rank: 4, fan_in: a.len() / 4, fan_out: b.len() / 4, a, b }
    };
    let modules = matrices.chunks(2).zip(order.chunks(2)).map(module).collect();
    AdapterWeights { modules, stored: "F32".into() }
}

/// Padded rows of run.json → rows without padding.
fn window(micro: &[serde_json::Value]) -> Ragged {
    let unpadded: Vec<Vec<(Vec<u32>, Vec<i32>)>> = micro
        .iter()
        .map(|m| {
            let rows = |key: &str| serde_json::from_value::<Vec<Vec<i32>>>(m[key].clone()).unwrap();
            let (ids, mask, labels) = (rows("input_ids"), rows("attention_mask"), rows("labels"));
            let length = |row: usize| mask[row].iter().sum::<i32>() as usize;
            let row = |i: usize| {
                let ids = ids[i][..length(i)].iter().map(|&id| id as u32).collect();
                (ids, labels[i][..length(i)].to_vec())
            };
            (0..ids.len()).map(row).collect()
        })
        .collect();
    let units =
        unpadded.iter().map(|u| u.iter().map(|(ids, labels)| Row { ids, labels, pack: None }).collect::<Vec<_>>());
    Ragged::build(units, 64).unwrap()
}

#[test]
fn losses_gradients_and_norms_of_four_recorded_steps() {
    let dir = vectors().join("tiny_llama");
    let run: serde_json::Value = serde_json::from_slice(&std::fs::read(dir.join("run.json")).unwrap()).unwrap();
    let order: Vec<String> = serde_json::from_value(run["optimizer_param_order"].clone()).unwrap();
    let micro = run["micro"].as_array().unwrap();
    let base = Arc::new(BaseModel::open(&dir.join("base")).unwrap());
    let engine = Engine::new(cpu(2), Arc::clone(&base), PrecisionPlan::F32).unwrap();
    for step in 1..=4 {
        let before = if step == 1 { "adapter_init".into() } else { format!("params_after_step{}", step - 1) };
        let before = weights(&matrices(&format!("{before}.safetensors"), &order), &order);
        let adapter = Adapter::new(engine.device(), &base.config, &all(), &before, 2.0, DType::F32).unwrap();
        let units = &micro[(step - 1) * 3..step * 3];
        let batch = window(units);
        let n = units[0]["num_items_in_batch"].as_f64().unwrap() as f32;
        let mut gradients = Gradients::zeros(engine.device(), &adapter).unwrap();
        let out = engine.pass(&adapter, &batch, &[1.0 / n; 3], &PassOptions::default(), &mut gradients).unwrap();
        for (unit, recorded) in out.units.iter().zip(units) {
            let (loss, expected) = (f64::from(unit.loss_sum / n), recorded["loss_as_returned"].as_f64().unwrap());
            assert!((loss - expected).abs() <= 2e-6, "step {step}: loss {loss}, recorded {expected}");
            assert_eq!(unit.label_tokens as u64, recorded["valid_shifted"].as_u64().unwrap());
        }
        let recorded = matrices(&format!("grads_preclip_step{step}.safetensors"), &order);
        let mut squares = 0.0;
        for ((tensor, recorded), name) in gradients.tensors.iter().zip(&recorded).zip(&order) {
            let values = engine.device().download(tensor).unwrap();
            squares += values.iter().map(|&g| f64::from(g) * f64::from(g)).sum::<f64>();
            let error = relative_l2(&values, recorded);
            assert!(error <= 2e-6, "step {step}, {name}: relative error {error:e}");
        }
        let (norm, logged) = (squares.sqrt(), run["log_history"][step - 1]["grad_norm"].as_f64().unwrap());
        assert!((norm / logged - 1.0).abs() <= 2e-6, "step {step}: grad_norm {norm}, logged {logged}");
    }
}
