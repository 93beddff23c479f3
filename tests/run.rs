//! Readers: good files, broken files, generated garbage.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use spikeprobe::device::DType;
use spikeprobe::run::state_file::{TrainerLog, TrainerState};
use spikeprobe::run::{
    AdapterWeights, Checkpoint, LoggedLearningRate, LossRule, Origin, Run, TrainerSemantics, Version, Versions,
    WindowRule, json, pickle::Pickle, read_training_args,
};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn checkpoint(step: u64) -> Checkpoint {
    let found = Checkpoint::list(&fixture("vectors/tiny_llama")).unwrap();
    found.into_iter().find(|c| c.step == step).unwrap()
}

/// A run folder with this YAML (model, data and paths filled in), log and state.
pub struct Folder(pub tempfile::TempDir);

pub const BASIS: &str =
    "stage: sft\nfinetuning_type: lora\nmodel_name_or_path: model\ndataset: a\ntemplate: llama3\noutput_dir: out\n";

impl Folder {
    pub fn new(yaml: &str) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        folder.write("train.yaml", &format!("{BASIS}{yaml}"));
        folder
    }
    pub fn write(&self, name: &str, text: &str) -> &Self {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
        self
    }
    pub fn copy(&self, from: &str, to: &str) -> &Self {
        let path = self.0.path().join(to);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::copy(fixture(from), path).unwrap();
        self
    }
    pub fn open(&self) -> spikeprobe::Result<Run> {
        self.open_with(&[])
    }
    pub fn open_with(&self, set: &[(&str, &str)]) -> spikeprobe::Result<Run> {
        let set: Vec<_> = set.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        Run::open(self.0.path(), self.0.path(), &set, &[])
    }
}

/// Lines of trainer_log.jsonl: step, total_steps, loss, seconds.
pub fn log_lines(rows: &[(u64, u64, f64, u64)]) -> String {
    rows.iter()
        .map(|(step, total, loss, s)| {
            format!(
                "{{\"current_steps\": {step}, \"total_steps\": {total}, \"loss\": {loss}, \"lr\": 0.001, \
                 \"elapsed_time\": \"0:00:{s:02}\"}}\n"
            )
        })
        .collect()
}

#[test]
fn numbers_written_as_pyyaml_text_are_numbers() {
    let run = Folder::new("learning_rate: 1e-4\nadam_epsilon: '1e-6'\nmax_samples: 1_000\nbf16: yes\n").open().unwrap();
    assert_eq!(run.config.learning_rate, 1e-4);
    assert_eq!(run.config.adam_epsilon, 1e-6);
    assert_eq!(run.config.max_samples, Some(1000));
    assert!(run.config.bf16);
    assert_eq!(run.config.origins.get("learning_rate"), Some(&Origin::Config));
    assert!(!run.config.origins.contains_key("weight_decay"), "a default has no origin");
}

#[test]
fn defaults_are_those_of_the_version() {
    let folder = Folder::new("lora_rank: 16\n");
    let new = Run::open(folder.0.path(), folder.0.path(), &[], &[]).unwrap();
    assert_eq!(new.config.lora_alpha, 32.0);
    assert_eq!(new.config.optim, "adamw_torch_fused");
    assert!(new.config.average_tokens_across_devices);
    let given = [("transformers".to_string(), "4.48.2".to_string())];
    let old = Run::open(folder.0.path(), folder.0.path(), &[], &given).unwrap();
    assert_eq!(old.config.optim, "adamw_torch");
    assert!(!old.config.average_tokens_across_devices);
    assert_eq!(old.versions.llamafactory.as_ref().unwrap().0, Version(0, 9, 2));
}

#[test]
fn an_unknown_key_names_the_nearest_known_one_and_the_line() {
    let error = Folder::new("learning_rat: 1e-4\n").open().unwrap_err().to_string();
    assert!(
        error.contains("train.yaml:7") && error.contains("learning_rat") && error.contains("`learning_rate`"),
        "{error}"
    );
}

#[test]
fn keys_that_change_the_numbers_are_refused_by_name() {
    for (yaml, key) in [
        ("quantization_bit: 4\n", "quantization_bit"),
        ("streaming: true\n", "streaming"),
        ("use_dora: true\n", "use_dora"),
        ("optim: lion_32bit\n", "optim"),
        ("neftune_noise_alpha: 5\n", "neftune_noise_alpha"),
        ("lr_scheduler_type: reduce_lr_on_plateau\n", "lr_scheduler_type"),
        ("use_fast_tokenizer: false\n", "use_fast_tokenizer"),
        ("rope_scaling: linear\n", "rope_scaling"),
    ] {
        let error = Folder::new(yaml).open().unwrap_err();
        assert_eq!(error.kind, spikeprobe::error::Kind::Refused, "{error}");
        assert!(error.to_string().contains(key) && error.next.is_some(), "{error}");
    }
    for yaml in [
        "lora_dropout: 0.1\n",
        "deepspeed: ds_z3.json\n",
        "optim: sgd\n",
        "packing: true\n",
        "neat_packing: true\n",
        "quantization_bit: null\n",
    ] {
        assert!(Folder::new(yaml).open().is_ok(), "{yaml}");
    }
    assert_eq!(Folder::new("").open_with(&[("world_size", "2")]).unwrap().config.world_size, 2);
}

#[test]
fn wrong_values_name_the_key() {
    for (yaml, key) in [
        ("learning_rate: fast\n", "learning_rate"),
        ("lora_rank: 0\n", "lora_rank"),
        ("lora_rank: 2.5\n", "lora_rank"),
        ("seed: -1\n", "seed"),
        ("adam_beta2: 1.0\n", "adam_beta2"),
        ("learning_rate: .nan\n", "learning_rate"),
        ("bf16: true\nfp16: true\n", "fp16"),
        ("gradient_accumulation_steps: 99999999999\n", "gradient_accumulation_steps"),
    ] {
        let error = Folder::new(yaml).open().unwrap_err().to_string();
        assert!(error.contains(key), "{yaml}: {error}");
    }
}

#[test]
fn a_folder_needs_one_configuration() {
    let folder = Folder::new("");
    std::fs::rename(folder.0.path().join("train.yaml"), folder.0.path().join("a.yaml")).unwrap();
    assert!(folder.open().is_ok());
    folder.write("b.yaml", BASIS);
    let error = folder.open().unwrap_err().to_string();
    assert!(error.contains("a.yaml, b.yaml"), "{error}");
    folder.write("train.yaml", BASIS);
    assert!(folder.open().is_ok(), "train.yaml is preferred");
}

#[test]
fn bare_nan_and_infinity_are_numbers_and_text_stays_text() {
    let value: serde_json::Value =
        json::parse(r#"{"a": NaN, "b": [-Infinity, Infinity, 1e-3], "c": "NaN \" Infinity", "d\"NaN": 1}"#).unwrap();
    assert!(json::float(&value["a"]).unwrap().is_nan());
    assert_eq!(json::float(&value["b"][0]), Some(f64::NEG_INFINITY));
    assert_eq!(json::float(&value["b"][1]), Some(f64::INFINITY));
    assert_eq!(value["c"], "NaN \" Infinity");
    assert_eq!(value["d\"NaN"], 1);
    // Last bit of a learning rate: 17 digits must come back exactly.
    assert_eq!(json::float(&json::parse("0.0025000000000000014").unwrap()), Some(0.0025000000000000014));
}

#[test]
fn a_half_written_last_line_is_reported_and_the_rest_read() {
    let folder = Folder::new("logging_steps: 1\n");
    folder.write(
        "out/trainer_log.jsonl",
        &(log_lines(&[(1, 9, 3.0, 1), (2, 9, 2.0, 2)]) + "{\"current_steps\": 3, \"lo"),
    );
    let run = folder.open().unwrap();
    assert_eq!(run.log.rows.len(), 2);
    assert_eq!(run.log.unreadable.len(), 1);
    assert!(run.log.unreadable[0].0.ends_with("trainer_log.jsonl:3"));
}

#[test]
fn attempts_are_cut_where_steps_go_back_totals_change_or_the_clock_restarts() {
    let first = [(1, 4, 3.0, 1), (2, 4, 2.0, 2), (3, 4, 1.5, 3)];
    for (second, resumed, why) in [
        (vec![(1, 4, 3.0, 4), (2, 4, 2.0, 5)], None, "a fresh start"),
        (vec![(3, 4, 1.6, 4), (4, 4, 1.2, 5)], Some(2), "steps go back to a checkpoint"),
        (vec![(4, 8, 1.2, 4), (5, 8, 1.1, 5)], Some(3), "more epochs"),
        (vec![(4, 4, 1.2, 0)], Some(3), "the clock restarts"),
    ] {
        let folder = Folder::new("logging_steps: 1\n");
        folder.write("out/trainer_log.jsonl", &log_lines(&[first.to_vec(), second.clone()].concat()));
        let run = folder.open().unwrap();
        assert_eq!(run.attempts.len(), 2, "{why}");
        assert_eq!(run.attempts[0].resumed_from, None, "{why}");
        assert_eq!(run.attempts[1].resumed_from, resumed, "{why}");
        assert_eq!(run.attempts[1].first_step, second[0].0, "{why}");
        assert_eq!(run.log.rows.last().unwrap().attempt, 1, "{why}");
    }
}

#[test]
fn grad_norm_goes_only_to_the_attempt_whose_losses_the_state_file_has() {
    let folder = Folder::new("logging_steps: 1\n");
    folder.write("out/trainer_log.jsonl", &log_lines(&[(1, 2, 3.0, 1), (2, 2, 2.0, 2), (2, 2, 2.5, 0)]));
    let row = |step, loss, norm| {
        format!("{{\"step\": {step}, \"loss\": {loss}, \"learning_rate\": 0.001, \"grad_norm\": {norm}}}")
    };
    let history = [row(1, "3.0", "7.0"), row(2, "2.5", "NaN")].join(",");
    folder.write(
        "out/trainer_state.json",
        &format!("{{\"global_step\": 2, \"max_steps\": 2, \"log_history\": [{history}]}}"),
    );
    let run = folder.open().unwrap();
    let norms: Vec<_> = run.log.rows.iter().map(|r| r.grad_norm).collect();
    assert_eq!(norms[0], Some(7.0));
    assert_eq!(norms[1], None, "the lost attempt's step 2");
    assert!(norms[2].unwrap().is_nan());
}

#[test]
fn logging_windows_are_counted_from_the_resume() {
    let folder = Folder::new("logging_steps: 10\nresume_from_checkpoint: out/checkpoint-25\n");
    let rows = [(10, 60, 3.0, 1), (20, 60, 2.0, 2), (30, 60, 1.5, 0), (40, 60, 1.4, 1)];
    folder.write("out/trainer_log.jsonl", &log_lines(&rows));
    let run = folder.open().unwrap();
    assert_eq!(run.attempts[1].resumed_from, Some(25));
    assert_eq!(run.log.rows.iter().map(|r| r.window).collect::<Vec<_>>(), [10, 10, 5, 10]);
}

#[test]
fn training_args_are_read_and_win_over_an_edited_configuration() {
    let args = read_training_args(&fixture("run/training_args_4.48.2.bin")).unwrap();
    assert_eq!(args["learning_rate"], 0.001);
    assert_eq!(args["lr_scheduler_type"], "cosine");
    assert_eq!(args["num_processes"], 1);
    let folder = Folder::new("learning_rate: 5e-5\nlogging_steps: 1\n");
    folder.copy("run/training_args_5.6.0.bin", "out/training_args.bin");
    let run = folder.open().unwrap();
    assert_eq!(run.config.learning_rate, 0.008);
    assert_eq!(run.config.origins["learning_rate"], Origin::TrainingArgs);
    assert_eq!(run.config.disagreements[0].0, "learning_rate");
    let run = folder.open_with(&[("learning_rate", "1e-5")]).unwrap();
    assert_eq!(run.config.learning_rate, 1e-5, "--set wins");
}

#[test]
fn versions_are_inferred_from_what_each_leaves_behind() {
    for (file, least, below, left) in [
        (
            "run/training_args_4.48.2.bin",
            Version(4, 46, 0),
            Version(4, 51, 0),
            "; any from 4.46.0 to before 4.51.0 fits",
        ),
        ("run/training_args_5.6.0.bin", Version(5, 0, 0), Version(6, 0, 0), "; any from 5.0.0 on fits"),
    ] {
        let folder = Folder::new("");
        folder.copy(file, "out/training_args.bin");
        let (version, why) = folder.open().unwrap().versions.transformers.unwrap();
        assert!(version >= least && version < below, "{file}: {version} {why}");
        assert!(why.starts_with("inferred") && why.ends_with(left), "{why}");
    }
    let folder = Folder::new("");
    folder.write("versions.json", "{\"transformers\": \"4.47.1\", \"torch\": \"2.5.1+cu124\"}");
    let versions = folder.open().unwrap().versions;
    assert_eq!(versions.transformers.unwrap(), (Version(4, 47, 1), "versions.json".to_owned()));
    assert_eq!(versions.torch.unwrap().0, Version(2, 5, 1));
}

#[test]
fn the_trainer_is_chosen_by_version_and_model_type() {
    let of = |tf: &str, model| {
        let given = [("transformers".to_owned(), tf.to_owned())];
        let versions = Versions::resolve(&given, None, &Default::default()).unwrap();
        TrainerSemantics::of(&versions, Some(model), "adamw_torch")
    };
    assert_eq!(of("4.45.2", "llama").loss, LossRule::MeanOverAccumulation);
    assert_eq!(of("4.47.1", "mistral").loss, LossRule::MeanUndivided);
    assert_eq!(of("4.47.1", "qwen2").loss, LossRule::TokenMean);
    assert_eq!(of("4.48.2", "mistral").loss, LossRule::TokenMean);
    assert_eq!(of("4.45.2", "llama").windows, WindowRule::AcrossEpochs);
    assert_eq!(of("4.51.3", "llama").windows, WindowRule::FloorLeak);
    assert_eq!(of("4.52.0", "llama").windows, WindowRule::Ceil);
    assert_eq!(of("4.50.3", "llama").logged_lr, LoggedLearningRate::Next);
    assert_eq!(of("4.51.0", "llama").logged_lr, LoggedLearningRate::Used);
    assert!(of("4.57.1", "llama").rounds_loss && !of("5.0.0", "llama").rounds_loss);
}

#[test]
fn optimizer_state_is_in_registration_order_and_bit_exact() {
    let checkpoint = checkpoint(4);
    let adapter = checkpoint.adapter().unwrap();
    assert_eq!(adapter.modules[1].path, "layers.0.self_attn.k_proj");
    assert_eq!(adapter.stored, "F32");
    let optimizer = checkpoint.optimizer(&adapter).unwrap();
    let bytes = std::fs::read(fixture("vectors/tiny_llama/adam_after_step4.safetensors")).unwrap();
    let truth = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = truth.tensor(name).unwrap_or_else(|_| panic!("{name} of {:?}", truth.names())).data().to_vec();
        data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
    };
    for (module, states) in adapter.modules.iter().zip(optimizer.states.chunks_exact(2)) {
        for (side, state) in ["A", "B"].iter().zip(states) {
            let name = format!("base_model.model.model.{}.lora_{side}.default.weight", module.path);
            assert_eq!(state.exp_avg, floats(&format!("{name}.exp_avg")), "{name}");
            assert_eq!(state.exp_avg_sq, floats(&format!("{name}.exp_avg_sq")), "{name}");
            assert_eq!(state.step, 4.0);
        }
    }
}

#[test]
fn the_small_files_of_a_checkpoint_are_read() {
    let checkpoint = checkpoint(2);
    let generator = checkpoint.generator(0, 1).unwrap().unwrap();
    assert_eq!((generator.seed, generator.state.len(), generator.on_gpu), (42, 624, false));
    let scheduler = checkpoint.scheduler().unwrap();
    assert_eq!((scheduler.last_epoch, scheduler.base_lrs[0]), (2, 0.01));
    let state = checkpoint.trainer_state().unwrap();
    assert_eq!((state.global_step, state.rows.len(), state.max_steps), (2, 2, Some(4)));
    assert!(!checkpoint.has_scaler && checkpoint.scaler().is_err());
    let scaler = spikeprobe::run::ScalerFile::read(&fixture("run/scaler.pt")).unwrap();
    assert_eq!((scaler.scale, scaler.growth_interval), (4096.0, 2000));
}

#[test]
fn an_optimizer_of_another_adapter_is_refused() {
    let checkpoint = checkpoint(2);
    let mut adapter = checkpoint.adapter().unwrap();
    adapter.modules[3].fan_in += 1;
    let error = checkpoint.optimizer(&adapter).unwrap_err().to_string();
    assert!(error.contains("o_proj") && error.contains("not of the same run"), "{error}");
    adapter.modules.pop();
    assert!(checkpoint.optimizer(&adapter).is_err());
}

#[test]
fn every_truncation_of_a_checkpoint_file_is_an_error_that_names_it() {
    let good = fixture("vectors/tiny_llama/checkpoint-2");
    let adapter = AdapterWeights::read(&good).unwrap();
    for name in ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"] {
        let bytes = std::fs::read(good.join(name)).unwrap();
        for keep in [0, 1, 7, bytes.len() / 3, bytes.len() / 2, bytes.len() - 2] {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path().join("checkpoint-2");
            std::fs::create_dir(&dir).unwrap();
            std::fs::write(dir.join(name), &bytes[..keep]).unwrap();
            let broken = Checkpoint::list(folder.path()).unwrap().remove(0);
            let error = match name {
                "adapter_model.safetensors" => broken.adapter().map(drop),
                "optimizer.pt" => broken.optimizer(&adapter).map(drop),
                "scheduler.pt" => broken.scheduler().map(drop),
                "rng_state.pth" => broken.generator(0, 1).map(drop),
                _ => broken.trainer_state().map(drop),
            };
            let text = error.expect_err(name).to_string();
            assert!(text.contains(name), "{text}");
        }
    }
}

#[test]
fn fp16_on_a_cpu_counts_only_with_a_scaler() {
    let folder = Folder::new("fp16: true\nuse_cpu: true\n");
    let plan = folder.open().unwrap().precision().unwrap();
    assert_eq!(plan.plan.autocast, None);
    folder.copy("run/scaler.pt", "out/checkpoint-2/scaler.pt");
    folder.copy(
        "vectors/tiny_llama/checkpoint-2/adapter_model.safetensors",
        "out/checkpoint-2/adapter_model.safetensors",
    );
    let plan = folder.open().unwrap().precision().unwrap();
    assert_eq!((plan.plan.autocast, plan.plan.loss_scaling), (Some(DType::F16), true));
    assert!(plan.reasons[0].contains("scaler.pt"));
}

#[test]
fn older_factories_load_the_base_in_the_compute_dtype() {
    for (versions, yaml, base) in [
        ("{\"llamafactory\": \"0.9.2\", \"transformers\": \"4.48.2\"}", "bf16: true\n", DType::BF16),
        ("{\"llamafactory\": \"0.9.2\", \"transformers\": \"4.48.2\"}", "", DType::F16),
        ("{\"llamafactory\": \"0.9.5\", \"transformers\": \"5.6.0\"}", "bf16: true\n", DType::F32),
    ] {
        let folder = Folder::new(yaml);
        folder
            .write("versions.json", versions)
            .write("model/config.json", "{\"model_type\": \"llama\", \"torch_dtype\": \"float32\"}");
        assert_eq!(folder.open().unwrap().precision().unwrap().plan.base, base, "{versions} {yaml}");
    }
}

#[test]
fn a_short_pickle_that_stands_for_more_values_than_memory_holds_is_cut() {
    // Six lists, each with a thousand references to the one before: 10^18 values.
    let mut bytes = b"\x80\x02]q\x00".to_vec();
    for level in 1..=6u8 {
        bytes.extend([b']', b'q', level, b'(']);
        (0..1000).for_each(|_| bytes.extend([b'h', level - 1]));
        bytes.push(b'e');
    }
    bytes.push(b'.');
    let json = Pickle::parse(&bytes).unwrap().root().to_json(8);
    assert_eq!(json.as_array().map(Vec::len), Some(1000));
}

#[test]
fn a_parameter_that_refers_to_itself_is_no_tensor() {
    // x = torch._utils._rebuild_parameter(l) with l = [x].
    let bytes = b"\x80\x02]q\x00ctorch._utils\n_rebuild_parameter\nh\x00Ra.";
    let pickle = Pickle::parse(bytes).unwrap();
    let parameter = pickle.root().elements().unwrap()[0];
    assert!(spikeprobe::run::torch_file::TensorRecipe::of(parameter).is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_pickles_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = Pickle::parse(&bytes).map(|p| p.root().to_json(8));
    }

    #[test]
    fn damaged_real_pickles_never_panic(at in 0usize..4000, value in any::<u8>(), keep in 0usize..5000) {
        let mut bytes = inner_pickle();
        let place = at % bytes.len();
        bytes[place] = value;
        bytes.truncate(keep.max(1));
        let _ = Pickle::parse(&bytes).map(|p| p.root().state().map(|s| s.to_json(8)));
    }

    #[test]
    fn damaged_optimizer_files_never_panic(at in 0usize..60000, value in any::<u8>()) {
        let source = fixture("vectors/tiny_llama/checkpoint-2");
        let adapter = AdapterWeights::read(&source).unwrap();
        let mut bytes = std::fs::read(source.join("optimizer.pt")).unwrap();
        let place = at % bytes.len();
        bytes[place] = value;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("optimizer.pt");
        std::fs::write(&path, bytes).unwrap();
        let _ = spikeprobe::run::OptimizerFile::read(&path, &adapter);
    }

    #[test]
    fn damaged_adapters_never_panic(at in 0usize..20000, value in any::<u8>(), keep in 0usize..20000) {
        let mut bytes = std::fs::read(fixture("vectors/tiny_llama/checkpoint-2/adapter_model.safetensors")).unwrap();
        let place = at % bytes.len();
        bytes[place] = value;
        bytes.truncate(keep.max(1));
        let _ = AdapterWeights::parse(&bytes);
    }

    #[test]
    fn garbage_logs_and_states_never_panic(text in "(\\{|\\}|\"current_steps\"|\"loss\"|\"log_history\"|\"step\"|:|,|NaN|-Infinity|[0-9]{1,20}|\\[|\\]|\n|\"|\\\\|é){0,60}") {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, &text).unwrap();
        TrainerLog::read(&path).unwrap();
        let _ = TrainerState::read(&path);
    }

    #[test]
    fn garbage_configurations_never_panic(text in "(learning_rate|seed|lora_rank|warmup_steps|max_steps|lora_target|deepspeed|: |\n|-1|1e999|\\.nan|null|\\[|\\]|\\{|\\}|&a|\\*a|é|0x7f|9{1,30}|,|'|true){0,40}") {
        let _ = Folder::new(&text).open();
    }
}

/// data.pkl of a real training_args.bin: it lies uncompressed in the archive.
fn inner_pickle() -> Vec<u8> {
    let bytes = std::fs::read(fixture("run/training_args_5.6.0.bin")).unwrap();
    let start = bytes.windows(2).position(|w| w == [0x80, 2]).unwrap();
    bytes[start..].to_vec()
}
