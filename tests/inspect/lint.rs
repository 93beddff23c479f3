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
