//! Fixtures and small builders shared by the tests of this area.

use std::path::{Path, PathBuf};

use serde_json::Value;
use spikeprobe::Result;
use spikeprobe::run::*;

pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A JSON file of tests/fixtures/vectors.
pub fn vector(name: &str) -> Value {
    let path = fixtures().join("vectors").join(name);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

pub fn integers(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|v| v.as_u64().expect("an integer") as u32).collect()
}

pub fn integer(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("not an integer: {value}"))
}

/// sha256 of the numbers as little-endian i64, as the vectors' script hashes them.
pub fn sha256_le_i64(numbers: &[u32]) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for &number in numbers {
        hash.update(i64::from(number).to_le_bytes());
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Opens a run whose configuration is these YAML lines, with `root` as its root.
///
/// `model` names a folder of tests/fixtures/batches.
pub fn open(root: &Path, yaml: &str, versions: &[(&str, &str)]) -> Result<Run> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("train.yaml");
    std::fs::write(&path, format!("stage: sft\nfinetuning_type: lora\ndo_train: true\n{yaml}")).expect("written");
    let versions: Vec<(String, String)> =
        versions.iter().map(|(package, version)| ((*package).into(), (*version).into())).collect();
    Run::open(&path, root, &[], &versions)
}

/// transformers 5.6.0 and LLaMA-Factory 0.9.5.
pub const NEWEST: &[(&str, &str)] = &[("transformers", "5.6.0"), ("accelerate", "1.11.0"), ("llamafactory", "0.9.5")];
/// transformers 4.48.2 and LLaMA-Factory 0.9.2.
pub const OLDER: &[(&str, &str)] = &[("transformers", "4.48.2"), ("accelerate", "1.2.1"), ("llamafactory", "0.9.2")];

/// A configuration and its trainer, for plans without data.
pub fn geometry(yaml: &str, versions: &[(&str, &str)]) -> (TrainConfig, TrainerSemantics) {
    let required = "model_name_or_path: m\ndataset: d\ntemplate: chatml\noutput_dir: o\n";
    let run = open(Path::new("/nonexistent"), &format!("{required}{yaml}"), versions).expect("a valid configuration");
    (run.config, run.semantics)
}

pub fn version(text: &str) -> Version {
    Version::parse(text).unwrap_or_else(|| panic!("not a version: {text}"))
}

/// Token ids and labels (−100 where masked) of the samples behind version_logs/epochs_*.json.
pub fn epoch_samples() -> Vec<(Vec<u32>, Vec<i32>)> {
    let text = std::fs::read_to_string(fixtures().join("batches/epoch_samples.json")).expect("epoch_samples.json");
    let samples: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let list = |v: &Value| -> Vec<i32> { serde_json::from_value(v.clone()).expect("integers") };
    samples.iter().map(|s| (list(&s["ids"]).into_iter().map(|id| id as u32).collect(), list(&s["labels"]))).collect()
}

/// What a sample adds to N.
pub fn label_count(sample: &(Vec<u32>, Vec<i32>)) -> u32 {
    sample.1.iter().filter(|&&label| label != -100).count() as u32
}
