//! The configuration and its data rows.

use super::support::*;

#[test]
fn the_configuration_is_linted_with_file_and_line() {
    // The folders outlive the findings: lines are looked up in the file.
    let folders = std::cell::RefCell::new(Vec::new());
    let of = |yaml: &str| {
        let folder = Folder::new(yaml);
        let run = folder.open().unwrap();
        folders.borrow_mut().push(folder);
        run
    };
    let run = of("learning_rate: 5e-4\ngradient_accumulation_steps: 8\nmax_grad_norm: 0\nlogging_steps: 10\n");
    for (code, line) in [
        (Code::HighLearningRate, 7),
        (Code::NoWarmup, 0),
        (Code::LongAccumulation, 8),
        (Code::NoClipping, 9),
        (Code::CoarseLogging, 10),
    ] {
        let found = finding(&run, code);
        assert!(found.severity < Severity::Error, "{found:?}");
        if line > 0 {
            assert!(found.place.ends_with(&format!("train.yaml:{line}")), "{found:?}");
        }
    }
    assert!(finding(&run, Code::HighLearningRate).message.contains("rule of thumb"));
    assert!(finding(&of("save_only_model: true\n"), Code::EvidenceLost).message.contains("replay"));
    assert!(finding(&of("fp16: true\nuse_cpu: true\n"), Code::Fp16Ignored).message.contains("use_cpu"));
    let folder = Folder::new("learning_rate: 5e-5\n");
    folder.copy("run/training_args_5.6.0.bin", "out/training_args.bin");
    assert!(finding(&folder.open().unwrap(), Code::ConfigEdited).message.contains("0.008"));
}

#[test]
fn bfloat16_adapters_are_warned_of() {
    let folder = Folder::new("pure_bf16: true\n");
    let tensor = |name: &str| {
        (name.to_owned(), safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, vec![2, 2], &[0; 8]).unwrap())
    };
    let tensors =
        ["A", "B"].map(|s| tensor(&format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{s}.weight")));
    let bytes = safetensors::serialize(tensors, None).unwrap();
    folder.write("out/checkpoint-1/x", "");
    std::fs::write(folder.0.path().join("out/checkpoint-1/adapter_model.safetensors"), bytes).unwrap();
    assert!(finding(&folder.open().unwrap(), Code::HalfAdapter).message.contains("bfloat16"));
}

#[test]
fn data_rows_are_linted() {
    use spikeprobe::batches::{Dataset, Example, IGNORE, RowId};
    let example = |row, ids: &[u32], prompt: usize| Example {
        row: RowId { dataset: 0, row },
        input_ids: ids.to_vec(),
        labels: ids.iter().enumerate().map(|(i, &t)| if i < prompt { IGNORE } else { t as i32 }).collect(),
        spans: Vec::new(),
        pack: None,
    };
    let long: Vec<u32> = (0..60).collect();
    let datasets = [Dataset { name: "a".into(), files: vec!["a.json".into()] }];
    let train = [
        example(0, &[1, 2, 3, 4], 2),
        example(1, &[1, 2, 3, 4], 2),
        example(2, &[1, 2, 9, 4], 2),
        example(3, &[5, 6, 7], 3),
        example(4, &long, 2),
    ];
    let dropped = [(RowId { dataset: 0, row: 7 }, "no answer".to_owned())];
    let run = Folder::new("cutoff_len: 60\n").open().unwrap();
    let found = spikeprobe::inspect::data::findings(&run, &datasets, &train, &dropped);
    let message = |code: Code| &found.iter().find(|f| f.code == code).unwrap_or_else(|| panic!("{found:#?}")).message;
    assert!(message(Code::AnswersCut).contains("1 of 5") && message(Code::AnswersCut).contains("a:4"));
    assert!(message(Code::MaskedRows).contains("a:3"));
    assert!(message(Code::DroppedRows).contains("no answer"));
    assert!(message(Code::DuplicateRows).starts_with("1 of 5"));
    assert!(message(Code::ConflictingRows).starts_with("3 of 5"));
    assert!(message(Code::ExtremeLengths).contains("a:4"));
}

#[test]
fn a_refused_run_and_an_output_folder_without_yaml_can_be_inspected() {
    let folder = Folder::new("quantization_bit: 4\nlogging_steps: 1\n");
    folder.write("out/trainer_log.jsonl", &crate::run::log_lines(&[(1, 2, 2.0, 1), (2, 2, f64::from(0u8), 2)]));
    assert!(folder.open().is_err());
    let run = Run::open_for_inspection(folder.0.path(), folder.0.path(), &[]).unwrap();
    assert!(run.remarks.iter().any(|r| r.contains("quantization_bit")), "{:?}", run.remarks);
    assert!(finding(&run, Code::MaskedNan).message.contains("step 2"));
    // The output folder alone: TrainingArguments and the adapter's configuration.
    folder.copy("run/training_args_5.6.0.bin", "out/training_args.bin");
    folder.copy("vectors/tiny_llama/checkpoint-2/adapter_config.json", "out/checkpoint-2/adapter_config.json");
    let output = folder.0.path().join("out");
    let run = Run::open_for_inspection(&output, folder.0.path(), &[]).unwrap();
    assert_eq!((run.config.learning_rate, run.config.lora_rank, run.log.rows.len()), (0.008, 4, 2));
    assert!(Run::open(&output, folder.0.path(), &[], &[]).is_err(), "a replay needs the data");
}

/// The keys of LLaMA-Factory's example configurations (examples/train_lora, train_qlora, train_full, extras), with a
/// model that is a name on the hub: nothing there is wrong, and what is not replayed is said, not accused.
#[test]
fn example_configurations_are_not_accused() {
    let sft = "trust_remote_code: true\nlora_rank: 8\ndataset: identity,alpaca_en_demo\ntemplate: llama3\ncutoff_len: 2048\n\
               max_samples: 1000\noverwrite_cache: true\npreprocessing_num_workers: 16\nlogging_steps: 10\nsave_steps: 500\n\
               plot_loss: true\noverwrite_output_dir: true\nper_device_train_batch_size: 1\nnum_train_epochs: 3.0\n\
               lr_scheduler_type: cosine\nwarmup_ratio: 0.1\nddp_timeout: 180000000\nreport_to: none\n\
               gradient_accumulation_steps: 8\n";
    let eval = "val_size: 0.1\nper_device_eval_batch_size: 1\neval_strategy: steps\neval_steps: 500\n";
    let lora =
        "stage: sft\ndo_train: true\nfinetuning_type: lora\nlora_target: all\nlearning_rate: 1.0e-4\nbf16: true\n";
    let full = "stage: sft\ndo_train: true\nfinetuning_type: full\nlearning_rate: 1.0e-5\n";
    let of_stage = |stage: &str| lora.replace("stage: sft", &format!("stage: {stage}"));
    let cases = [
        ("lora", format!("{lora}{sft}"), ""),
        ("lora, evaluated", format!("{lora}{sft}{eval}"), ""),
        ("ds3", format!("{lora}{sft}{eval}deepspeed: examples/deepspeed/ds_z3_config.json\n"), ""),
        ("lora+", format!("{lora}{sft}{eval}loraplus_lr_ratio: 16.0\n"), ""),
        ("ray", format!("{lora}{sft}ray_num_workers: 4\nray_run_name: r\nresources_per_worker:\n  GPU: 1\n"), ""),
        (
            "qlora",
            format!("{lora}{sft}{eval}quantization_bit: 4\nquantization_method: bitsandbytes\n"),
            "quantization_bit",
        ),
        ("fsdp qlora", format!("{lora}{sft}quantization_bit: 4\n").replace("bf16", "fp16"), "quantization_bit"),
        ("pissa", format!("{lora}{sft}pissa_init: true\npissa_iter: 16\npissa_convert: true\n"), "pissa_init"),
        ("dpo", format!("{}{sft}pref_beta: 0.1\npref_loss: sigmoid\n", of_stage("dpo")), "stage"),
        ("kto", format!("{}{sft}pref_beta: 0.1\n", of_stage("kto")), "stage"),
        ("reward", format!("{}{sft}", of_stage("rm")), "stage"),
        ("pretrain", format!("{}{sft}", of_stage("pt")), "stage"),
        (
            "full",
            format!("{full}bf16: true\n{sft}deepspeed: examples/deepspeed/ds_z3_config.json\n"),
            "finetuning_type",
        ),
        (
            "galore",
            format!(
                "{full}pure_bf16: true\n{sft}use_galore: true\ngalore_target: mlp,self_attn\nval_size: 0.1\nevaluation_strategy: steps\n"
            ),
            "finetuning_type",
        ),
        (
            "vision",
            format!("{lora}{}image_max_pixels: 262144\nvideo_max_pixels: 16384\n", sft.replace("llama3", "qwen2_vl")),
            "",
        ),
        (
            "predict",
            "stage: sft\ndo_predict: true\nfinetuning_type: lora\neval_dataset: identity\ntemplate: llama3\n\
             predict_with_generate: true\nadapter_name_or_path: saves/lora\n"
                .to_owned(),
            "",
        ),
    ];
    for (name, keys, refused) in cases {
        let folder = tempfile::tempdir().unwrap();
        let yaml = format!("model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct\n{keys}output_dir: saves/out\n");
        std::fs::write(folder.path().join("example.yaml"), yaml).unwrap();
        let run = Run::open_for_inspection(&folder.path().join("example.yaml"), folder.path(), &[]).unwrap();
        let grave: Vec<_> = inspect(&run).into_iter().filter(|f| f.severity > Severity::Note).collect();
        // Accumulation, no checkpoint before the end: notes. Half precision weights are a warning that pure_bf16 earns.
        assert!(grave.iter().all(|f| f.code == Code::HalfAdapter && name == "galore"), "{name}: {grave:#?}");
        let said = run.remarks.iter().any(|r| r.contains("would refuse") && r.contains(refused));
        assert_eq!(said, !refused.is_empty(), "{name}: {:?}", run.remarks);
    }
}

#[test]
fn a_template_is_held_against_the_tokenizer_it_writes_for() {
    use spikeprobe::batches::template;
    use spikeprobe::inspect::template::judge;
    use spikeprobe::run::Version;
    let of = |name: &str| template(name, Version(0, 9, 5)).unwrap();
    let chatml = r#"{"added_tokens": [{"content": "<|im_start|>"}, {"content": "<|im_end|>"}]}"#;
    let llama = r#"{"added_tokens": [{"content": "<|start_header_id|>"}, {"content": "<|end_header_id|>"}, {"content": "<|eot_id|>"}, {"content": "<|eom_id|>"}]}"#;
    assert_eq!(judge(&of("chatml"), chatml, None, "t"), []);
    assert_eq!(judge(&of("llama3"), llama, Some("{{ '<|start_header_id|>' }}"), "t"), []);
    // Text templates claim no marker.
    for name in ["default", "alpaca", "vicuna", "zephyr", "llama2", "mistral"] {
        assert_eq!(judge(&of(name), "{}", Some("anything"), "t"), [], "{name}");
    }
    let found = judge(&of("qwen"), llama, None, "train.yaml:5");
    assert!(found.iter().all(|f| f.code == Code::TemplateMismatch && f.severity == Severity::Warning), "{found:?}");
    assert!(found[0].message.contains("<|im_end|>") && found[1].message.contains("<|im_start|>"), "{found:?}");
    let both = format!("{chatml}{llama}");
    let own = judge(&of("chatml"), &both, Some("{{ '<|start_header_id|>' }}"), "t");
    assert!(own.len() == 1 && own[0].message.contains("shares no marker"), "{own:?}");
}
