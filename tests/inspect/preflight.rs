//! Before training: what the first windows at the peak learning rate say, on made-up and on real windows.

use std::sync::Arc;

use spikeprobe::device::DType;
use spikeprobe::device::cpu::CpuDevice;
use spikeprobe::inspect::preflight::{DataNumbers, Headroom, Preflight, judge, preflight, to_json};
use spikeprobe::probe::{Part, Role, Site};
use spikeprobe::replay::{Replayer, Source, StepRecord};

use super::support::*;

fn step(step: u64, loss: f64) -> StepRecord {
    StepRecord {
        step,
        attempt: 0,
        epoch: 0.1,
        learning_rate: 1e-3,
        learning_rate_logged: 1e-3,
        loss,
        loss_raw: loss,
        loss_logged: None,
        grad_norm: 1.0,
        clip_coefficient: 1.0,
        update_norm: 0.1,
        loss_scale: None,
        skipped: false,
        nonfinite: 0,
        micro_batches: Vec::new(),
    }
}

fn flight(steps: Vec<StepRecord>, headroom: Vec<Headroom>) -> Preflight {
    let data = DataNumbers {
        rows: 8,
        dropped: 0,
        tokens: 80,
        label_tokens: 40,
        longest: 12,
        median: 10,
        steps_per_epoch: 4,
        total_steps: 8,
    };
    Preflight {
        data,
        learning_rate: 1e-3,
        steps,
        headroom,
        seconds_per_step: 0.1,
        trainable: 64,
        base_bytes: 1024,
        peak_memory: None,
    }
}

fn site(layer: usize, dtype: DType, max_abs: f64, nonfinite: u64) -> Headroom {
    Headroom { site: Site::block(layer, Part::Gated, Role::Output), dtype, max_abs, nonfinite, order: layer }
}

/// Codes with severities.
fn judged(steps: Vec<StepRecord>, headroom: Vec<Headroom>) -> Vec<(Code, Severity)> {
    judge(&flight(steps, headroom), "train.yaml:3").into_iter().map(|f| (f.code, f.severity)).collect()
}

#[test]
fn windows_that_fall_or_wander_are_no_finding() {
    assert_eq!(judged(vec![step(1, 3.0), step(2, 1.8), step(3, 2.4), step(4, 0.8)], vec![]), []);
    assert_eq!(judged(vec![step(1, 3.0), step(2, 4.3)], vec![site(0, DType::F16, 900.0, 0)]), []);
}

#[test]
fn a_loss_that_leaves_at_the_peak_is_a_warning() {
    assert_eq!(judged(vec![step(1, 0.06), step(2, 8.5)], vec![]), [(Code::PeakDiverges, Severity::Warning)]);
}

#[test]
fn gradients_that_are_applied_though_not_finite_are_an_error_and_skipped_ones_a_warning() {
    let broken = |skipped| StepRecord { nonfinite: 7, skipped, loss_scale: Some(65536.0), ..step(1, 3.0) };
    assert_eq!(judged(vec![broken(false)], vec![]), [(Code::PeakNotFinite, Severity::Error)]);
    assert_eq!(judged(vec![broken(true)], vec![]), [(Code::PeakNotFinite, Severity::Warning)]);
    assert_eq!(judged(vec![broken(true), step(2, 3.0)], vec![]), [], "a skip while the scale settles is normal");
    let forward = flight(vec![StepRecord { skipped: true, ..step(1, f64::NAN) }], vec![site(2, DType::F16, 1.0, 5)]);
    let found = judge(&forward, "train.yaml:3");
    assert_eq!((found[0].severity, found[0].place.as_str()), (Severity::Error, "layers.2.mlp.act output"));
    assert!(found[0].message.contains("no loss scale"), "{found:?}");
}

#[test]
fn little_headroom_matters_in_fp16_and_is_a_note_elsewhere() {
    let thin = |dtype| judged(vec![step(1, 3.0)], vec![site(0, dtype, 40000.0, 0)]);
    assert_eq!(thin(DType::F16), [(Code::ThinHeadroom, Severity::Warning)]);
    assert_eq!(thin(DType::BF16), [(Code::ThinHeadroom, Severity::Note)]);
}

fn open(root: &std::path::Path, run: &str) -> Replayer {
    let source = Source {
        path: root.join(run),
        root: root.to_owned(),
        overrides: Vec::new(),
        versions: Vec::new(),
        cache: None,
    };
    Replayer::open(source, Arc::new(CpuDevice::new(Some(2)).unwrap())).unwrap()
}

#[test]
fn a_rate_that_throws_the_adapter_is_seen_before_training_and_a_healthy_one_passes() {
    let demo = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let thrown = preflight(&open(&demo, "runs/a8-lr-stage2-llama-fp32"), 3).unwrap();
    let found = judge(&thrown, "here");
    assert!(found.iter().any(|f| f.code == Code::PeakDiverges), "{found:?}");
    // Its folder without any output is a run before training.
    let folder = tempfile::tempdir().unwrap();
    let from = fixture("runs/runs/k6-healthy-cos-qwen2-fp32");
    for file in ["train.yaml", "data/dataset_info.json", "data/train.json"] {
        let to = folder.path().join("runs/k6-healthy-cos-qwen2-fp32").join(file);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(from.join(file), to).unwrap();
    }
    std::fs::create_dir(folder.path().join("models")).unwrap();
    let model = folder.path().join("models/tiny-qwen2-fp32");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(fixture("runs/models/tiny-qwen2-fp32")).unwrap() {
        let file = file.unwrap().path();
        std::fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
    }
    let replayer = open(folder.path(), "runs/k6-healthy-cos-qwen2-fp32");
    let flight = preflight(&replayer, 3).unwrap();
    assert_eq!(judge(&flight, "here"), []);
    assert_eq!((flight.data.rows, flight.data.total_steps, flight.steps.len()), (96, 48, 3));
    assert!(flight.steps.iter().all(|s| s.learning_rate == 4e-3), "no warmup softens the peak");
    assert!(flight.trainable > 0 && flight.base_bytes > 1_000_000 && flight.seconds_per_step > 0.0);
    let json = to_json(&replayer, &flight, &[]);
    assert_eq!(json["schema"], "spikeprobe.preflight/1");
    assert_eq!(json["sites"].as_array().unwrap().len(), flight.headroom.len());
}

#[test]
fn fp16_overflow_of_the_backward_pass_is_named_by_its_first_site() {
    let found = judge(&preflight(&open(&fixture("runs"), "runs/h1-fp16-llama-rare"), 3).unwrap(), "here");
    let skipped = found.iter().find(|f| f.code == Code::PeakNotFinite).expect("its log skips the first steps");
    assert_eq!(skipped.severity, Severity::Warning);
    assert!(skipped.place.ends_with("gradient") && skipped.message.contains("65536"), "{skipped:?}");
}
