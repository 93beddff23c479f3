//! What lies on disk → [`Run`]: configuration, versions, log, attempts, checkpoints.
//!
//! Reads and validates; computes nothing. Pickles are parsed, never executed.

mod adapter;
mod attempts;
mod checkpoint;
mod config;
mod entry;
mod evidence;
mod find;
pub mod json;
mod keys;
mod log;
mod open;
mod optimizer_file;
pub mod patch;
pub mod pickle;
mod semantics;
mod settings;
pub mod state_file;
pub mod torch_file;
mod versions;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use checkpoint::read_training_args;
pub use evidence::*;
pub use semantics::*;

/// A fine-tuning run as it lies on disk. Handed to every later stage; immutable.
#[derive(Debug, Clone)]
pub struct Run {
    /// Relative paths of the configuration resolve against this folder.
    pub root: PathBuf,
    /// The YAML or JSON file the run was started with.
    pub config_path: PathBuf,
    /// Configuration of the last attempt; earlier ones are in [`Run::attempts`].
    pub config: TrainConfig,
    pub versions: Versions,
    pub semantics: TrainerSemantics,
    pub log: Log,
    /// Fresh starts and resumes in the order they happened; at least one.
    pub attempts: Vec<Attempt>,
    /// Ascending by step.
    pub checkpoints: Vec<Checkpoint>,
    /// `model_type` and dtype of the base model's config.json; `None` where there is no such file.
    pub model_type: Option<String>,
    pub base_dtype: Option<String>,
    pub vocab_size: Option<u64>,
    /// What was noticed while reading and did not stop it: a file that was left out, an assumption.
    pub remarks: Vec<String>,
}

/// Where a value came from; shown to the user beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Default,
    Config,
    Override,
    TrainingArgs,
    /// Inferred; the text says from what.
    Evidence(String),
}

/// The keys of a LLaMA-Factory SFT run that determine its numbers, with the defaults of the version in force.
#[derive(Debug, Clone)]
pub struct TrainConfig {
    // model and adapter
    pub model_name_or_path: PathBuf,
    pub adapter_name_or_path: Option<PathBuf>,
    pub lora_rank: usize,
    /// Default 2 × rank (LLaMA-Factory finetuning_args.__post_init__).
    pub lora_alpha: f64,
    pub lora_dropout: f64,
    /// Module names, or `["all"]`.
    pub lora_target: Vec<String>,
    pub use_rslora: bool,
    pub loraplus_lr_ratio: Option<f64>,
    pub upcast_layernorm: bool,
    // data
    pub dataset: Vec<String>,
    pub eval_dataset: Vec<String>,
    pub dataset_dir: PathBuf,
    pub template: String,
    pub cutoff_len: usize,
    pub max_samples: Option<usize>,
    pub val_size: f64,
    pub train_on_prompt: bool,
    pub mask_history: bool,
    pub default_system: Option<String>,
    pub enable_thinking: Option<bool>,
    pub packing: Packing,
    pub disable_shuffling: bool,
    pub dataloader_drop_last: bool,
    // step
    pub per_device_train_batch_size: usize,
    pub gradient_accumulation_steps: usize,
    pub world_size: usize,
    pub average_tokens_across_devices: bool,
    pub learning_rate: f64,
    pub lr_scheduler_type: String,
    pub lr_scheduler_kwargs: BTreeMap<String, serde_json::Value>,
    pub warmup_steps: f64,
    pub warmup_ratio: Option<f64>,
    pub num_train_epochs: f64,
    /// Negative: not set.
    pub max_steps: i64,
    pub max_grad_norm: f64,
    pub optim: String,
    pub adam_beta1: f64,
    pub adam_beta2: f64,
    pub adam_epsilon: f64,
    pub weight_decay: f64,
    pub seed: u64,
    pub data_seed: Option<u64>,
    // precision
    pub bf16: bool,
    pub fp16: bool,
    pub pure_bf16: bool,
    pub tf32: bool,
    /// `use_cpu` (or the older `no_cuda`).
    pub use_cpu: bool,
    // bookkeeping
    pub output_dir: PathBuf,
    pub overwrite_output_dir: bool,
    pub resume_from_checkpoint: Option<PathBuf>,
    pub deepspeed: Option<PathBuf>,
    pub logging_steps: usize,
    pub logging_first_step: bool,
    pub logging_nan_inf_filter: bool,
    pub save_steps: f64,
    pub save_only_model: bool,
    pub eval_strategy: String,
    pub eval_steps: Option<f64>,
    pub per_device_eval_batch_size: usize,
    pub do_predict: bool,
    /// Every key the file held, as written, for lint and for patching (key → value).
    pub written: BTreeMap<String, serde_json::Value>,
    /// Keys whose value in the file differs from what training_args.bin recorded: key, file, recorded. The
    /// recorded one is in force.
    pub disagreements: Vec<(String, serde_json::Value, serde_json::Value)>,
    /// Where each field above came from; a field that is absent here is a default.
    pub origins: BTreeMap<String, Origin>,
}

/// Whether examples share rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    #[default]
    Off,
    /// `packing`: later examples of a row attend to the earlier ones.
    Plain,
    /// `neat_packing`: they do not.
    Neat,
}

/// `major.minor.patch` of a Python package; orders naturally.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

/// Library versions of the run, each with its origin. `None`: nothing tells.
#[derive(Debug, Clone, Default)]
pub struct Versions {
    pub llamafactory: Option<(Version, String)>,
    pub transformers: Option<(Version, String)>,
    pub accelerate: Option<(Version, String)>,
    pub peft: Option<(Version, String)>,
    pub torch: Option<(Version, String)>,
}

/// The rows that trainer_state.json and trainer_log.jsonl agree on, attempt by attempt, in file order.
#[derive(Debug, Clone, Default)]
pub struct Log {
    pub rows: Vec<LogRow>,
    pub eval_rows: Vec<EvalRow>,
    /// `total_steps` of the last attempt, as logged.
    pub total_steps: Option<u64>,
    /// Metrics of the eval rows of trainer_log.jsonl alone (contract 9 tells it from trainer_state.json).
    pub eval_rows_of_trainer_log: usize,
    pub has_trainer_log: bool,
    pub has_trainer_state: bool,
    /// Lines that could not be read (half-written last line, foreign text): `file:line`, reason.
    pub unreadable: Vec<(String, String)>,
}

/// One logged optimizer step (or the mean over a logging window that ends at it). Values as logged.
#[derive(Debug, Clone, PartialEq)]
pub struct LogRow {
    /// Index into [`Run::attempts`].
    pub attempt: usize,
    pub step: u64,
    /// Steps averaged in `loss`: 1 at logging_steps 1.
    pub window: u64,
    pub epoch: Option<f64>,
    pub loss: Option<f64>,
    /// Pre-clip, of the last step of the window. Only trainer_state.json has it.
    pub grad_norm: Option<f64>,
    pub learning_rate: Option<f64>,
    pub total_steps: Option<u64>,
    /// `file:line` or `file: log_history[i]`.
    pub source: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct EvalRow {
    pub step: u64,
    pub epoch: Option<f64>,
    /// Metric name as logged (`eval_loss`, `eval_<dataset>_loss`) → value.
    pub metrics: BTreeMap<String, f64>,
}

/// One process of the trainer: a fresh start or a resume.
#[derive(Debug, Clone)]
pub struct Attempt {
    pub config: TrainConfig,
    /// Step of the checkpoint it resumed from; `None`: from the initial adapter.
    pub resumed_from: Option<u64>,
    /// First and last step it logged.
    pub first_step: u64,
    pub last_step: u64,
    pub total_steps: Option<u64>,
}

/// One `checkpoint-K` folder. Readers of its files are methods in `run/checkpoint.rs`.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    pub step: u64,
    pub dir: PathBuf,
    pub has_optimizer: bool,
    pub has_scheduler: bool,
    pub has_scaler: bool,
    /// Attempt that wrote it.
    pub attempt: usize,
}

/// torch's CPU generator as rng_state.pth keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GeneratorFile {
    /// What it was seeded with: the run's seed.
    pub seed: u64,
    /// mt19937's words, and the index of the one that the next number is made of.
    pub state: Vec<u32>,
    pub next: usize,
    /// The file holds GPUs' generators as well: they drew whatever was drawn on a GPU.
    pub on_gpu: bool,
}

/// LoRA matrices by module path (`layers.0.self_attn.q_proj`), each (A [r, in], B [out, r]), f32, row-major.
/// Order: registration order of the model (contract 6.5), not file order.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterWeights {
    pub modules: Vec<AdapterModule>,
    /// Dtype in which the file stores them ("F32", "BF16", "F16").
    pub stored: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct AdapterModule {
    pub path: String,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub rank: usize,
    pub fan_in: usize,
    pub fan_out: usize,
}

/// Adam moments (or SGD momentum) per adapter matrix, in optimizer order: A then B of each module (contract 6.5).
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerFile {
    pub states: Vec<MatrixState>,
    /// Learning rate of the next step, per group (contract 7.2).
    pub group_lr: Vec<f64>,
    /// Constants of the groups that hold tensors: they are the same in all of them.
    pub constants: OptimizerConstants,
}

/// What `param_groups` says besides learning rates; `None` where this optimizer has no such constant.
/// torch.optim.Optimizer.load_state_dict takes all of them from the file, whatever the new configuration says.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct OptimizerConstants {
    pub betas: Option<[f64; 2]>,
    pub eps: Option<f64>,
    pub weight_decay: Option<f64>,
    pub fused: Option<bool>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct MatrixState {
    pub step: f64,
    pub exp_avg: Vec<f32>,
    pub exp_avg_sq: Vec<f32>,
}

/// scheduler.pt.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerFile {
    pub base_lrs: Vec<f64>,
    pub last_epoch: u64,
    pub last_lr: Vec<f64>,
}

/// scaler.pt: torch.amp.GradScaler.state_dict().
#[derive(Debug, Clone, PartialEq)]
pub struct ScalerFile {
    pub scale: f64,
    pub growth_factor: f64,
    pub backoff_factor: f64,
    pub growth_interval: u64,
    pub growth_tracker: u64,
}
