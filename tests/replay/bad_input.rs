//! A real run with one thing broken: the message names the file, the key or tensor, and what to do. Nothing panics.

use std::path::{Path, PathBuf};

use serde_json::Value;
use spikeprobe::Result;
use spikeprobe::replay::{Replayer, Silent, Source, Start};

const RUN: &str = "runs/a8-lr-stage2-llama-fp32";
const MODEL: &str = "models/tiny-llama-fp32";
const STARTED_FROM: &str = "runs/k1-healthy-mem-llama-bf16/out/checkpoint-48";

/// A copy of the demonstration's run that a test may break.
struct Copy(tempfile::TempDir);

impl Copy {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("demo"), folder.path());
        Self(folder)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn bytes(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.path(file)).expect(file);
        change(&mut bytes);
        std::fs::write(self.path(file), bytes).expect(file);
    }

    fn json(&self, file: &str, change: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&std::fs::read(self.path(file)).expect(file)).expect("JSON");
        change(&mut value);
        std::fs::write(self.path(file), value.to_string()).expect(file);
    }

    fn replay(&self, start: Start, to: u64) -> Result<()> {
        let root = self.0.path().to_owned();
        let source = Source { path: root.join(RUN), root, ..Source::default() };
        let device = spikeprobe::device::open("cpu", Some(1)).expect("cpu");
        Replayer::open(source, device)?.replay(&start, to, &[], &mut Silent)?;
        Ok(())
    }

    /// The replay fails with all of `parts` in its message, and says what to do.
    #[track_caller]
    fn refused_from(&self, start: Start, parts: &[&str]) {
        let to = if start == Start::Initial { 1 } else { 3 };
        let error = self.replay(start, to).expect_err("an error");
        let message = error.to_string();
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
        assert!(error.next.is_some(), "nothing to try: {message}");
        assert_eq!(error.exit_code(), 1, "{message}");
    }

    #[track_caller]
    fn refused(&self, parts: &[&str]) {
        self.refused_from(Start::Initial, parts);
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("folder");
    for entry in std::fs::read_dir(from).expect("list").flatten() {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() { copy(&entry.path(), &target) } else { drop(std::fs::copy(entry.path(), target)) }
    }
}

/// Where the data of a safetensors file's tensor begins.
fn offset(bytes: &[u8], tensor: &str) -> usize {
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    let json: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("header");
    8 + header + json[tensor]["data_offsets"][0].as_u64().expect(tensor) as usize
}

#[test]
fn the_copy_itself_replays() {
    Copy::new().replay(Start::Initial, 1).expect("a whole run");
}

#[test]
fn truncated_and_corrupt_files_are_named() {
    let weights = format!("{MODEL}/model.safetensors");
    let optimizer = format!("{RUN}/out/checkpoint-2/optimizer.pt");
    let adapter = format!("{RUN}/out/checkpoint-2/adapter_model.safetensors");
    let run = Copy::new();
    run.bytes(&weights, |b| b.truncate(100_000));
    run.refused(&["model.safetensors", "truncated"]);
    let run = Copy::new();
    run.bytes(&weights, |b| b[8..40].fill(b'x'));
    run.refused(&["model.safetensors", "header"]);
    for damage in [|b: &mut Vec<u8>| b.truncate(b.len() / 2), |b: &mut Vec<u8>| b[100..140].fill(0xff)] {
        let run = Copy::new();
        run.bytes(&optimizer, damage);
        run.refused_from(Start::Checkpoint(2), &["optimizer.pt", "not a readable torch.save file"]);
        let run = Copy::new();
        run.bytes(&adapter, damage);
        run.refused_from(Start::Checkpoint(2), &["adapter_model.safetensors"]);
    }
    let run = Copy::new();
    run.bytes(&format!("{RUN}/train.yaml"), |b| b.extend(b"\nseed: [1\n"));
    run.refused(&["train.yaml", "invalid YAML"]);
    let run = Copy::new();
    run.bytes(&format!("{RUN}/data/train.json"), |b| b.truncate(3000));
    run.refused(&["train.json", "not valid JSON", "line"]);
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_configuration() {
    let run = Copy::new();
    run.bytes(&format!("{RUN}/train.yaml"), |b| drop(b.splice(0..0, *b"\xef\xbb\xbf")));
    run.replay(Start::Initial, 1).expect("PyYAML reads it, too");
}

#[test]
fn numbers_that_would_fill_the_memory_are_refused() {
    let run = Copy::new();
    run.json(&format!("{RUN}/data/dataset_info.json"), |info| info["train"]["num_samples"] = u64::MAX.into());
    run.refused(&["dataset_info.json", "train", "num_samples"]);
    let run = Copy::new();
    run.json(&format!("{MODEL}/config.json"), |config| config["num_hidden_layers"] = 1_000_000_000.into());
    run.refused(&["config.json", "num_hidden_layers"]);
    for (key, value) in [("lora_rank", "2147483647"), ("weight_decay", "-1"), ("adam_epsilon", "-1")] {
        let run = Copy::new();
        let text =
            String::from_utf8(std::fs::read(run.path(&format!("{RUN}/train.yaml"))).expect("yaml")).expect("text");
        let kept: String = text.lines().filter(|l| !l.starts_with(key)).map(|l| format!("{l}\n")).collect();
        std::fs::write(run.path(&format!("{RUN}/train.yaml")), format!("{kept}{key}: {value}\n")).expect("written");
        run.refused(&["train.yaml", key]);
    }
}

#[test]
fn configurations_that_are_none_are_named_with_a_remedy() {
    for content in [b"".as_slice(), b"- a", b"\xff\xfe\x00"] {
        let run = Copy::new();
        std::fs::write(run.path(&format!("{RUN}/train.yaml")), content).expect("written");
        run.refused(&["train.yaml"]);
    }
}

#[test]
fn missing_files_are_named() {
    for (file, parts) in [
        (format!("{MODEL}/model.safetensors"), ["tiny-llama-fp32", "model.safetensors"]),
        (format!("{MODEL}/tokenizer.json"), ["tokenizer.json", "save_pretrained"]),
        (format!("{RUN}/data/train.json"), ["dataset `train`", "does not exist"]),
        (format!("{STARTED_FROM}/adapter_config.json"), ["checkpoint-48", "adapter_config.json"]),
    ] {
        let run = Copy::new();
        std::fs::remove_file(run.path(&file)).expect("removed");
        run.refused(&parts);
    }
}

#[test]
fn files_that_do_not_fit_each_other_are_named() {
    let run = Copy::new();
    run.json(&format!("{MODEL}/config.json"), |config| config["hidden_size"] = 96.into());
    run.refused(&["model.embed_tokens.weight", "[2048, 128]", "config.json"]);
    let run = Copy::new();
    run.json(&format!("{STARTED_FROM}/adapter_config.json"), |config| config["r"] = 4.into());
    run.refused(&["adapter_config.json", "r is 4", "rank 8"]);
    let run = Copy::new();
    run.json(&format!("{MODEL}/tokenizer.json"), |tokenizer| {
        for id in tokenizer["model"]["vocab"].as_object_mut().expect("vocabulary").values_mut() {
            *id = (id.as_u64().expect("an id") + 50_000).into();
        }
    });
    run.refused(&["token id", "2048"]);
    let run = Copy::new();
    std::fs::write(run.path(&format!("{RUN}/data/train.json")), "[]").expect("written");
    run.refused(&["dataset train", "no usable training row"]);
}

#[test]
fn a_base_weight_that_is_no_number_is_named_instead_of_a_loss_of_zero() {
    let tensor = "model.layers.1.mlp.up_proj.weight";
    let run = Copy::new();
    run.bytes(&format!("{MODEL}/model.safetensors"), |b| {
        let at = offset(b, tensor);
        b[at..at + 4].fill(0xff);
    });
    run.refused(&["tiny-llama-fp32", tensor, "NaN", "base model"]);
}

#[test]
fn a_half_last_log_line_and_a_lost_state_file_stop_nothing() {
    let run = Copy::new();
    run.bytes(&format!("{RUN}/out/trainer_log.jsonl"), |b| b.extend(b"{\"current_steps\": 25, \"los"));
    run.replay(Start::Initial, 1).expect("the line is left out");
    run.bytes(&format!("{RUN}/out/trainer_state.json"), |b| b.truncate(20));
    run.replay(Start::Initial, 1).expect("the file is left out");
}
