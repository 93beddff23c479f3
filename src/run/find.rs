//! What a path means: a configuration file, a folder with one, or the output folder of a trainer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::checkpoint::read_training_args;
use super::settings::Settings;
use super::{Checkpoint, keys};
use crate::{Error, Result};

/// Stands for what only the YAML would tell.
pub const UNKNOWN: &str = "(unknown)";

/// The configuration that `path` means, and its settings. `strict`: it is to be replayed, so that nothing may be
/// missing.
pub fn settings(path: &Path, overrides: &[(String, String)], strict: bool) -> Result<(PathBuf, Settings)> {
    let missing = match config_file(path) {
        Ok(file) => {
            let mut settings = Settings::read(&file, overrides)?;
            if !strict {
                for key in ["dataset", "template"] {
                    settings.written.entry(key.to_owned()).or_insert_with(|| Value::from(UNKNOWN));
                }
            }
            return Ok((file, settings));
        }
        Err(e) => e,
    };
    match arguments_file(path).filter(|_| !strict) {
        Some(file) => {
            let written = from_output(path, &read_training_args(&file)?)?;
            let settings = Settings::of(&file, written, overrides)?;
            Ok((file, settings))
        }
        None => Err(missing),
    }
}

/// training_args.bin of an output folder or of its newest checkpoint.
fn arguments_file(folder: &Path) -> Option<PathBuf> {
    let own = folder.join("training_args.bin");
    if own.is_file() {
        return Some(own);
    }
    let checkpoints = Checkpoint::list(folder).ok()?;
    checkpoints.iter().rev().map(|c| c.dir.join("training_args.bin")).find(|p| p.is_file())
}

/// A configuration from what the output folder records: TrainingArguments and the adapter's own configuration.
fn from_output(folder: &Path, arguments: &Value) -> Result<BTreeMap<String, Value>> {
    let folder = std::path::absolute(folder).map_err(|e| Error::input(e.to_string()).at_path(folder))?;
    let fields = arguments.as_object().into_iter().flatten();
    let mut written: BTreeMap<String, Value> = fields
        .filter(|(key, value)| keys::check_known(key).is_ok() && !value.is_null())
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    // These hold recorded internals, not what a user would write.
    for key in ["accelerator_config", "deepspeed", "fsdp", "fsdp_config", "parallelism_config", "evaluation_strategy"] {
        written.remove(key);
    }
    let adapter = Checkpoint::list(&folder)?.into_iter().rev().find_map(|c| c.adapter_config()).unwrap_or(Value::Null);
    for (key, name) in [
        ("lora_rank", "r"),
        ("lora_alpha", "lora_alpha"),
        ("lora_dropout", "lora_dropout"),
        ("lora_target", "target_modules"),
        ("use_rslora", "use_rslora"),
        ("model_name_or_path", "base_model_name_or_path"),
    ] {
        if let Some(value) = adapter.get(name).filter(|v| !v.is_null()) {
            written.insert(key.to_owned(), value.clone());
        }
    }
    for key in ["model_name_or_path", "dataset", "template"] {
        written.entry(key.to_owned()).or_insert_with(|| Value::from(UNKNOWN));
    }
    written.insert("output_dir".to_owned(), Value::from(folder.display().to_string()));
    Ok(written)
}

/// The configuration that `path` means.
fn config_file(path: &Path) -> Result<PathBuf> {
    if path.is_file() {
        return Ok(path.to_owned());
    }
    if !path.is_dir() {
        return Err(Error::input("no such file or folder")
            .at_path(path)
            .next("give a LLaMA-Factory YAML or its folder"));
    }
    let preferred = path.join("train.yaml");
    if preferred.is_file() {
        return Ok(preferred);
    }
    let entries = std::fs::read_dir(path).map_err(|e| Error::input(e.to_string()).at_path(path))?;
    let mut found: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_config(p)).collect();
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Error::input("the folder holds no configuration")
            .at_path(path)
            .next("give the YAML that the run was started with (a file with model_name_or_path, dataset, output_dir)")),
        several => {
            let names: Vec<_> = several.iter().filter_map(|p| p.file_name()?.to_str()).collect();
            Err(Error::input(format!("several configurations: {}", names.join(", ")))
                .at_path(path)
                .next("name one of them instead of the folder"))
        }
    }
}

/// A YAML or JSON file that names a model.
fn is_config(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    let names = |text: &str| match extension {
        // Quoted: PEFT's adapter_config.json has base_model_name_or_path.
        "json" => text.contains("\"model_name_or_path\""),
        _ => text.lines().any(|line| line.starts_with("model_name_or_path")),
    };
    matches!(extension, "yaml" | "yml" | "json") && std::fs::read_to_string(path).is_ok_and(|text| names(&text))
}
