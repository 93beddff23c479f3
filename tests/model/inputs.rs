//! Broken model folders: every error names the file and the tensor or key.

use std::path::Path;

use serde_json::{Value, json};
use spikeprobe::model::{BaseModel, ModelConfig, PrecisionPlan, Ragged, Row, select};

use super::support::{cpu, random_weights, write_model, write_safetensors};

fn config() -> Value {
    json!({"model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": true})
}

fn message(dir: &Path) -> String {
    BaseModel::open(dir).expect_err("must be refused").to_string()
}

fn assert_mentions(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not mention {part:?}");
    }
}

#[test]
fn a_truncated_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config(), 1);
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    for length in [0, 5, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..length]).unwrap();
        assert_mentions(&message(dir.path()), &["model.safetensors", "try:"]);
    }
}

#[test]
fn a_missing_tensor_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let parsed = write_model(dir.path(), &config(), 1);
    let mut weights = random_weights(&parsed, 1);
    weights.retain(|(name, _, _)| name != "model.layers.1.mlp.up_proj.weight");
    write_safetensors(&dir.path().join("model.safetensors"), &weights);
    assert_mentions(&message(dir.path()), &["model.layers.1.mlp.up_proj.weight", "missing"]);
}

#[test]
fn a_wrong_shape_is_named_with_both_shapes() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), &config(), 1);
    let mut other = config();
    other["intermediate_size"] = json!(16);
    std::fs::write(dir.path().join("config.json"), other.to_string()).unwrap();
    assert_mentions(&message(dir.path()), &["model.layers.0.mlp.", "[12, 8]", "[16, 8]"]);
}

#[test]
fn shards_are_found_through_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let parsed = write_model(dir.path(), &config(), 1);
    let whole = BaseModel::open(dir.path()).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert_mentions(&message(dir.path()), &["model.safetensors.index.json"]);
    let weights = random_weights(&parsed, 1);
    let mut map = serde_json::Map::new();
    for (index, part) in weights.chunks(9).enumerate() {
        let name = format!("model-{index}.safetensors");
        write_safetensors(&dir.path().join(&name), part);
        map.extend(part.iter().map(|(tensor, _, _)| (tensor.clone(), json!(name))));
    }
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::write(&index, json!({"weight_map": map}).to_string()).unwrap();
    let sharded = BaseModel::open(dir.path()).unwrap();
    let device = cpu(1);
    for ((name, a), (_, b)) in whole.tensors().zip(sharded.tensors()) {
        assert_eq!(device.download(a).unwrap(), device.download(b).unwrap(), "{name}");
    }
    std::fs::remove_file(dir.path().join("model-1.safetensors")).unwrap();
    assert_mentions(&message(dir.path()), &["model-1.safetensors"]);
    std::fs::write(&index, json!({"weight_map": {"x": "../x.safetensors"}}).to_string()).unwrap();
    assert_mentions(&message(dir.path()), &["../x.safetensors", "outside"]);
}

#[test]
fn a_link_kept_as_text_is_followed_and_an_lfs_pointer_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (real, linked) = (dir.path().join("real"), dir.path().join("linked"));
    std::fs::create_dir(&real).unwrap();
    std::fs::create_dir(&linked).unwrap();
    write_model(&real, &config(), 1);
    std::fs::copy(real.join("config.json"), linked.join("config.json")).unwrap();
    std::fs::write(linked.join("model.safetensors"), "../real/model.safetensors").unwrap();
    assert_eq!(BaseModel::open(&linked).unwrap().tensors().count(), BaseModel::open(&real).unwrap().tensors().count());
    std::fs::write(linked.join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert_mentions(&message(&linked), &["model.safetensors", "git lfs pull"]);
}

#[test]
fn weights_that_are_not_finite_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let parsed = write_model(dir.path(), &config(), 1);
    let mut weights = random_weights(&parsed, 1);
    let broken = weights.iter_mut().find(|(name, _, _)| name == "model.layers.0.mlp.gate_proj.weight").unwrap();
    broken.2[3] = f32::NAN;
    broken.2[4] = f32::INFINITY;
    write_safetensors(&dir.path().join("model.safetensors"), &weights);
    let found = BaseModel::open(dir.path()).unwrap().nonfinite(&*cpu(1)).unwrap();
    assert_eq!(found, [("model.layers.0.mlp.gate_proj.weight".to_owned(), 2)]);
}

#[test]
fn what_is_not_covered_is_refused_by_name() {
    for (key, value, parts) in [
        ("model_type", json!("gemma"), ["model_type", "gemma"]),
        ("hidden_act", json!("gelu"), ["hidden_act", "gelu"]),
        ("attention_dropout", json!(0.1), ["attention_dropout", "dropout"]),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), ["rope_type", "yarn"]),
        ("dtype", json!("float8_e4m3fn"), ["dtype", "float8_e4m3fn"]),
        ("quantization_config", json!({"bits": 4}), ["quantization_config", "quantized"]),
        ("num_hidden_layers", json!("two"), ["num_hidden_layers", "two"]),
        ("num_key_value_heads", json!(3), ["num_key_value_heads", "multiple"]),
    ] {
        let mut json = config();
        json[key] = value;
        let error = ModelConfig::from_json(&json).expect_err("must be refused").to_string();
        assert_mentions(&error, &parts);
    }
    let parsed = ModelConfig::from_json(&config()).unwrap();
    let error = select(&["lm_head".to_owned()], &parsed).expect_err("must be refused").to_string();
    assert_mentions(&error, &["lora_target", "lm_head"]);
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_with_its_place() {
    let row = |ids: &'static [u32], labels: &'static [i32]| Row { ids, labels, pack: None };
    let error = Ragged::build([vec![row(&[1, 2], &[-100, 2]), row(&[1, 11], &[-100, -100])]], 11).unwrap_err();
    assert_mentions(&error.to_string(), &["micro-batch 0", "row 1", "token id 11"]);
    let error = Ragged::build([vec![row(&[1, 2], &[-100, 12])]], 11).unwrap_err();
    assert_mentions(&error.to_string(), &["token id 12"]);
    let error = Ragged::build([vec![row(&[], &[])]], 11).unwrap_err();
    assert_mentions(&error.to_string(), &["no tokens"]);
}

#[test]
fn a_plan_the_trainer_refuses_is_refused() {
    let plan = PrecisionPlan { base: spikeprobe::device::DType::BF16, upcast_norm: true, ..PrecisionPlan::F32 };
    assert_mentions(&plan.check().unwrap_err().to_string(), &["upcast_layernorm"]);
}
