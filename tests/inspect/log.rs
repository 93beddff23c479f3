//! Log forensics: what single rows hide, and rows that hide nothing.

use spikeprobe::inspect::log;

use super::support::*;

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
