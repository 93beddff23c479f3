//! [`TrainConfig`] from the layers of a configuration: names, defaults by version, checks of one value.

use std::path::PathBuf;

use super::settings::Settings;
use super::{Packing, TrainConfig, TrainerSemantics, Version, Versions};
use crate::{Error, Result};

impl TrainConfig {
    /// Builds the configuration of one attempt.
    ///
    /// Defaults: LLaMA-Factory's argument classes and transformers' TrainingArguments of the versions in force
    /// (contract 1.1).
    ///
    /// # Errors
    /// A value of the wrong type or out of range, a required key that is missing; the key is named.
    pub fn from_settings(mut settings: Settings, versions: &Versions, semantics: &TrainerSemantics) -> Result<Self> {
        let s = &mut settings;
        let rank = size(s, "lora_rank", 8)?;
        if rank > WIDEST {
            return Err(Error::input(format!("{rank} is more than any projection is wide"))
                .at(s.place("lora_rank"))
                .next("write the rank that the run used"));
        }
        // 0 counts as unset, too (finetuning_args.__post_init__).
        let alpha = s.float("lora_alpha", 0.0)?;
        let schedule = Schedule::read(s)?;
        let optimizer = Optimizer::read(s, versions)?;
        let data = Data::read(s)?;
        let book = Bookkeeping::read(s)?;
        let eval_strategy = s.text("evaluation_strategy", "no")?;
        let config = Self {
            model_name_or_path: required(s, "model_name_or_path")?.into(),
            adapter_name_or_path: adapter_path(s)?,
            lora_rank: rank,
            lora_alpha: if alpha == 0.0 { 2.0 * rank as f64 } else { alpha },
            lora_dropout: s.float("lora_dropout", 0.0)?,
            lora_target: or_all(s.words("lora_target")?),
            use_rslora: s.flag("use_rslora", false)?,
            loraplus_lr_ratio: s.maybe_float("loraplus_lr_ratio")?,
            upcast_layernorm: s.flag("upcast_layernorm", false)?,
            dataset: data.dataset,
            eval_dataset: data.eval_dataset,
            dataset_dir: data.dataset_dir,
            template: data.template,
            cutoff_len: data.cutoff_len,
            max_samples: data.max_samples,
            val_size: data.val_size,
            train_on_prompt: data.train_on_prompt,
            mask_history: data.mask_history,
            default_system: data.default_system,
            enable_thinking: data.enable_thinking,
            packing: data.packing,
            disable_shuffling: data.disable_shuffling,
            dataloader_drop_last: s.flag("dataloader_drop_last", false)?,
            per_device_train_batch_size: size(s, "per_device_train_batch_size", 8)?,
            gradient_accumulation_steps: size(s, "gradient_accumulation_steps", 1)?,
            world_size: size(s, super::keys::WORLD_SIZE, 1)?,
            average_tokens_across_devices: s.flag("average_tokens_across_devices", semantics.averages_tokens)?,
            learning_rate: s.float("learning_rate", 5e-5)?,
            lr_scheduler_type: schedule.kind,
            lr_scheduler_kwargs: schedule.kwargs,
            warmup_steps: schedule.warmup_steps,
            warmup_ratio: schedule.warmup_ratio,
            num_train_epochs: schedule.epochs,
            max_steps: schedule.max_steps,
            max_grad_norm: s.float("max_grad_norm", 1.0)?,
            optim: optimizer.name,
            adam_beta1: optimizer.beta1,
            adam_beta2: optimizer.beta2,
            adam_epsilon: optimizer.epsilon,
            weight_decay: optimizer.weight_decay,
            seed: s.integer("seed", 42, 0)? as u64,
            data_seed: s.maybe_integer("data_seed", 0)?.map(|seed| seed as u64),
            bf16: s.flag("bf16", false)?,
            fp16: s.flag("fp16", false)?,
            pure_bf16: s.flag("pure_bf16", false)?,
            tf32: s.flag("tf32", false)?,
            use_cpu: s.flag("use_cpu", false)? || s.flag("no_cuda", false)?,
            output_dir: book.output_dir,
            overwrite_output_dir: s.flag("overwrite_output_dir", false)?,
            resume_from_checkpoint: s.maybe_path("resume_from_checkpoint")?,
            deepspeed: s.maybe_path("deepspeed")?,
            logging_steps: book.logging_steps,
            logging_first_step: s.flag("logging_first_step", false)?,
            logging_nan_inf_filter: s.flag("logging_nan_inf_filter", true)?,
            save_steps: s.float("save_steps", 500.0)?,
            save_only_model: s.flag("save_only_model", false)?,
            eval_strategy: s.text("eval_strategy", &eval_strategy)?,
            eval_steps: s.maybe_float("eval_steps")?,
            per_device_eval_batch_size: size(s, "per_device_eval_batch_size", 8)?,
            do_predict: s.flag("do_predict", false)?,
            written: settings.written.clone(),
            disagreements: settings.disagreements(),
            origins: std::mem::take(&mut settings.origins),
        };
        config.check(&settings)?;
        Ok(config)
    }

    /// Checks what one value alone cannot show.
    fn check(&self, settings: &Settings) -> Result<()> {
        let bad = |key: &str, what: &str| {
            let next = format!("correct it, or leave {key} out for its default");
            Err(Error::input(what).at(settings.place(key)).next(next))
        };
        if self.bf16 && self.fp16 {
            return bad("fp16", "bf16 and fp16 cannot both be true; transformers refuses this");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return bad("lora_dropout", "expected a probability from 0 to below 1");
        }
        if self.learning_rate < 0.0 {
            return bad("learning_rate", "expected a number of at least 0");
        }
        if self.val_size < 0.0 {
            return bad("val_size", "expected a fraction or a number of rows");
        }
        for (key, beta) in [("adam_beta1", self.adam_beta1), ("adam_beta2", self.adam_beta2)] {
            if !(0.0..1.0).contains(&beta) {
                return bad(key, "expected a number from 0 to below 1; torch refuses others");
            }
        }
        for (key, value) in [("weight_decay", self.weight_decay), ("adam_epsilon", self.adam_epsilon)] {
            if value < 0.0 {
                return bad(key, "expected a number of at least 0; torch refuses others");
            }
        }
        if self.num_train_epochs <= 0.0 && self.max_steps <= 0 {
            return bad("num_train_epochs", "neither num_train_epochs nor max_steps is positive: nothing to train");
        }
        Ok(())
    }
}

/// No model that is covered has a projection with more inputs or outputs, and a typing error must not fill the memory.
const WIDEST: usize = 1 << 17;

/// A whole number of at least 1 that addresses memory or counts rows; 2^31 − 1 at most.
fn size(s: &mut Settings, key: &str, default: i64) -> Result<usize> {
    let value = s.integer(key, default, 1)?;
    usize::try_from(value)
        .ok()
        .filter(|&v| v <= i32::MAX as usize)
        .ok_or_else(|| Error::input(format!("{value} is too large")).at(s.place(key)))
}

fn required(s: &mut Settings, key: &str) -> Result<String> {
    s.maybe_text(key)?
        .ok_or_else(|| Error::input("this key is missing").at(s.place(key)).next(format!("add `{key}: …`")))
}

fn or_all(targets: Vec<String>) -> Vec<String> {
    if targets.is_empty() { vec!["all".to_owned()] } else { targets }
}

fn adapter_path(s: &mut Settings) -> Result<Option<PathBuf>> {
    let paths = s.words("adapter_name_or_path")?;
    if paths.len() > 1 {
        // LLaMA-Factory merges all but the last into the base.
        return Err(Error::refused("several adapters are not covered by a replay")
            .at(s.place("adapter_name_or_path"))
            .next("merge all but the last into the base model first"));
    }
    Ok(paths.into_iter().next().map(PathBuf::from))
}

struct Schedule {
    kind: String,
    kwargs: std::collections::BTreeMap<String, serde_json::Value>,
    warmup_steps: f64,
    warmup_ratio: Option<f64>,
    epochs: f64,
    max_steps: i64,
}

impl Schedule {
    fn read(s: &mut Settings) -> Result<Self> {
        Ok(Self {
            kind: s.text("lr_scheduler_type", "linear")?.to_lowercase(),
            kwargs: s.mapping("lr_scheduler_kwargs")?,
            warmup_steps: s.float("warmup_steps", 0.0)?,
            // 4.x knows no "unset": its default is 0.0, which means the same.
            warmup_ratio: s.maybe_float("warmup_ratio")?,
            epochs: s.float("num_train_epochs", 3.0)?,
            max_steps: s.integer("max_steps", -1, -1)?,
        })
    }
}

struct Optimizer {
    name: String,
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
}

impl Optimizer {
    fn read(s: &mut Settings, versions: &Versions) -> Result<Self> {
        // transformers ≥ 4.54 takes the fused kernel where torch ≥ 2.8 (contract 1.1); an unknown torch counts as new.
        let fused = versions.transformers_at_least(4, 54)
            && versions.torch.as_ref().is_none_or(|(torch, _)| *torch >= Version(2, 8, 0));
        Ok(Self {
            name: s.text("optim", if fused { "adamw_torch_fused" } else { "adamw_torch" })?.to_lowercase(),
            beta1: s.float("adam_beta1", 0.9)?,
            beta2: s.float("adam_beta2", 0.999)?,
            epsilon: s.float("adam_epsilon", 1e-8)?,
            weight_decay: s.float("weight_decay", 0.0)?,
        })
    }
}

struct Data {
    dataset: Vec<String>,
    eval_dataset: Vec<String>,
    dataset_dir: PathBuf,
    template: String,
    cutoff_len: usize,
    max_samples: Option<usize>,
    val_size: f64,
    train_on_prompt: bool,
    mask_history: bool,
    default_system: Option<String>,
    enable_thinking: Option<bool>,
    packing: Packing,
    disable_shuffling: bool,
}

impl Data {
    fn read(s: &mut Settings) -> Result<Self> {
        let dataset = s.words("dataset")?;
        if dataset.is_empty() {
            return Err(Error::input("this key is missing").at(s.place("dataset")).next("add `dataset: …`"));
        }
        let template = s.maybe_text("template")?.ok_or_else(|| {
            Error::refused("no template is named; LLaMA-Factory would derive one from the tokenizer")
                .at(s.place("template"))
                .next("write the template that the run's console showed")
        })?;
        Ok(Self {
            dataset,
            eval_dataset: s.words("eval_dataset")?,
            dataset_dir: s.text("dataset_dir", "data")?.into(),
            template,
            cutoff_len: size(s, "cutoff_len", 2048)?,
            max_samples: s.maybe_integer("max_samples", 1)?.map(|n| n as usize),
            val_size: s.float("val_size", 0.0)?,
            train_on_prompt: s.flag("train_on_prompt", false)?,
            mask_history: s.flag("mask_history", false)?,
            default_system: s.maybe_text("default_system")?,
            // An explicit null differs from the default (contract 2.4).
            enable_thinking: match s.written.get("enable_thinking") {
                Some(serde_json::Value::Null) => s.maybe_flag("enable_thinking", None)?,
                _ => s.maybe_flag("enable_thinking", Some(true))?,
            },
            packing: packing(s)?,
            disable_shuffling: s.flag("disable_shuffling", false)?,
        })
    }
}

/// neat_packing switches packing on (data_args.__post_init__).
fn packing(s: &mut Settings) -> Result<Packing> {
    let (plain, neat) = (s.flag("packing", false)?, s.flag("neat_packing", false)?);
    Ok(match (plain, neat) {
        (_, true) => Packing::Neat,
        (true, false) => Packing::Plain,
        (false, false) => Packing::Off,
    })
}

struct Bookkeeping {
    output_dir: PathBuf,
    logging_steps: usize,
}

impl Bookkeeping {
    fn read(s: &mut Settings) -> Result<Self> {
        let logging = s.float("logging_steps", 500.0)?;
        if logging <= 0.0 {
            return Err(Error::input("expected a positive number")
                .at(s.place("logging_steps"))
                .next("write the number of steps between two lines of the log"));
        }
        Ok(Self {
            output_dir: required(s, "output_dir")?.into(),
            // A fraction of max_steps is resolved by the log's own spacing; 1 is the finest that it can be.
            logging_steps: if logging < 1.0 { 1 } else { logging as usize },
        })
    }
}
