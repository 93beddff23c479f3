//! The eval_loss of a checkpoint against transformers' Trainer.evaluate.

use std::path::Path;
use std::sync::Arc;

use spikeprobe::Result;
use spikeprobe::batches::Corpus;
use spikeprobe::device::cpu::CpuDevice;
use spikeprobe::inspect::evaluate::{Evaluation, evaluate};
use spikeprobe::model::{BaseModel, Engine};
use spikeprobe::run::Run;

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn copy(from: &Path, into: &Path) {
    std::fs::create_dir_all(into).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, into.join(path.file_name().unwrap())).unwrap();
    }
}

/// Evaluates the tiny model's checkpoint-2 over the rows of tests/fixtures/eval.
fn evaluated(extra: &str) -> Result<Vec<Evaluation>> {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    copy(&fixture("vectors/tiny_llama/base"), &root.join("model"));
    copy(&fixture("eval/run/tokenizer"), &root.join("model"));
    copy(&fixture("eval/run/data"), &root.join("data"));
    copy(&fixture("vectors/tiny_llama/checkpoint-2"), &root.join("out/checkpoint-2"));
    let yaml = "model_name_or_path: model\nstage: sft\ndo_train: true\nfinetuning_type: lora\nlora_rank: 4\nlora_alpha: 8\n\
                lora_target: all\ndataset: train\ntemplate: empty\noutput_dir: out\ndataset_dir: data\nuse_cpu: true\n\
                per_device_train_batch_size: 2\nmax_steps: 3\n";
    std::fs::write(root.join("train.yaml"), format!("{yaml}{extra}")).unwrap();
    let versions = [("transformers", "5.6.0"), ("accelerate", "1.11.0"), ("llamafactory", "0.9.5")];
    let versions: Vec<_> = versions.iter().map(|&(name, version)| (name.to_string(), version.to_string())).collect();
    let run = Run::open(root, root, &[], &versions)?;
    let corpus = Corpus::load(&run, &run.config)?;
    let base = Arc::new(BaseModel::open(&root.join("model"))?);
    let engine = Engine::new(Arc::new(CpuDevice::new(Some(2))?), base, run.precision()?.plan)?;
    evaluate(&run, &corpus, &engine)
}

#[test]
fn eval_loss_weights_batches_by_rows_as_the_trainer_does() {
    let text = std::fs::read_to_string(fixture("eval/expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (batch, key) in [(4, "batch_4"), (1, "batch_1")] {
        let points = evaluated(&format!("eval_dataset: held_out\nper_device_eval_batch_size: {batch}\n")).unwrap();
        let [point] = points.as_slice() else { panic!("one checkpoint, one set: {points:?}") };
        let expected = expected[key].as_f64().unwrap();
        assert_eq!((point.step, point.rows, point.logged), (2, 11, None));
        assert!((point.loss - expected).abs() <= 2e-6, "{key}: {} against {expected}", point.loss);
    }
}

#[test]
fn a_run_without_evaluation_data_says_which_keys_give_it_some() {
    let message = evaluated("").expect_err("nothing to evaluate").to_string();
    assert!(message.contains("val_size") && message.contains("eval_dataset"), "{message}");
}
