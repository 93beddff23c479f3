//! `inspect RUN --baseline RUN2`: what differs between two runs, ranked by what can explain a different curve.

use std::collections::HashMap;
use std::path::Path;

use serde::Serialize;

use super::hashes;
use crate::batches::{Corpus, Example, RowId};
use crate::run::{LogRow, Run, TrainConfig};

/// One difference. Smaller ranks explain more.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    pub what: String,
    pub run: String,
    pub baseline: String,
    pub rank: u8,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub differences: Vec<Difference>,
    /// First step whose loss differs by more than the logs' rounding.
    pub parts_at: Option<u64>,
    /// Steps that both logs have.
    pub common_steps: usize,
}

/// Keys by rank: what decides numbers first, bookkeeping last. Keys that are not listed have rank 2.
const RANKS: &[(u8, &[&str])] = &[
    (
        0,
        &[
            "learning_rate",
            "lr_scheduler_type",
            "max_grad_norm",
            "optim",
            "gradient_accumulation_steps",
            "bf16",
            "fp16",
            "pure_bf16",
            "lora_alpha",
            "adam_beta2",
            "warmup_steps",
            "warmup_ratio",
            "lr_scheduler_kwargs",
        ],
    ),
    (4, &["output_dir", "save_steps", "overwrite_output_dir", "logging_steps", "dataset_dir", "save_only_model"]),
];

/// Compares two runs.
pub fn compare(run: &Run, baseline: &Run) -> Comparison {
    let mut differences = Vec::new();
    let mut add = |what: &str, a: String, b: String, rank: u8| {
        if a != b {
            differences.push(Difference { what: what.to_owned(), run: a, baseline: b, rank });
        }
    };
    for ((key, a), (_, b)) in resolved(&run.config).into_iter().zip(resolved(&baseline.config)) {
        let rank = RANKS.iter().find(|(_, keys)| keys.contains(&key)).map_or(2, |(rank, _)| *rank);
        add(key, a, b, rank);
    }
    let versions =
        |r: &Run| r.versions.list().iter().map(|(n, v, _)| format!("{n} {v}")).collect::<Vec<_>>().join(", ");
    add("versions", versions(run), versions(baseline), 1);
    let attempts = |r: &Run| r.attempts.iter().map(|a| format!("{:?}", a.resumed_from)).collect::<Vec<_>>().join(", ");
    add("attempts (resumed from)", attempts(run), attempts(baseline), 1);
    add("dataset files", hashes::data(run), hashes::data(baseline), 1);
    add("base model config.json", hashes::base_config(run), hashes::base_config(baseline), 1);
    add("base weights", hashes::base_weights(run), hashes::base_weights(baseline), 1);
    add("adapter at the start", hashes::first_adapter(run), hashes::first_adapter(baseline), 1);
    if let Some((step, a, b)) = hashes::first_other_adapter(run, baseline) {
        // A consequence of what differs above, or of what no file shows: it explains least.
        add(&format!("adapter at checkpoint-{step}"), a, b, 5);
    }
    differences.sort_by_key(|d| d.rank);
    let (parts_at, common_steps) = part(&run.log.rows, &baseline.log.rows);
    Comparison { differences, parts_at, common_steps }
}

/// First common step whose losses differ by more than 1e-4 (the rounding of a 4.x log), and how many are common.
fn part(a: &[LogRow], b: &[LogRow]) -> (Option<u64>, usize) {
    let other: HashMap<u64, f64> = b.iter().filter_map(|r| Some((r.step, r.loss?))).collect();
    let pairs: Vec<(u64, f64, f64)> = a.iter().filter_map(|r| Some((r.step, r.loss?, *other.get(&r.step)?))).collect();
    // NaN against a number differs; NaN against NaN does not.
    let differ = |&&(_, x, y): &&(u64, f64, f64)| {
        if x.is_nan() || y.is_nan() { x.is_nan() != y.is_nan() } else { (x - y).abs() > 1e-4 }
    };
    (pairs.iter().find(differ).map(|p| p.0), pairs.len())
}

/// Rows whose tokens or labels differ, for two runs over the same data sets: `None` where all are the same.
pub fn rows(run: &Corpus, baseline: &Corpus) -> Option<Difference> {
    let other: HashMap<RowId, &Example> = baseline.train.iter().map(|e| (e.row, e)).collect();
    let name = |row: RowId| {
        let set = run.datasets.get(usize::from(row.dataset)).map_or("?", |d| d.name.as_str());
        format!("{set}:{}", row.row)
    };
    let differ =
        |e: &&Example| other.get(&e.row).is_none_or(|o| (&e.input_ids, &e.labels) != (&o.input_ids, &o.labels));
    let mut changed: Vec<RowId> = run.train.iter().filter(differ).map(|e| e.row).collect();
    changed.sort_unstable();
    let missing = baseline.train.len() as i64 - (run.train.len() as i64);
    if changed.is_empty() && missing == 0 {
        return None;
    }
    let mut shown: Vec<String> = changed.iter().take(5).map(|&row| name(row)).collect();
    if changed.len() > shown.len() {
        shown.push("…".into());
    }
    Some(Difference {
        what: "training rows (tokens, labels)".into(),
        run: format!("{} of {} differ: {}", changed.len(), run.train.len(), shown.join(", ")),
        baseline: format!("{} rows", baseline.train.len()),
        rank: 1,
    })
}

/// Every key that decides numbers, as in force: name, value.
pub fn resolved(c: &TrainConfig) -> Vec<(&'static str, String)> {
    let path = |p: &Path| p.display().to_string();
    let maybe = |p: &Option<std::path::PathBuf>| p.as_deref().map_or("none".into(), path);
    let or_none = |v: Option<String>| v.unwrap_or_else(|| "none".into());
    vec![
        ("model_name_or_path", path(&c.model_name_or_path)),
        ("adapter_name_or_path", maybe(&c.adapter_name_or_path)),
        ("lora_rank", c.lora_rank.to_string()),
        ("lora_alpha", c.lora_alpha.to_string()),
        ("lora_dropout", c.lora_dropout.to_string()),
        ("lora_target", c.lora_target.join(",")),
        ("use_rslora", c.use_rslora.to_string()),
        ("loraplus_lr_ratio", or_none(c.loraplus_lr_ratio.map(|v| v.to_string()))),
        ("upcast_layernorm", c.upcast_layernorm.to_string()),
        ("dataset", c.dataset.join(",")),
        ("eval_dataset", c.eval_dataset.join(",")),
        ("dataset_dir", path(&c.dataset_dir)),
        ("template", c.template.clone()),
        ("cutoff_len", c.cutoff_len.to_string()),
        ("max_samples", or_none(c.max_samples.map(|v| v.to_string()))),
        ("val_size", c.val_size.to_string()),
        ("train_on_prompt", c.train_on_prompt.to_string()),
        ("mask_history", c.mask_history.to_string()),
        ("default_system", or_none(c.default_system.clone())),
        ("enable_thinking", or_none(c.enable_thinking.map(|v| v.to_string()))),
        ("disable_shuffling", c.disable_shuffling.to_string()),
        ("dataloader_drop_last", c.dataloader_drop_last.to_string()),
        ("per_device_train_batch_size", c.per_device_train_batch_size.to_string()),
        ("gradient_accumulation_steps", c.gradient_accumulation_steps.to_string()),
        ("world_size", c.world_size.to_string()),
        ("learning_rate", format!("{:e}", c.learning_rate)),
        ("lr_scheduler_type", c.lr_scheduler_type.clone()),
        ("lr_scheduler_kwargs", serde_json::to_string(&c.lr_scheduler_kwargs).unwrap_or_default()),
        ("warmup_steps", c.warmup_steps.to_string()),
        ("warmup_ratio", or_none(c.warmup_ratio.map(|v| v.to_string()))),
        ("num_train_epochs", c.num_train_epochs.to_string()),
        ("max_steps", c.max_steps.to_string()),
        ("max_grad_norm", c.max_grad_norm.to_string()),
        ("optim", c.optim.clone()),
        ("adam_beta1", c.adam_beta1.to_string()),
        ("adam_beta2", c.adam_beta2.to_string()),
        ("adam_epsilon", format!("{:e}", c.adam_epsilon)),
        ("weight_decay", c.weight_decay.to_string()),
        ("seed", c.seed.to_string()),
        ("data_seed", or_none(c.data_seed.map(|v| v.to_string()))),
        ("bf16", c.bf16.to_string()),
        ("fp16", c.fp16.to_string()),
        ("pure_bf16", c.pure_bf16.to_string()),
        ("tf32", c.tf32.to_string()),
        ("deepspeed", maybe(&c.deepspeed)),
        ("logging_steps", c.logging_steps.to_string()),
        ("save_steps", c.save_steps.to_string()),
        ("save_only_model", c.save_only_model.to_string()),
        ("eval_strategy", c.eval_strategy.clone()),
        ("eval_steps", or_none(c.eval_steps.map(|v| v.to_string()))),
        ("per_device_eval_batch_size", c.per_device_eval_batch_size.to_string()),
        ("overwrite_output_dir", c.overwrite_output_dir.to_string()),
        ("output_dir", path(&c.output_dir)),
    ]
}
