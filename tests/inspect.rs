//! Findings: one example for each code, and runs where nothing is wrong.

use serde_json::{Value, json};
use spikeprobe::inspect::fingerprint::{MicroSum, Rule, candidates, scaling};
use spikeprobe::inspect::{Code, Finding, Severity, bookkeeping, compare, inspect, log};
use spikeprobe::run::Run;

use crate::run::{Folder, fixture};

const FOUR: &str = "{\"transformers\": \"4.48.2\", \"accelerate\": \"1.2.1\", \"llamafactory\": \"0.9.2\"}";

/// A run with this YAML, and trainer_state.json of these log entries.
fn with_state(yaml: &str, versions: &str, entries: &[Value]) -> Folder {
    let folder = Folder::new(&format!("logging_steps: 1\nlearning_rate: 1e-4\nwarmup_ratio: 0.1\n{yaml}"));
    folder.write("versions.json", versions);
    let total = entries.iter().filter_map(|e| e["step"].as_u64()).max().unwrap_or(0);
    let state = json!({"global_step": total, "max_steps": total, "num_train_epochs": 2, "log_history": entries});
    // NaN as Python writes it.
    folder.write("out/trainer_state.json", &state.to_string().replace("\"NaN\"", "NaN"));
    folder
}

fn five(yaml: &str, entries: &[Value]) -> Folder {
    with_state(yaml, "{\"transformers\": \"5.6.0\", \"accelerate\": \"1.11.0\", \"llamafactory\": \"0.9.5\"}", entries)
}

fn row(step: u64, loss: Value, norm: Value) -> Value {
    json!({"step": step, "epoch": step as f64 / 10.0, "loss": loss, "grad_norm": norm, "learning_rate": 1e-4})
}

fn healthy(count: u64) -> Vec<Value> {
    (1..=count).map(|s| row(s, json!(2.0 - 0.01 * s as f64 + 1e-7), json!(1.5 + 0.01 * s as f64))).collect()
}

fn with(count: u64, changed: Value) -> Vec<Value> {
    let mut rows = healthy(count);
    let at = changed["step"].as_u64().unwrap() as usize - 1;
    rows[at] = changed;
    rows
}

fn codes(run: &Run) -> Vec<&'static str> {
    inspect(run).iter().map(|f| f.code.word()).collect()
}

/// The finding of this code, which must be there.
#[track_caller]
fn finding(run: &Run, code: Code) -> Finding {
    let all = inspect(run);
    all.iter().find(|f| f.code == code).unwrap_or_else(|| panic!("no {} in {all:#?}", code.word())).clone()
}

#[test]
fn a_healthy_run_has_no_finding_graver_than_a_note() {
    let run = five("", &healthy(20)).open().unwrap();
    let grave: Vec<_> = inspect(&run).into_iter().filter(|f| f.severity > Severity::Note).collect();
    assert!(grave.is_empty(), "{grave:#?}");
}

#[test]
fn masked_nan_is_told_from_a_window_without_labels_and_from_a_perfect_loss() {
    let run = five("", &with(20, row(7, json!(0.0), json!("NaN")))).open().unwrap();
    let found = finding(&run, Code::MaskedNan);
    assert_eq!(found.severity, Severity::Error);
    assert!(found.message.contains("step 7") && found.place.contains("log_history[6]"), "{found:?}");
    let run = five("", &with(20, row(7, json!(0.0), json!(0.0)))).open().unwrap();
    assert!(finding(&run, Code::AllMaskedWindow).message.contains("step 7"));
    assert!(!codes(&run).contains(&"masked_nan"));
    // 4.x rounds to four decimals: 0.0 after 0.0003 is an honest small loss.
    let mut rows: Vec<Value> = (1..=9).map(|s| row(s, json!(0.0003), json!(0.01))).collect();
    rows.push(row(10, json!(0.0), json!(0.004)));
    let run = with_state("", FOUR, &rows).open().unwrap();
    assert!(!codes(&run).contains(&"masked_nan"));
}

#[test]
fn a_nan_loss_is_found() {
    let run = five("logging_nan_inf_filter: false\n", &with(20, row(9, json!("NaN"), json!("NaN")))).open().unwrap();
    assert!(finding(&run, Code::NanLogged).message.contains("before step 9"));
}

#[test]
fn a_filler_inflates_a_longer_logging_window() {
    let rows: Vec<Value> =
        (1..=4).map(|k| row(10 * k, json!(2.0), if k == 3 { json!("NaN") } else { json!(1.2) })).collect();
    let folder = Folder::new("logging_steps: 10\n");
    let state = json!({"global_step": 40, "max_steps": 40, "log_history": rows}).to_string().replace("\"NaN\"", "NaN");
    folder.write("out/trainer_state.json", &state);
    let run = folder.open().unwrap();
    assert!(finding(&run, Code::InflatedFiller).message.contains("step 30"));
    assert!(finding(&run, Code::CoarseLogging).message.contains("1/10"));
}

#[test]
fn skipped_fp16_steps_are_found_in_both_forms() {
    let frozen: Vec<Value> = (1..=40u64)
        .map(|s| {
            let lr = if s <= 7 { s } else { s - 1 };
            let norm = if s == 7 { json!("NaN") } else { json!(1.25) };
            json!({"step": s, "loss": 2.0 + 1e-7, "grad_norm": norm, "learning_rate": 1e-5 * lr as f64})
        })
        .collect();
    let folder = five("fp16: true\n", &frozen);
    assert!(finding(&folder.open().unwrap(), Code::SkippedSteps).message.contains("stands still"));
    let moving: Vec<Value> = (1..=40u64)
        .map(|s| {
            let norm = if s == 7 { json!("NaN") } else { json!(1.25) };
            json!({"step": s, "loss": 2.0 + 1e-7, "grad_norm": norm, "learning_rate": 1e-5 * s as f64})
        })
        .collect();
    let folder = five("fp16: true\n", &moving);
    let found = finding(&folder.open().unwrap(), Code::SkippedSteps);
    assert!(found.message.contains("moves on") && found.message.contains("step 7"), "{found:?}");
    assert_eq!(found.severity, Severity::Warning, "one of forty");
    // The same NaN without loss scaling is no skipped step.
    assert!(!codes(&five("bf16: true\n", &moving).open().unwrap()).contains(&"skipped_steps"));
}

#[test]
fn deepspeed_marks_and_divides() {
    let rows = with(20, row(4, json!(2.0), json!(std::f32::consts::SQRT_2 as f64)));
    let run = with_state("deepspeed: ds_z2.json\ngradient_accumulation_steps: 4\n", FOUR, &rows).open().unwrap();
    assert!(finding(&run, Code::SentinelGradNorm).message.contains("step 4"));
    assert!(finding(&run, Code::DeepspeedGradNorm).message.contains("(4)"));
    let run = five("", &rows).open().unwrap();
    assert!(!codes(&run).contains(&"sentinel_grad_norm"), "a single √2 without DeepSpeed is chance");
}

#[test]
fn a_log_without_norms_and_with_half_a_line_is_noted() {
    let folder = Folder::new("logging_steps: 1\n");
    folder.write("out/trainer_log.jsonl", &(crate::run::log_lines(&[(1, 3, 2.0, 1), (2, 3, 1.9, 2)]) + "{\"curr"));
    let run = folder.open().unwrap();
    assert_eq!(finding(&run, Code::GradNormMissing).severity, Severity::Note);
    assert!(finding(&run, Code::LogUnreadable).place.ends_with(":3"));
    assert_eq!(finding(&run, Code::VersionsAssumed).severity, Severity::Note);
}

fn version_log(name: &str, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(fixture(&format!("vectors/version_logs/{name}.json"))).unwrap();
    let log: Value = serde_json::from_str(&text).unwrap();
    log["runs"][run]["log_history"].as_array().unwrap().clone()
}

#[test]
fn the_leak_of_4_48_is_read_off_its_own_log_and_5_6_has_none() {
    let yaml = "gradient_accumulation_steps: 4\nper_device_train_batch_size: 2\nnum_train_epochs: 2\n";
    let run = with_state(yaml, FOUR, &version_log("epochs_4.48.2", "n93_bs2_ga4")).open().unwrap();
    let found = bookkeeping::leaks(&run.log.rows, 4);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].left), (12, 3));
    assert!((found[0].ratio.unwrap() - 8.0283 / ((4.2014 + 4.239) / 2.0)).abs() < 1e-12);
    assert_eq!(finding(&run, Code::EpochBoundaryLeak).severity, Severity::Error);
    assert!(finding(&run, Code::EarlyEnd).message.contains("epoch 1.936 of 2"));
    assert!(finding(&run, Code::LearningRateOffByOne).message.contains("NEXT"));
    assert!(codes(&run).contains(&"known_bad_versions"));
    let run = five(yaml, &version_log("epochs_5.6.0", "n93_bs2_ga4")).open().unwrap();
    assert_eq!(bookkeeping::leaks(&run.log.rows, 4), []);
    for code in ["epoch_boundary_leak", "early_end", "learning_rate_off_by_one", "known_bad_versions"] {
        assert!(!codes(&run).contains(&code), "{code}");
    }
}

#[test]
fn one_row_batches_never_leak_but_end_early() {
    let run = with_state(
        "gradient_accumulation_steps: 4\nper_device_train_batch_size: 1\nnum_train_epochs: 2\n",
        FOUR,
        &version_log("epochs_4.48.2", "bs1_ga4"),
    );
    let run = run.open().unwrap();
    assert!(!codes(&run).contains(&"epoch_boundary_leak"));
    assert!(finding(&run, Code::EarlyEnd).message.contains("epoch 1.400 of 2"));
}

#[test]
fn a_loss_times_the_accumulation_is_named_by_version_and_by_size() {
    // mistral on 4.47.1: known by version and model.
    let versions = "{\"transformers\": \"4.47.1\"}";
    let folder =
        with_state("gradient_accumulation_steps: 8\n", versions, &with(20, row(1, json!(25.6252), json!(300.0))));
    folder.write("model/config.json", "{\"model_type\": \"mistral\", \"vocab_size\": 512}");
    assert!(finding(&folder.open().unwrap(), Code::LossTimesAccumulation).message.contains("means 3.203"));
    // A llama whose first loss no cross-entropy over 32000 tokens can be, but an eighth of it can.
    let folder = five("gradient_accumulation_steps: 16\n", &with(20, row(1, json!(69.0), json!(30.0))));
    folder.write("model/config.json", "{\"model_type\": \"llama\", \"vocab_size\": 32000}");
    assert!(finding(&folder.open().unwrap(), Code::LossTimesAccumulation).message.contains("69"));
    folder.write("model/config.json", "{\"model_type\": \"llama\"}");
    assert!(
        !codes(&folder.open().unwrap()).contains(&"loss_times_accumulation"),
        "without a vocabulary nothing is claimed"
    );
}

#[test]
fn the_fingerprint_names_the_rule_of_a_recorded_window() {
    let text = std::fs::read_to_string(fixture("vectors/version_logs/main_4.48.2.json")).unwrap();
    let log: Value = serde_json::from_str(&text).unwrap();
    let window: Vec<MicroSum> = log["micro"].as_array().unwrap()[..3]
        .iter()
        .map(|m| {
            let items = m["num_items_in_batch"].as_f64().unwrap();
            let labels = m["labels"].as_array().unwrap().iter().flat_map(|r| r.as_array().unwrap());
            let unshifted = labels.filter(|l| l.as_i64() != Some(-100)).count() as u64;
            let sum = m["loss_as_returned"].as_f64().unwrap() * items;
            MicroSum { sum, shifted: m["valid_shifted"].as_u64().unwrap(), unshifted }
        })
        .collect();
    let logged = log["log_history"][0]["loss"].as_f64().unwrap();
    let best = &candidates(&window, 3, logged)[0];
    assert!(matches!(best.rule, Rule::TokenMean | Rule::TokenMeanShifted));
    assert!(best.error < 2e-5, "{best:?}");
    let third = candidates(&window, 3, logged)[2];
    assert!(third.error > 1e-4, "the other rules are off by more than ten times the rounding: {third:?}");
}

#[test]
fn each_rule_is_named_when_the_log_follows_it() {
    let window = [
        MicroSum { sum: 30.0, shifted: 10, unshifted: 11 },
        MicroSum { sum: 90.0, shifted: 20, unshifted: 20 },
        MicroSum { sum: 8.0, shifted: 4, unshifted: 4 },
    ];
    // Accumulation 4, but the epoch's last window has 3 micro-batches.
    for rule in Rule::ALL {
        let logged = rule.predict(&window, 4);
        assert_eq!(candidates(&window, 4, logged)[0].rule, rule);
    }
    // An all-masked micro-batch: means are NaN and go last.
    let masked = [MicroSum { sum: 0.0, shifted: 0, unshifted: 0 }, window[0]];
    assert!(candidates(&masked, 2, 30.0 / 11.0)[5].error.is_nan());
}

#[test]
fn a_fingerprint_is_a_note_an_error_or_a_warning() {
    use spikeprobe::inspect::confirm::judge;
    use spikeprobe::run::LossRule;
    let window = [MicroSum { sum: 30.0, shifted: 10, unshifted: 11 }, MicroSum { sum: 9.0, shifted: 2, unshifted: 2 }];
    let judged = |logged: f64| judge(&candidates(&window, 2, logged), LossRule::TokenMean, logged, 1e-4, "log:1");
    assert_eq!(judged(39.0 / 13.0).severity, Severity::Note);
    let other = judged(7.5);
    assert_eq!((other.code, other.severity), (Code::SemanticsFingerprint, Severity::Error));
    assert!(other.message.contains("undivided"), "{}", other.message);
    assert_eq!(judged(1.0).severity, Severity::Warning);
}

#[test]
fn issue_7443_is_an_undivided_sum() {
    // LLaVA-1.5, LLaMA-Factory 0.9.2, transformers 4.49.0, constant total batch.
    let found = scaling(&[(2, 6.4), (4, 13.65), (16, 69.0), (32, 138.0)]).unwrap();
    assert_eq!(found.rule, Some(Rule::MeanUndivided));
    assert!((1.0..1.2).contains(&found.slope), "{found:?}");
    assert_eq!(scaling(&[(2, 3.2), (32, 3.3)]).unwrap().rule, Some(Rule::TokenMean));
    assert_eq!(scaling(&[(2, 3.2), (32, 0.2)]).unwrap().rule, Some(Rule::TokenMeanDividedAgain));
    assert_eq!(scaling(&[(2, 3.2), (2, 3.3)]), None);
    assert_eq!(scaling(&[(2, 3.2), (4, f64::NAN)]), None);
}

#[test]
fn resumes_without_state_and_with_another_total_are_found() {
    let folder = Folder::new("logging_steps: 1\n");
    let lines = crate::run::log_lines(&[(1, 4, 3.0, 1), (2, 4, 2.0, 2), (3, 8, 2.5, 0), (4, 8, 2.4, 1)]);
    folder.write("out/trainer_log.jsonl", &lines).write("out/checkpoint-2/README.md", "");
    let run = folder.open().unwrap();
    assert!(finding(&run, Code::ResumeWithoutOptimizer).message.contains("neither optimizer.pt nor scheduler.pt"));
    assert!(finding(&run, Code::ResumeOtherTotal).message.contains("8 instead of 4"));
    assert!(finding(&run, Code::AppendedAttempts).message.contains("steps 3–4 from checkpoint-2"));
    folder.write("out/checkpoint-2/optimizer.pt", "").write("out/checkpoint-2/scheduler.pt", "");
    assert!(!codes(&folder.open().unwrap()).contains(&"resume_without_optimizer"));
    std::fs::remove_file(folder.0.path().join("out/checkpoint-2/scheduler.pt")).unwrap();
    assert!(finding(&folder.open().unwrap(), Code::ResumeWithoutOptimizer).message.contains("ignored"));
}

#[test]
fn a_resume_inside_a_later_epoch_depends_on_the_pair_of_versions() {
    let lines: String = [(1u64, 0.3), (2, 0.6), (3, 0.9), (4, 1.2), (5, 1.5)]
        .iter()
        .map(|(s, e)| format!("{{\"current_steps\": {s}, \"total_steps\": 9, \"loss\": 2.0, \"lr\": 0.001, \"epoch\": {e}, \"elapsed_time\": \"0:00:0{}\"}}\n", if *s == 5 { 0 } else { *s }))
        .collect();
    for (transformers, accelerate, wrong) in
        [("4.57.1", "1.11.0", true), ("4.57.1", "1.3.0", false), ("5.6.0", "1.3.0", true), ("5.6.0", "1.11.0", false)]
    {
        let folder = Folder::new("logging_steps: 1\ngradient_accumulation_steps: 3\n");
        folder.write(
            "versions.json",
            &format!("{{\"transformers\": \"{transformers}\", \"accelerate\": \"{accelerate}\"}}"),
        );
        folder.write("out/trainer_log.jsonl", &lines);
        let run = folder.open().unwrap();
        assert_eq!(run.attempts[1].resumed_from, Some(4));
        assert_eq!(codes(&run).contains(&"resume_order"), wrong, "{transformers} {accelerate}");
    }
    let folder = Folder::new("logging_steps: 1\ngradient_accumulation_steps: 3\n");
    folder.write("versions.json", FOUR).write("out/trainer_log.jsonl", &lines);
    assert_eq!(finding(&folder.open().unwrap(), Code::ResumePosition).severity, Severity::Warning);
}

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
fn every_cause_of_a_missing_eval_loss_is_named() {
    let total = healthy(20);
    let run = |yaml: &str| five(yaml, &total).open().unwrap();
    assert!(finding(&run("val_size: 0.1\n"), Code::EvalStrategyNo).message.contains("eval_strategy: steps"));
    assert!(finding(&run("eval_dataset: b\n"), Code::EvalStrategyNo).message.contains("eval_dataset is loaded"));
    let removed = finding(&run("val_size: 0.1\nevaluation_strategy: steps\n"), Code::EvalKeyRemoved);
    assert_eq!(removed.severity, Severity::Error);
    let on = "eval_strategy: steps\n";
    assert!(
        finding(&run(&format!("{on}val_size: 0.1\neval_steps: 500\n")), Code::EvalStepsTooLarge)
            .message
            .contains("(20)")
    );
    assert!(codes(&run(&format!("{on}val_size: 0.1\neval_dataset: b\n"))).contains(&"eval_split_and_dataset"));
    assert!(codes(&run(&format!("{on}val_size: 0.1\npredict_with_generate: true\n"))).contains(&"eval_generates"));
    assert!(codes(&run(&format!("{on}val_size: 0.1\neval_delay: 99\n"))).contains(&"eval_delayed"));
    // What the log's eval rows show.
    let with_eval = |metrics: Value| [total.clone(), vec![metrics]].concat();
    let renamed = with_eval(json!({"step": 10, "eval_holdout_loss": 1.25, "eval_runtime": 1.0}));
    let run = with_state(&format!("{on}eval_dataset: holdout\n"), FOUR, &renamed).open().unwrap();
    assert!(finding(&run, Code::EvalMetricRenamed).message.contains("eval_holdout_loss"));
    let hidden = with_eval(json!({"step": 10, "eval_runtime": 1.0}));
    assert!(codes(&five(&format!("{on}val_size: 0.1\n"), &hidden).open().unwrap()).contains(&"eval_labels_hidden"));
    let nan = with_eval(json!({"step": 10, "eval_loss": "NaN"}));
    assert!(codes(&five(&format!("{on}val_size: 0.1\n"), &nan).open().unwrap()).contains(&"eval_not_finite"));
    let good = with_eval(json!({"step": 10, "eval_loss": 1.5}));
    let quiet = codes(&five(&format!("{on}val_size: 0.1\neval_steps: 10\n"), &good).open().unwrap());
    assert!(!quiet.iter().any(|c| c.starts_with("eval_")), "{quiet:?}");
}

#[test]
fn two_runs_are_compared_by_what_can_explain_their_difference() {
    let a = five("seed: 1\n", &healthy(20)).open().unwrap();
    let b = five("seed: 2\nweight_decay: 0.1\nmax_grad_norm: 0.5\n", &with(20, row(5, json!(3.0), json!(1.0))))
        .open()
        .unwrap();
    let comparison = compare::compare(&a, &b);
    assert_eq!((comparison.parts_at, comparison.common_steps), (Some(5), 20));
    assert_eq!(comparison.differences[0].what, "max_grad_norm", "{:?}", comparison.differences);
    assert!(comparison.differences.iter().any(|d| d.what == "seed"));
    assert_eq!(compare::compare(&a, &a).parts_at, None);
    assert_eq!(compare::compare(&a, &a).differences, []);
}

#[test]
fn data_rows_are_linted() {
    use spikeprobe::batches::{Dataset, Example, IGNORE, RowId};
    let example = |row, ids: &[u32], prompt: usize| Example {
        row: RowId { dataset: 0, row },
        input_ids: ids.to_vec(),
        labels: ids.iter().enumerate().map(|(i, &t)| if i < prompt { IGNORE } else { t as i32 }).collect(),
        spans: Vec::new(),
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
fn a_zero_is_read_by_its_gradient() {
    let row = |grad_norm| spikeprobe::run::LogRow {
        attempt: 0,
        step: 5,
        window: 1,
        epoch: None,
        loss: Some(0.0),
        grad_norm,
        learning_rate: None,
        total_steps: None,
        source: String::new(),
    };
    assert_eq!(log::zero(&row(Some(0.0)), Some(1.0), false), Some(log::Zero::NoLabels));
    assert_eq!(log::zero(&row(Some(f64::INFINITY)), Some(1.0), false), Some(log::Zero::MaskedNan));
    assert_eq!(log::zero(&row(None), Some(1.0), true), Some(log::Zero::MaskedNan));
    assert_eq!(log::zero(&row(None), Some(1e-4), true), None);
}

/// The table of codes: words are unique, every code is made somewhere, and every code is tried by a test here.
#[test]
fn the_table_of_codes_is_held_against_the_sources() {
    let words: std::collections::HashSet<_> = Code::ALL.iter().map(|c| c.word()).collect();
    assert_eq!(words.len(), Code::ALL.len());
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/inspect");
    let mut sources = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "codes.rs" {
            sources += &std::fs::read_to_string(path).unwrap();
        }
    }
    let tests = include_str!("inspect.rs");
    for code in Code::ALL {
        let name = format!("Code::{code:?}");
        assert!(sources.contains(&name), "{name} is never made");
        assert!(tests.contains(&name) || tests.contains(&format!("\"{}\"", code.word())), "{name} is never tried");
    }
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

/// A trainer's log as it grows.
fn append(path: &std::path::Path, text: &str) {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn a_watched_log_warns_within_a_line_and_survives_truncation_and_rotation() {
    use spikeprobe::watch::{Event, Tail, Watch};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trainer_log.jsonl");
    let (mut tail, mut watch) = (Tail::new(&path), Watch::default());
    assert_eq!(tail.read().unwrap().lines.len(), 0, "not there yet");
    let smooth: Vec<_> = (1..=30).map(|s| (s, 99, 2.0 - 0.02 * s as f64, 1)).collect();
    append(&path, &crate::run::log_lines(&smooth));
    assert_eq!(watch.lines(&tail.read().unwrap().lines), []);
    // Half a line is not read; its second half completes it, and the spike is told at once.
    let spike = crate::run::log_lines(&[(31, 99, 6.5, 2)]);
    append(&path, &spike[..20]);
    assert_eq!(tail.read().unwrap().lines.len(), 0);
    append(&path, &spike[20..]);
    let events = watch.lines(&tail.read().unwrap().lines);
    assert!(matches!(events.as_slice(), [Event::Spike { step: 31, .. }]), "{events:?}");
    append(&path, &crate::run::log_lines(&[(32, 99, 6.0, 2)]));
    assert_eq!(watch.lines(&tail.read().unwrap().lines), [], "told once");
    // Truncated, then replaced by another file.
    std::fs::write(&path, crate::run::log_lines(&[(1, 99, 2.0, 1)])).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 1);
    std::fs::write(folder.path().join("new"), crate::run::log_lines(&[(1, 9, 2.0, 1), (2, 9, 1.9, 1)])).unwrap();
    std::fs::rename(folder.path().join("new"), &path).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 2);
}

#[test]
fn evidence_is_kept_whole_and_frozen_by_a_spike() {
    use spikeprobe::watch::Keeper;
    let folder = tempfile::tempdir().unwrap();
    let (out, keep) = (folder.path().join("out"), folder.path().join("keep"));
    let save = |step: u64| {
        let dir = out.join(format!("checkpoint-{step}"));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("trainer_state.json"), "{}").unwrap();
    };
    let mut keeper = Keeper::new(&out, &keep).unwrap();
    save(10);
    assert!(keeper.look().unwrap().is_empty(), "it may still be written");
    assert_eq!(keeper.look().unwrap(), ["checkpoint-10"]);
    for step in [20, 30] {
        save(step);
        keeper.look().unwrap();
        keeper.look().unwrap();
    }
    assert!(!keep.join("checkpoint-10").exists() && keep.join("checkpoint-30/trainer_state.json").exists());
    keeper.freeze();
    save(40);
    keeper.look().unwrap();
    keeper.look().unwrap();
    assert!(keep.join("checkpoint-20").exists() && keep.join("checkpoint-40").exists());
}
