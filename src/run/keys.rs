//! The keys that a LLaMA-Factory configuration may hold, and those whose numbers are not covered.
//!
//! Owns the list of known keys and the table of refusals (contract 1.2, less what replays have learned since).
//! Values are read in `config.rs`.

use serde_json::Value;

use super::settings::Settings;
use crate::{Error, Result};

/// Not a key of LLaMA-Factory (torchrun's business), but `--set world_size=2` must be sayable.
pub const WORLD_SIZE: &str = "world_size";

/// Fields of the dataclasses that LLaMA-Factory 0.9.2 and 0.9.5 parse a configuration into, with those of
/// transformers 4.48.2 and 5.6.0; sorted.
#[rustfmt::skip]
const KNOWN: &[&str] = &[
    "accelerator_config", "adafactor", "adam_beta1", "adam_beta2", "adam_epsilon", "adapter_folder",
    "adapter_name_or_path", "add_special_tokens", "add_tokens", "additional_target", "apollo_layerwise",
    "apollo_proj", "apollo_proj_type", "apollo_rank", "apollo_scale", "apollo_scale_front", "apollo_scale_type",
    "apollo_target", "apollo_update_interval", "asft_alpha", "audio_sampling_rate", "auto_find_batch_size",
    "average_tokens_across_devices", "badam_mask_mode", "badam_mode", "badam_start_block", "badam_switch_interval",
    "badam_switch_mode", "badam_update_ratio", "badam_verbose", "batch_eval_metrics", "bf16", "bf16_full_eval",
    "block_diag_attn", "buffer_size", "cache_dir", "chunk_size", "compute_accuracy", "compute_dtype", "cpu_infer",
    "create_new_adapter", "crop_to_patches", "cutoff_len", "data_seed", "data_shared_file_system",
    "dataloader_drop_last", "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "dataset", "dataset_dir", "ddp_backend", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "debug", "deepspeed",
    "default_system", "device_map", "disable_gradient_checkpointing", "disable_shuffling", "disable_tqdm",
    "dispatch_batches", "do_eval", "do_predict", "do_sample", "do_train", "double_quantization",
    "dpo_label_smoothing", "eaft_alpha", "early_stopping_steps", "enable_jit_checkpoint", "enable_liger_kernel",
    "enable_thinking", "enable_torch_profiler", "eval_accumulation_steps", "eval_dataset", "eval_delay",
    "eval_do_concat_batches", "eval_num_beams", "eval_on_each_dataset", "eval_on_start", "eval_steps",
    "eval_strategy", "eval_use_gather_object", "evaluation_strategy", "export_device", "export_dir",
    "export_hub_model_id", "export_legacy_format", "export_quantization_bit", "export_quantization_dataset",
    "export_quantization_maxlen", "export_quantization_nsamples", "export_size", "finetuning_type", "flash_attn",
    "fp16", "fp16_backend", "fp16_full_eval", "fp16_opt_level", "fp8", "fp8_backend",
    "fp8_enable_fsdp_float8_all_gather", "freeze_extra_modules", "freeze_language_model",
    "freeze_multi_modal_projector", "freeze_trainable_layers", "freeze_trainable_modules", "freeze_vision_tower",
    "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "full_determinism",
    "galore_layerwise", "galore_proj_type", "galore_rank", "galore_scale", "galore_target", "galore_update_interval",
    "generation_config", "generation_max_length", "generation_num_beams", "gradient_accumulation_steps",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "greater_is_better", "group_by_length",
    "half_precision_backend", "hf_hub_token", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision",
    "hub_strategy", "hub_token", "hyper_parallel_args", "ignore_data_skip", "ignore_pad_token_for_loss",
    "image_do_pan_and_scan", "image_max_pixels", "image_min_pixels", "image_resolution",
    "include_effective_tokens_per_second", "include_for_metrics", "include_inputs_for_metrics",
    "include_num_input_tokens_seen", "include_tokens_per_second", "infer_backend", "infer_dtype",
    "init_special_tokens", "interleave_probs", "jit_mode_eval", "kt_expert_checkpoint_path", "kt_force_think",
    "kt_lora_expert_intermediate_size", "kt_lora_expert_num", "kt_maxlen", "kt_mode", "kt_optimize_rule",
    "kt_use_cuda_graph", "kt_use_lora_experts", "kt_weight_path", "kto_chosen_weight", "kto_rejected_weight",
    "label_names", "label_smoothing_factor", "ld_alpha", "learning_rate", "length_column_name", "length_penalty",
    "liger_kernel_config", "load_best_model_at_end", "local_rank", "log_level", "log_level_replica",
    "log_on_each_node", "logging_dir", "logging_first_step", "logging_nan_inf_filter", "logging_steps",
    "logging_strategy", "lora_alpha", "lora_dropout", "lora_rank", "lora_target", "loraplus_lr_embedding",
    "loraplus_lr_ratio", "low_cpu_mem_usage", "lr_scheduler_kwargs", "lr_scheduler_type", "mask_history",
    "master_addr", "master_port", "max_grad_norm", "max_length", "max_new_tokens", "max_samples", "max_steps",
    "media_dir", "metric_for_best_model", "mix_strategy", "mixture_of_depths", "mode", "model_max_length",
    "model_name_or_path", "model_revision", "module_dropout", "moe_aux_loss_coef", "mp_parameters", "ms_hub_token",
    "neat_packing", "neftune_noise_alpha", "new_special_tokens", "new_special_tokens_config", "no_cuda", "num_beams",
    "num_train_epochs", "offload_folder", "oft_block_size", "oft_rank", "oft_target", "om_hub_token", "optim",
    "optim_args", "optim_target_modules", "output_dir", "overwrite_cache", "overwrite_output_dir", "packing",
    "parallelism_config", "past_index", "per_device_eval_batch_size", "per_device_train_batch_size",
    "per_gpu_eval_batch_size", "per_gpu_train_batch_size", "pissa_convert", "pissa_init", "pissa_iter",
    "placement_strategy", "plot_loss", "ppo_buffer_size", "ppo_epochs", "ppo_score_norm", "ppo_target",
    "ppo_whiten_rewards", "predict_with_generate", "prediction_loss_only", "pref_bco_weight", "pref_beta", "pref_ftx",
    "pref_loss", "preprocessing_batch_size", "preprocessing_num_workers", "preserve_thinking", "print_param_status",
    "profile_modules", "profiler_active_steps", "profiler_output_dir", "profiler_profile_memory",
    "profiler_record_shapes", "profiler_repeat", "profiler_wait_steps", "profiler_warmup_steps",
    "profiler_with_stack", "project", "pure_bf16", "push_to_hub", "push_to_hub_model_id", "push_to_hub_organization",
    "push_to_hub_token", "quantization_bit", "quantization_device_map", "quantization_method", "quantization_type",
    "ray_init_kwargs", "ray_num_workers", "ray_run_name", "ray_scope", "ray_storage_path", "ref_model",
    "ref_model_adapters", "ref_model_quantization_bit", "remove_unused_columns", "repetition_penalty", "report_to",
    "resize_vocab", "resources_per_worker", "restore_callback_states_from_checkpoint", "resume_from_checkpoint",
    "reward_model", "reward_model_adapters", "reward_model_quantization_bit", "reward_model_type", "rope_scaling",
    "run_name", "save_on_each_node", "save_only_model", "save_safetensors", "save_steps", "save_strategy",
    "save_total_limit", "seed", "sglang_config", "sglang_lora_backend", "sglang_maxlen", "sglang_mem_fraction",
    "sglang_tp_size", "shift_attn", "simpo_gamma", "skip_memory_metrics", "skip_special_tokens", "sortish_sampler",
    "split_batches", "split_special_tokens", "stage", "streaming", "swanlab_api_key", "swanlab_lark_secret",
    "swanlab_lark_webhook_url", "swanlab_logdir", "swanlab_mode", "swanlab_project", "swanlab_run_name",
    "swanlab_workspace", "temperature", "template", "tf32", "tokenized_path", "tool_format", "top_k", "top_p",
    "torch_compile", "torch_compile_backend", "torch_compile_mode", "torch_empty_cache_steps", "torchdynamo",
    "tp_size", "tpu_metrics_debug", "tpu_num_cores", "trackio_bucket_id", "trackio_space_id",
    "trackio_static_space_id", "train_from_scratch", "train_mm_proj_only", "train_on_prompt",
    "train_sampling_strategy", "trust_remote_code", "upcast_layernorm", "upcast_lmhead_output", "use_adam_mini",
    "use_apollo", "use_asft_loss", "use_audio_in_video", "use_badam", "use_cache", "use_cpu", "use_dft_loss",
    "use_dora", "use_eaft_loss", "use_fast_tokenizer", "use_galore", "use_hyper_parallel", "use_ipex", "use_kt",
    "use_kv_cache", "use_legacy_prediction_loop", "use_liger_kernel", "use_llama_pro", "use_mca", "use_mps_device",
    "use_muon", "use_reentrant_gc", "use_rslora", "use_swanlab", "use_unsloth", "use_unsloth_gc", "use_v1_kernels",
    "val_size", "video_fps", "video_max_pixels", "video_maxlen", "video_min_pixels", "video_resolution",
    "vllm_config", "vllm_enforce_eager", "vllm_gpu_util", "vllm_max_lora_rank", "vllm_maxlen", "warmup_ratio",
    "warmup_steps", "weight_decay",
];

/// Refuses unknown keys, as LLaMA-Factory does.
///
/// # Errors
/// Names the key and the nearest known one.
pub fn check_known(key: &str) -> Result<()> {
    if KNOWN.binary_search(&key).is_ok() || key == WORLD_SIZE {
        return Ok(());
    }
    let nearest = KNOWN.iter().min_by_key(|known| distance(key, known)).filter(|known| distance(key, known) <= 6);
    let error = Error::input("unknown key").at(key);
    Err(match nearest {
        Some(known) => error.next(format!("did you mean `{known}`? LLaMA-Factory itself stops at unknown keys")),
        None => error.next("remove it; LLaMA-Factory itself stops at unknown keys"),
    })
}

/// Levenshtein distance in bytes. Keys are short; anything longer than 64 bytes counts as far.
fn distance(a: &str, b: &str) -> usize {
    if a.len() > 64 {
        return usize::MAX;
    }
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// When a key's value is refused.
enum When {
    /// True, or any value but false, 0, empty or null.
    Truthy,
    /// A number other than 0.
    NonZero,
    /// Explicitly false.
    False,
    /// Anything but these words.
    NotOneOf(&'static [&'static str]),
}

/// Keys that change the numbers in ways this program does not compute: key, when, what to do.
const REFUSED: &[(&str, When, &str)] = &[
    ("stage", When::NotOneOf(&["sft"]), "only supervised fine-tuning (stage: sft) is replayed"),
    ("finetuning_type", When::NotOneOf(&["lora"]), "only LoRA (finetuning_type: lora) is replayed"),
    ("lr_scheduler_type", When::NotOneOf(SCHEDULERS), "a schedule that depends on metrics cannot be replayed"),
    (
        "optim",
        When::NotOneOf(&["adamw_torch", "adamw_torch_fused", "sgd"]),
        "adamw_torch, adamw_torch_fused and sgd are replayed",
    ),
    ("optim_args", When::Truthy, "remove it; plain adamw_torch and sgd are replayed"),
    ("optim_target_modules", When::Truthy, "remove it"),
    ("adafactor", When::Truthy, "use optim: adamw_torch"),
    ("mix_strategy", When::NotOneOf(&["concat"]), "only mix_strategy: concat keeps an order that the seed determines"),
    ("train_sampling_strategy", When::NotOneOf(&["random"]), "for rows in file order use disable_shuffling: true"),
    ("group_by_length", When::Truthy, "its order comes from a random stream that the seed does not determine"),
    (
        "quantization_bit",
        When::Truthy,
        "a quantized base is not replayed; compare against a run on the unquantized base",
    ),
    ("use_unsloth", When::Truthy, "unsloth replaces the forward pass; run once without it to compare"),
    ("use_unsloth_gc", When::Truthy, "run once without it to compare"),
    ("enable_liger_kernel", When::Truthy, "run once without it to compare"),
    ("use_liger_kernel", When::Truthy, "run once without it to compare"),
    ("use_kt", When::Truthy, "KTransformers kernels are not replayed"),
    ("use_v1_kernels", When::Truthy, "run once without it to compare"),
    ("use_mca", When::Truthy, "Megatron training is not replayed"),
    ("use_hyper_parallel", When::Truthy, "its sharded training is not replayed"),
    ("torch_compile", When::Truthy, "compiled kernels round elsewhere; run once without it to compare"),
    ("torchdynamo", When::Truthy, "compiled kernels round elsewhere; run once without it to compare"),
    ("fsdp", When::Truthy, "FSDP is not replayed; data-parallel runs with DeepSpeed or DDP are"),
    ("fp8", When::Truthy, "fp8 is not replayed"),
    ("shift_attn", When::Truthy, "S²-attention is not replayed"),
    ("mixture_of_depths", When::Truthy, "mixture-of-depths is not replayed"),
    ("moe_aux_loss_coef", When::NonZero, "mixture-of-experts models are not replayed"),
    ("train_from_scratch", When::Truthy, "the base must lie on disk"),
    ("resize_vocab", When::Truthy, "new embedding rows come from a random stream that is not replayed"),
    ("add_tokens", When::Truthy, "new tokens change the embedding; not replayed"),
    ("add_special_tokens", When::Truthy, "new tokens change the embedding; not replayed"),
    ("new_special_tokens", When::Truthy, "new tokens change the embedding; not replayed"),
    ("new_special_tokens_config", When::Truthy, "new tokens change the embedding; not replayed"),
    ("split_special_tokens", When::Truthy, "not replayed"),
    ("use_fast_tokenizer", When::False, "only fast tokenizers (tokenizer.json) are read"),
    ("additional_target", When::Truthy, "fully trained modules beside LoRA are not replayed"),
    ("create_new_adapter", When::Truthy, "merge the first adapter into the base and train from that"),
    ("use_llama_pro", When::Truthy, "not replayed"),
    ("use_dora", When::Truthy, "DoRA is not replayed"),
    ("pissa_init", When::Truthy, "PiSSA changes the base weights; not replayed"),
    ("use_galore", When::Truthy, "use optim: adamw_torch to compare"),
    ("use_apollo", When::Truthy, "use optim: adamw_torch to compare"),
    ("use_badam", When::Truthy, "use optim: adamw_torch to compare"),
    ("use_adam_mini", When::Truthy, "use optim: adamw_torch to compare"),
    ("use_muon", When::Truthy, "use optim: adamw_torch to compare"),
    ("use_dft_loss", When::Truthy, "only the plain cross-entropy is replayed"),
    ("use_asft_loss", When::Truthy, "only the plain cross-entropy is replayed"),
    ("use_eaft_loss", When::Truthy, "only the plain cross-entropy is replayed"),
    ("label_smoothing_factor", When::NonZero, "only the plain cross-entropy is replayed"),
    ("neftune_noise_alpha", When::NonZero, "its noise comes from the device's random stream"),
    ("upcast_lmhead_output", When::Truthy, "not replayed"),
    ("streaming", When::Truthy, "a streamed data set has no order that the seed determines; load it whole"),
    ("tokenized_path", When::Truthy, "name the data set itself instead of its tokenized copy"),
    ("tool_format", When::Truthy, "tool turns are not replayed"),
    ("ignore_pad_token_for_loss", When::False, "padding that counts in the loss is not replayed"),
    ("auto_find_batch_size", When::Truthy, "write the batch size that it found"),
    ("ignore_data_skip", When::Truthy, "a resume that starts its data over is not replayed"),
    ("accelerator_config", When::Truthy, "only accelerate's own defaults are replayed"),
    ("parallelism_config", When::Truthy, "only data parallelism is replayed"),
];

const SCHEDULERS: &[&str] = &[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
];

/// Refuses what would change the numbers and is not computed here.
///
/// # Errors
/// `Kind::Refused`, naming the key and what to do.
pub fn check_covered(settings: &Settings) -> Result<()> {
    for (key, when, hint) in REFUSED {
        let Some((value, _)) = settings.find(key) else { continue };
        if when.holds(&value) {
            return Err(Error::refused(format!("the value {} is not covered by a replay", settings.show(&value)))
                .at(settings.place(key))
                .next(*hint));
        }
    }
    Ok(())
}

impl When {
    fn holds(&self, value: &Value) -> bool {
        let truth = match value {
            Value::Null => return false,
            Value::Bool(b) => *b,
            Value::Number(n) => n.as_f64() != Some(0.0),
            Value::String(s) => {
                !matches!(s.trim().to_lowercase().as_str(), "" | "false" | "no" | "off" | "0" | "none" | "null")
            }
            Value::Array(items) => !items.is_empty(),
            Value::Object(items) => !items.is_empty(),
        };
        match self {
            When::Truthy => truth,
            When::NonZero => super::settings::as_float(value).map_or(truth, |x| x != 0.0),
            When::False => !truth,
            When::NotOneOf(words) => !value.as_str().is_some_and(|s| words.contains(&s.trim().to_lowercase().as_str())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_keys_are_sorted_for_the_search() {
        assert!(KNOWN.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn every_refused_key_is_a_known_key() {
        for (key, ..) in REFUSED {
            assert!(check_known(key).is_ok(), "{key}");
        }
    }
}
