//! The initial adapter as a function of the seed (contract 4.1).

use sha2::{Digest, Sha256};
use spikeprobe::device::DType;
use spikeprobe::model::{ModelConfig, initial_weights};

use super::support::{all, read_safetensors, vectors};

#[test]
fn tiny_llamas_initial_adapter_follows_from_seed_42() {
    let dir = vectors().join("tiny_llama");
    let config = ModelConfig::open(&dir.join("base")).unwrap();
    let drawn = initial_weights(&config, &all(), 4, 42, DType::F32).unwrap();
    let recorded = read_safetensors(&dir.join("adapter_init.safetensors"));
    assert_eq!(2 * drawn.modules.len(), recorded.len());
    for module in &drawn.modules {
        let matrix = |ab: &str| &recorded[&format!("base_model.model.model.{}.lora_{ab}.default.weight", module.path)];
        assert_eq!(&module.a, matrix("A"), "{}", module.path);
        assert_eq!(&module.b, matrix("B"), "{}", module.path);
    }
}

#[test]
fn first_matrix_of_other_seeds_and_shapes() {
    let vectors: serde_json::Value =
        serde_json::from_slice(&std::fs::read(vectors().join("lora_init.json")).unwrap()).unwrap();
    let cases = vectors["cases"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap();
        // A one-layer model whose q_proj has the case's shape.
        let config = ModelConfig::from_json(&serde_json::json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": number("in_features"), "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": number("out_features"),
            "max_position_embeddings": 8,
        }))
        .unwrap();
        let digest = |base: DType| {
            let targets = ["q_proj".to_owned()];
            let drawn = initial_weights(&config, &targets, number("r") as usize, number("seed"), base).unwrap();
            let bytes: Vec<u8> = drawn.modules[0].a.iter().flat_map(|x| x.to_le_bytes()).collect();
            Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect::<String>()
        };
        assert_eq!(digest(DType::F32), case["A_sha256_f32"].as_str().unwrap());
        assert_eq!(digest(DType::BF16), case["A_sha256_after_bf16_roundtrip"].as_str().unwrap());
    }
}
