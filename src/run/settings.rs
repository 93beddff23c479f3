//! The configuration as written, with what was laid over it: `--set` wins over training_args.bin wins over the file.
//!
//! Reads the YAML or JSON file and answers typed questions about one key, remembering where each answer came from.
//! Which keys exist and which are refused is in `keys.rs`; which fields they fill, in `config.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Origin;
use crate::{Error, Result};

/// Layers of a configuration.
#[derive(Debug, Clone)]
pub struct Settings {
    path: PathBuf,
    /// As written in the file.
    pub written: BTreeMap<String, Value>,
    overrides: BTreeMap<String, Value>,
    /// What training_args.bin recorded (plain numbers and words only).
    recorded: BTreeMap<String, Value>,
    /// Where each value that was asked for came from.
    pub origins: BTreeMap<String, Origin>,
}

/// Keys of training_args.bin that decide numbers and that nothing rewrites between the YAML and the trainer. Only
/// these are believed over the file, which may have been edited after the run.
const RECORDED: &[&str] = &[
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "tf32",
    "optim",
    "dataloader_drop_last",
    "average_tokens_across_devices",
    "logging_first_step",
    "logging_nan_inf_filter",
    "logging_steps",
];

impl Settings {
    /// Reads a flat YAML or JSON configuration.
    ///
    /// # Errors
    /// Unreadable file, invalid YAML or JSON, not a mapping, nested keys that are no text, unknown keys.
    pub fn read(path: &Path, overrides: &[(String, String)]) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Error::input(format!("cannot be read as text: {e}"))
                .at_path(path)
                .next("name the YAML or JSON that the run was started with")
        })?;
        // PyYAML skips a byte order mark, as Windows editors write it.
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let json = path.extension().is_some_and(|e| e == "json");
        let value: Value = if json {
            super::json::parse(text).map_err(|e| unparsable("JSON", &e.to_string(), path))?
        } else {
            parse_yaml(text).map_err(|e| unparsable("YAML", &e.to_string(), path))?
        };
        let Value::Object(map) = value else {
            return Err(Error::input("a configuration is a flat list of `key: value`")
                .at_path(path)
                .next("name the YAML or JSON that the run was started with"));
        };
        let settings = Self::of(path, map.into_iter().collect(), overrides)?;
        for key in settings.written.keys() {
            super::keys::check_known(key).map_err(|e| e.at(line_of(text, key, path)))?;
        }
        Ok(settings)
    }

    /// Settings that were not read from a configuration file.
    pub fn of(path: &Path, written: BTreeMap<String, Value>, overrides: &[(String, String)]) -> Result<Self> {
        let mut parsed = BTreeMap::new();
        for (key, text) in overrides {
            super::keys::check_known(key).map_err(|e| e.at("--set"))?;
            let value = parse_yaml(text).unwrap_or_else(|_| Value::from(text.as_str()));
            parsed.insert(key.clone(), value);
        }
        Ok(Self {
            path: path.to_owned(),
            written,
            overrides: parsed,
            recorded: BTreeMap::new(),
            origins: BTreeMap::new(),
        })
    }

    /// Lays what training_args.bin recorded over the file.
    #[must_use]
    pub fn with_recorded(mut self, arguments: &Value) -> Self {
        let believed =
            |key: &&str| arguments.get(*key).filter(|v| !v.is_null()).map(|v| ((*key).to_owned(), v.clone()));
        self.recorded = RECORDED.iter().filter_map(believed).collect();
        self
    }

    /// The value in force and where it came from; `None`: the default is.
    pub fn find(&self, key: &str) -> Option<(Value, Origin)> {
        if let Some(value) = self.overrides.get(key) {
            return Some((value.clone(), Origin::Override));
        }
        match (self.written.get(key).filter(|v| !v.is_null()), self.recorded.get(key)) {
            (Some(written), Some(recorded)) if !same(written, recorded) => {
                Some((recorded.clone(), Origin::TrainingArgs))
            }
            (Some(written), _) => Some((written.clone(), Origin::Config)),
            (None, Some(recorded)) => Some((recorded.clone(), Origin::TrainingArgs)),
            (None, None) => None,
        }
    }

    /// Keys whose value in the file is not the one that training_args.bin recorded: key, file, recorded.
    pub fn disagreements(&self) -> Vec<(String, Value, Value)> {
        let differ = |(key, recorded): (&String, &Value)| {
            let written = self.written.get(key)?;
            (!written.is_null() && !same(written, recorded)).then(|| (key.clone(), written.clone(), recorded.clone()))
        };
        self.recorded.iter().filter_map(differ).collect()
    }

    pub fn place(&self, key: &str) -> String {
        if self.overrides.contains_key(key) {
            format!("--set {key}")
        } else {
            format!("{}: {key}", self.path.display())
        }
    }
    pub fn show(&self, value: &Value) -> String {
        value.as_str().map_or_else(|| value.to_string(), |s| format!("`{s}`"))
    }

    /// Reads one key with `read`; a default is not noted in `origins`.
    fn typed<T: PartialEq>(
        &mut self,
        key: &str,
        default: T,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        let Some((value, origin)) = self.find(key).filter(|(value, _)| !value.is_null()) else { return Ok(default) };
        let Some(read) = read(&value) else {
            return Err(Error::input(format!("expected {wanted}, found {}", self.show(&value)))
                .at(self.place(key))
                .next(format!("write {wanted}, or leave {key} out for its default")));
        };
        if origin != Origin::TrainingArgs || read != default {
            self.origins.insert(key.to_owned(), origin);
        }
        Ok(read)
    }

    pub fn float(&mut self, key: &str, default: f64) -> Result<f64> {
        self.typed(key, default, "a finite number", |v| as_float(v).filter(|x| x.is_finite()))
    }
    pub fn maybe_float(&mut self, key: &str) -> Result<Option<f64>> {
        self.typed(key, None, "a finite number", |v| as_float(v).filter(|x| x.is_finite()).map(Some))
    }
    /// An integer from `least` to 2^53.
    pub fn integer(&mut self, key: &str, default: i64, least: i64) -> Result<i64> {
        self.typed(key, default, &format!("a whole number of at least {least}"), |v| {
            as_integer(v).filter(|&i| i >= least)
        })
    }
    pub fn maybe_integer(&mut self, key: &str, least: i64) -> Result<Option<i64>> {
        self.typed(key, None, &format!("a whole number of at least {least}"), |v| {
            as_integer(v).filter(|&i| i >= least).map(Some)
        })
    }
    pub fn flag(&mut self, key: &str, default: bool) -> Result<bool> {
        self.typed(key, default, "true or false", as_flag)
    }
    pub fn maybe_flag(&mut self, key: &str, default: Option<bool>) -> Result<Option<bool>> {
        self.typed(key, default, "true or false", |v| as_flag(v).map(Some))
    }
    pub fn text(&mut self, key: &str, default: &str) -> Result<String> {
        self.typed(key, default.to_owned(), "a word", as_text)
    }
    pub fn maybe_text(&mut self, key: &str) -> Result<Option<String>> {
        self.typed(key, None, "a word", |v| as_text(v).map(Some))
    }
    pub fn maybe_path(&mut self, key: &str) -> Result<Option<PathBuf>> {
        // `resume_from_checkpoint: true` and `deepspeed: {…}` name no file.
        self.typed(key, None, "a path", |v| match v {
            Value::String(s) => Some(Some(PathBuf::from(s))),
            Value::Bool(_) | Value::Object(_) => Some(None),
            _ => None,
        })
    }
    /// A list, or text split at commas as LLaMA-Factory does.
    pub fn words(&mut self, key: &str) -> Result<Vec<String>> {
        self.typed(key, Vec::new(), "a list of words", |v| match v {
            Value::Array(items) => items.iter().map(as_text).collect(),
            _ => Some(as_text(v)?.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect()),
        })
    }
    /// A mapping; text is parsed as JSON, as LLaMA-Factory does.
    pub fn mapping(&mut self, key: &str) -> Result<BTreeMap<String, Value>> {
        self.typed(key, BTreeMap::new(), "a mapping", |v| {
            let parsed: Value;
            let map = match v {
                Value::String(s) => {
                    parsed = super::json::parse(s).ok()?;
                    parsed.as_object()?
                }
                _ => v.as_object()?,
            };
            Some(map.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
        })
    }
}

/// YAML → JSON values; `.nan` and `.inf`, which JSON lacks, become the tokens of `json.rs` instead of null.
fn parse_yaml(text: &str) -> std::result::Result<Value, serde_yaml_ng::Error> {
    use serde_yaml_ng::Value as Y;
    fn key(value: Y) -> String {
        value.as_str().map_or_else(|| convert(value.clone()).to_string(), str::to_owned)
    }
    fn convert(value: Y) -> Value {
        match value {
            Y::Number(n) if n.as_f64().is_some_and(|x| !x.is_finite()) => {
                super::json::number(n.as_f64().unwrap_or(f64::NAN))
            }
            Y::Sequence(items) => items.into_iter().map(convert).collect(),
            Y::Mapping(map) => Value::Object(map.into_iter().map(|(k, v)| (key(k), convert(v))).collect()),
            Y::Tagged(tagged) => convert(tagged.value),
            plain => serde_json::to_value(plain).unwrap_or(Value::Null),
        }
    }
    serde_yaml_ng::from_str(text).map(convert)
}

/// Number, or text that PyYAML leaves as text and LLaMA-Factory turns into one (`1e-4`, `1_000`).
pub fn as_float(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().replace('_', "").parse().ok(),
        _ => None,
    }
}

fn as_integer(value: &Value) -> Option<i64> {
    // 2^53: above it f64 cannot tell neighbours apart.
    const LARGEST: f64 = 9_007_199_254_740_992.0;
    value.as_i64().or_else(|| as_float(value).filter(|x| x.fract() == 0.0 && x.abs() <= LARGEST).map(|x| x as i64))
}

fn as_flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(b) => Some(*b),
        // YAML 1.1, which PyYAML reads, has these words for booleans.
        Value::String(s) => match s.trim().to_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => Some(true),
            "false" | "no" | "off" | "0" => Some(false),
            _ => None,
        },
        Value::Number(n) => match n.as_i64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        _ => None,
    }
}

/// A word; numbers and flags as they would be written.
pub fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(s) => Some(s.clone()),
        Value::Number(n) => Some(n.to_string()),
        Value::Bool(b) => Some(b.to_string()),
        _ => None,
    }
}

/// Equal as numbers, flags or words.
fn same(a: &Value, b: &Value) -> bool {
    match (as_float(a), as_float(b)) {
        (Some(x), Some(y)) => x == y,
        _ => match (as_flag(a), as_flag(b)) {
            (Some(x), Some(y)) => x == y,
            _ => a == b,
        },
    }
}

/// `file:line` of a top-level key, or the file.
pub fn line_of(text: &str, key: &str, path: &Path) -> String {
    let found = text.lines().position(|line| {
        line.trim_start()
            .trim_start_matches('"')
            .strip_prefix(key)
            .is_some_and(|rest| rest.trim_start_matches('"').trim_start().starts_with(':'))
    });
    match found {
        Some(index) => format!("{}:{}", path.display(), index + 1),
        None => path.display().to_string(),
    }
}

fn unparsable(language: &str, reason: &str, path: &Path) -> Error {
    Error::input(format!("invalid {language}: {reason}"))
        .at_path(path)
        .next("correct that line, or name the configuration that the run was started with")
}
