//! Fixtures and small builders shared by the tests of this area.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use spikeprobe::run::*;

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A JSON file of tests/fixtures/vectors.
pub fn vector(name: &str) -> Value {
    let path = fixtures().join("vectors").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn integers(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("an integer") as u32).collect()
}

pub fn integer(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not an integer: {value}"))
}

/// sha256 of the numbers as little-endian i64, as the vectors' script hashes them.
pub fn sha256_le_i64(numbers: &[u32]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for &number in numbers {
        hash.update(i64::from(number).to_le_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The defaults of contract 1.1 (LLaMA-Factory 0.9.5), as far as batches depend on them.
pub fn config() -> TrainConfig {
    TrainConfig {
        model_name_or_path: "model".into(),
        adapter_name_or_path: None,
        lora_rank: 8,
        lora_alpha: 16.0,
        lora_dropout: 0.0,
        lora_target: vec!["all".into()],
        use_rslora: false,
        loraplus_lr_ratio: None,
        upcast_layernorm: false,
        dataset: vec!["train".into()],
        eval_dataset: Vec::new(),
        dataset_dir: "data".into(),
        template: "chatml".into(),
        cutoff_len: 2048,
        max_samples: None,
        val_size: 0.0,
        train_on_prompt: false,
        mask_history: false,
        default_system: None,
        enable_thinking: Some(true),
        disable_shuffling: false,
        dataloader_drop_last: false,
        per_device_train_batch_size: 1,
        gradient_accumulation_steps: 1,
        world_size: 1,
        average_tokens_across_devices: true,
        learning_rate: 5e-5,
        lr_scheduler_type: "linear".into(),
        lr_scheduler_kwargs: BTreeMap::new(),
        warmup_steps: 0.0,
        warmup_ratio: None,
        num_train_epochs: 3.0,
        max_steps: -1,
        max_grad_norm: 1.0,
        optim: "adamw_torch".into(),
        adam_beta1: 0.9,
        adam_beta2: 0.999,
        adam_epsilon: 1e-8,
        weight_decay: 0.0,
        seed: 42,
        data_seed: None,
        bf16: false,
        fp16: false,
        pure_bf16: false,
        tf32: false,
        use_cpu: true,
        output_dir: "out".into(),
        overwrite_output_dir: false,
        resume_from_checkpoint: None,
        deepspeed: None,
        logging_steps: 1,
        logging_first_step: false,
        logging_nan_inf_filter: true,
        save_steps: 500.0,
        save_only_model: false,
        eval_strategy: "no".into(),
        eval_steps: None,
        per_device_eval_batch_size: 8,
        do_predict: false,
        written: BTreeMap::new(),
        disagreements: Vec::new(),
        origins: BTreeMap::new(),
    }
}

/// transformers 5.6.0, accelerate 1.11, LLaMA-Factory 0.9.5.
pub fn newest() -> TrainerSemantics {
    TrainerSemantics {
        windows: WindowRule::Ceil,
        loss: LossRule::TokenMean,
        count_shifted: false,
        logged_lr: LoggedLearningRate::Used,
        rounds_loss: false,
        resume_order: ResumeOrder::Right,
        resume_restarts_count: false,
        averages_tokens: true,
        logs_unclipped_norm: true,
        skip_advances_schedule: true,
        eos_label_at_zero: false,
        splits_before_tokenizing: true,
        base_in_compute_dtype: false,
        deepspeed_divides_again: false,
    }
}

/// transformers 4.48.2, accelerate 1.2.1, LLaMA-Factory 0.9.2.
pub fn older() -> TrainerSemantics {
    TrainerSemantics {
        windows: WindowRule::FloorLeak,
        logged_lr: LoggedLearningRate::Next,
        rounds_loss: true,
        resume_restarts_count: true,
        averages_tokens: false,
        logs_unclipped_norm: false,
        skip_advances_schedule: false,
        eos_label_at_zero: true,
        splits_before_tokenizing: false,
        base_in_compute_dtype: true,
        deepspeed_divides_again: true,
        ..newest()
    }
}

pub fn version(text: &str) -> Version {
    let mut parts = text.split('.').map(|part| part.parse().expect("a version"));
    Version(parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap())
}

/// A run over a folder, for [`spikeprobe::batches::Corpus::load`].
pub fn run(root: PathBuf, config: &TrainConfig, llamafactory: &str) -> Run {
    let semantics = if version(llamafactory) < Version(0, 9, 3) { older() } else { newest() };
    Run {
        config_path: root.join("train.yaml"),
        root,
        config: config.clone(),
        versions: Versions {
            llamafactory: Some((version(llamafactory), "given by the test".into())),
            ..Versions::default()
        },
        semantics,
        log: Log::default(),
        attempts: Vec::new(),
        checkpoints: Vec::new(),
        model_type: None,
        base_dtype: None,
        remarks: Vec::new(),
    }
}
