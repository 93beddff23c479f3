//! The eval_loss of a checkpoint against transformers' Seq2SeqTrainer.evaluate and against LLaMA-Factory's own log.

use std::path::Path;
use std::sync::Arc;

use spikeprobe::Result;
use spikeprobe::device::cpu::CpuDevice;
use spikeprobe::inspect::evaluate::{Evaluation, curve, eval_loss, to_json};
use spikeprobe::replay::{Replayer, Source};

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn copy(from: &Path, into: &Path) {
    std::fs::create_dir_all(into).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            copy(&path, &into.join(path.file_name().unwrap()));
        } else {
            std::fs::copy(&path, into.join(path.file_name().unwrap())).unwrap();
        }
    }
}

fn open(root: &Path) -> Result<Replayer> {
    let versions = [("transformers", "5.6.0"), ("accelerate", "1.11.0"), ("llamafactory", "0.9.5")];
    let versions = versions.iter().map(|&(name, version)| (name.to_string(), version.to_string())).collect();
    let source = Source { path: root.into(), root: root.into(), overrides: Vec::new(), versions, cache: None };
    Replayer::open(source, Arc::new(CpuDevice::new(Some(2))?))
}

/// The tiny model with a tokenizer, its checkpoint-2 as the run's, the evaluation rows of tests/fixtures/eval.
fn tiny(root: &Path, extra: &str) -> Result<Replayer> {
    copy(&fixture("vectors/tiny_llama/base"), &root.join("model"));
    copy(&fixture("eval/run/tokenizer"), &root.join("model"));
    copy(&fixture("eval/run/data"), &root.join("data"));
    copy(&fixture("vectors/tiny_llama/checkpoint-2"), &root.join("out/checkpoint-2"));
    let yaml = "model_name_or_path: model\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 4\nlora_alpha: 8\n\
                lora_target: all\ndataset: train\ntemplate: empty\noutput_dir: out\ndataset_dir: data\nuse_cpu: true\n\
                per_device_train_batch_size: 2\nmax_steps: 3\noverwrite_output_dir: true\n";
    std::fs::write(root.join("train.yaml"), format!("{yaml}{extra}")).unwrap();
    open(root)
}

fn evaluated(extra: &str, every: Option<u64>) -> Result<Vec<Evaluation>> {
    let root = tempfile::tempdir().unwrap();
    curve(&tiny(root.path(), extra)?, every, &mut |_| {})
}

#[test]
fn eval_loss_weights_batches_equally_as_the_trainer_does() {
    let text = std::fs::read_to_string(fixture("eval/expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (batch, key) in [(4, "batch_4"), (1, "batch_1")] {
        let points =
            evaluated(&format!("eval_dataset: held_out\nper_device_eval_batch_size: {batch}\n"), None).unwrap();
        let [point] = points.as_slice() else { panic!("one checkpoint, one set: {points:?}") };
        let expected = expected[key].as_f64().unwrap();
        assert_eq!((point.step, point.from_checkpoint, point.logged), (2, true, None));
        assert!((point.loss - expected).abs() <= 2e-6, "{key}: {} against {expected}", point.loss);
    }
}

/// fixtures/eval/lf_fp32: a LLaMA-Factory run in fp32 whose own log has six evaluations.
#[test]
fn eval_loss_equals_the_log_of_a_real_run_at_its_checkpoints_and_between_them() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    copy(&fixture("eval/lf_fp32"), root);
    copy(&fixture("runs/models/tiny-qwen2-fp32"), &root.join("model"));
    let replayer = open(root).unwrap();
    let points = curve(&replayer, Some(2), &mut |_| {}).unwrap();
    let origins: Vec<(u64, bool)> = points.iter().map(|p| (p.step, p.from_checkpoint)).collect();
    assert_eq!(origins, [(2, false), (4, true), (6, false), (8, true), (10, false), (12, false)]);
    for point in &points {
        // Asked: 1e-4 of the logged value. A checkpoint's own weights leave only the order of sums.
        let limit = if point.from_checkpoint { 1e-6 } else { 1e-5 };
        let deviation = point.deviation().expect("the log has every second step");
        assert!(deviation <= limit, "{point:?} is off by {deviation:e}");
    }
}

#[test]
fn replayed_steps_fill_the_curve_between_checkpoints() {
    let root = tempfile::tempdir().unwrap();
    let replayer = tiny(root.path(), "eval_dataset: held_out\n").unwrap();
    let mut told = 0;
    let points = curve(&replayer, Some(1), &mut |_| told += 1).unwrap();
    let steps: Vec<(u64, bool)> = points.iter().map(|point| (point.step, point.from_checkpoint)).collect();
    assert_eq!(steps, [(1, false), (2, true), (3, false)]);
    assert_eq!(told, 3);
    assert!(points.iter().all(|point| point.loss.is_finite()));
    let json = to_json(replayer.scene(), &points);
    assert_eq!(json["schema"], "spikeprobe.eval/1");
    assert_eq!(json["sets"][0]["evaluations"].as_array().map(Vec::len), Some(3));
    assert_eq!(json["sets"][0]["rows"], 11);
}

#[test]
fn over_several_ranks_the_rows_that_fill_the_last_batch_count() {
    let root = tempfile::tempdir().unwrap();
    let replayer = tiny(root.path(), "eval_dataset: held_out\nper_device_eval_batch_size: 1\n").unwrap();
    let scene = replayer.scene();
    let rows = &scene.corpus.eval[0].1;
    let adapter = checkpoint(&replayer);
    let loss = |rows: &[spikeprobe::batches::Example], world_size| {
        let config = spikeprobe::run::TrainConfig { world_size, ..scene.run.config.clone() };
        eval_loss(&scene.engine, &adapter, rows, &config, scene.corpus.vocab_size).unwrap().0
    };
    // 11 rows over 2 ranks: row 0 fills the twelfth place.
    let (one, two, first) = (loss(rows, 1), loss(rows, 2), loss(&rows[..1], 1));
    assert!((two - (11.0 * one + first) / 12.0).abs() < 1e-6, "{two} from {one} and {first}");
    assert!((two - one).abs() > 1e-4, "the test must see the difference");
}

fn checkpoint(replayer: &Replayer) -> spikeprobe::model::Adapter {
    let scene = replayer.scene();
    let weights = scene.run.checkpoints[0].adapter().unwrap();
    let engine = &scene.engine;
    let targets = &scene.run.config.lora_target;
    spikeprobe::model::Adapter::new(engine.device(), engine.config(), targets, &weights, 2.0, engine.plan().adapter)
        .unwrap()
}

#[test]
fn rows_without_a_label_make_the_loss_nan_and_are_counted() {
    let root = tempfile::tempdir().unwrap();
    let replayer = tiny(root.path(), "eval_dataset: held_out\nper_device_eval_batch_size: 1\n").unwrap();
    let scene = replayer.scene();
    let mut rows = scene.corpus.eval[0].1.clone();
    rows[3].labels.fill(spikeprobe::batches::IGNORE);
    let (loss, unlabelled) =
        eval_loss(&scene.engine, &checkpoint(&replayer), &rows, &scene.run.config, scene.corpus.vocab_size).unwrap();
    assert!(loss.is_nan());
    assert_eq!(unlabelled, 1);
}

#[test]
fn a_run_without_evaluation_data_says_which_keys_give_it_some() {
    let message = evaluated("", None).expect_err("nothing to evaluate").to_string();
    assert!(message.contains("val_size") && message.contains("eval_dataset"), "{message}");
}

#[test]
fn the_page_shows_every_evaluation_and_what_the_log_lacks() {
    let root = tempfile::tempdir().unwrap();
    let replayer = tiny(root.path(), "eval_dataset: held_out\n").unwrap();
    let points = curve(&replayer, Some(1), &mut |_| {}).unwrap();
    let page = spikeprobe::inspect::evaluation_page::html(replayer.scene(), &points);
    for point in &points {
        assert!(page.contains(&format!("{:.6}", point.loss)), "step {} is missing", point.step);
    }
    assert!(page.contains("None of it is in the log.") && page.contains("<svg"));
    assert!(!page.contains("http://") && !page.contains("https://"), "no request leaves the page");
}
