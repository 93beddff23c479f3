//! Library versions of a run: given on the command line, written beside the configuration, or inferred.
//!
//! Inference reads what each version leaves behind: fields of TrainingArguments and TrainerState that exist only in
//! some versions (compared field by field between the sources of 4.45.2 … 5.6.0), decimals of the loss, the shift of
//! the learning rate, the number of steps (contract 14). What follows from a version is in `semantics.rs`.

use std::path::Path;

use serde_json::Value;

use super::state_file::TrainerState;
use super::{Version, Versions};
use crate::{Error, Result};

impl Version {
    /// Parses `4.48.2`, `2.8`, `0.9.4.dev0`, `2.15.0+cu132`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split(['.', '+', '-']);
        let major = parts.next()?.parse().ok()?;
        let mut next = || {
            parts.next().map_or(Some(0), |p| {
                let digits = p.len() - p.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                if digits == 0 { Some(0) } else { p[..digits].parse().ok() }
            })
        };
        Some(Self(major, next()?, next()?))
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What the run's files show about the versions that wrote them.
#[derive(Debug, Default)]
pub struct VersionEvidence<'a> {
    /// State of the trainer, as the run left it.
    pub state: Option<&'a TrainerState>,
    /// training_args.bin as JSON.
    pub arguments: Option<&'a Value>,
    /// `peft_version` of a checkpoint's adapter_config.json.
    pub adapter_peft: Option<String>,
    pub gradient_accumulation_steps: Option<f64>,
    pub model_type: Option<&'a str>,
}

impl Versions {
    /// True also where the version is unknown: the newest behaviour is assumed.
    pub fn transformers_at_least(&self, major: u32, minor: u32) -> bool {
        self.transformers.as_ref().is_none_or(|(v, _)| *v >= Version(major, minor, 0))
    }

    fn slot(&mut self, name: &str) -> Option<&mut Option<(Version, String)>> {
        Some(match name {
            "llamafactory" | "llama-factory" | "llama_factory" => &mut self.llamafactory,
            "transformers" => &mut self.transformers,
            "accelerate" => &mut self.accelerate,
            "peft" => &mut self.peft,
            "torch" | "pytorch" => &mut self.torch,
            _ => return None,
        })
    }

    /// Name, version, origin of all that are known.
    pub fn list(&self) -> Vec<(&'static str, Version, &str)> {
        [
            ("llamafactory", &self.llamafactory),
            ("transformers", &self.transformers),
            ("accelerate", &self.accelerate),
            ("peft", &self.peft),
            ("torch", &self.torch),
        ]
        .into_iter()
        .filter_map(|(name, slot)| slot.as_ref().map(|(v, origin)| (name, *v, origin.as_str())))
        .collect()
    }

    /// Versions of a run, strongest source first: `given`, `versions.json` beside the configuration, the evidence.
    ///
    /// # Errors
    /// Unknown package names or unreadable versions in `given`; an unreadable versions.json.
    pub fn resolve(given: &[(String, String)], beside: Option<&Path>, evidence: &VersionEvidence<'_>) -> Result<Self> {
        let mut versions = Self::default();
        for (name, text) in given {
            let version = Version::parse(text).ok_or_else(|| {
                Error::usage(format!("`{text}` is no version")).at("--versions").next("write transformers=4.48.2")
            })?;
            let Some(slot) = versions.slot(name) else {
                return Err(Error::usage(format!("unknown package `{name}`"))
                    .at("--versions")
                    .next("llamafactory, transformers, accelerate, peft and torch are known"));
            };
            *slot = Some((version, "--versions".to_owned()));
        }
        if let Some(path) = beside.filter(|p| p.is_file()) {
            versions.read_file(path)?;
        }
        versions.infer(evidence);
        Ok(versions)
    }

    fn read_file(&mut self, path: &Path) -> Result<()> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::input(e.to_string()).at_path(path))?;
        let value: Value = super::json::parse(&text)
            .map_err(|e| Error::input(format!("invalid JSON: {e}")).at_path(path).next("repair or remove the file"))?;
        for (name, version) in value.as_object().into_iter().flatten() {
            let Some(slot) = self.slot(name).filter(|slot| slot.is_none()) else { continue };
            let parsed = version.as_str().and_then(Version::parse).ok_or_else(|| {
                Error::input(format!("{version} is no version")).at(name).at_path(path).next("write \"4.48.2\"")
            })?;
            *slot = Some((parsed, "versions.json".to_owned()));
        }
        Ok(())
    }

    fn infer(&mut self, evidence: &VersionEvidence<'_>) {
        let peft = evidence.adapter_peft.as_deref().and_then(Version::parse);
        if self.peft.is_none() {
            self.peft = peft.map(|v| (v, "peft_version in adapter_config.json".to_owned()));
        }
        if self.transformers.is_none() {
            self.transformers = infer_transformers(evidence);
        }
        let Some((transformers, _)) = self.transformers else { return };
        // The stack that LLaMA-Factory's own requirements allow for this transformers (contract 1, 7.4).
        let (factory, accelerate) = match transformers {
            v if v >= Version(5, 0, 0) => (Version(0, 9, 5), Version(1, 11, 0)),
            v if v >= Version(4, 52, 0) => (Version(0, 9, 4), Version(1, 7, 0)),
            v if v >= Version(4, 49, 0) => (Version(0, 9, 3), Version(1, 5, 2)),
            _ => (Version(0, 9, 2), Version(1, 2, 1)),
        };
        let why = format!("assumed: what was used with transformers {transformers}");
        self.llamafactory.get_or_insert_with(|| (factory, why.clone()));
        self.accelerate.get_or_insert((accelerate, why));
    }
}

/// A range of transformers versions that the evidence leaves, narrowed fact by fact.
struct Range {
    least: Version,
    /// First version that is too new.
    below: Version,
    /// The facts that set `least` and `below`.
    why: [Option<String>; 2],
}

impl Range {
    fn at_least(&mut self, major: u32, minor: u32, why: &str) {
        let v = Version(major, minor, 0);
        if v > self.least {
            self.least = v;
            self.why[0] = Some(why.to_owned());
        }
    }
    fn below(&mut self, major: u32, minor: u32, why: &str) {
        let v = Version(major, minor, 0);
        if v < self.below {
            self.below = v;
            self.why[1] = Some(why.to_owned());
        }
    }
}

/// Releases whose behaviour was read or run; inference answers with the newest of the range.
const REPRESENTATIVES: [Version; 10] = [
    Version(5, 6, 0),
    Version(4, 57, 1),
    Version(4, 55, 4),
    Version(4, 53, 3),
    Version(4, 52, 4),
    Version(4, 51, 3),
    Version(4, 49, 0),
    Version(4, 48, 2),
    Version(4, 46, 3),
    Version(4, 45, 2),
];

fn infer_transformers(evidence: &VersionEvidence<'_>) -> Option<(Version, String)> {
    let mut range = Range { least: Version(0, 0, 0), below: Version(99, 0, 0), why: [None, None] };
    if let Some(arguments) = evidence.arguments.and_then(Value::as_object) {
        from_arguments(&mut range, |key| arguments.contains_key(key));
    }
    if let Some(state) = evidence.state {
        from_state(&mut range, state, evidence.gradient_accumulation_steps);
    }
    if evidence.model_type == Some("qwen3") {
        range.at_least(4, 51, "the model type qwen3");
    }
    let version = REPRESENTATIVES.into_iter().find(|v| *v >= range.least && *v < range.below)?;
    let Range { least, below, why } = range;
    let left = match &why {
        [None, None] => return None,
        [Some(_), None] => format!("any from {least} on fits"),
        [None, Some(_)] => format!("any before {below} fits"),
        [Some(_), Some(_)] => format!("any from {least} to before {below} fits"),
    };
    let why: Vec<String> = why.into_iter().flatten().collect();
    Some((version, format!("inferred from {}; {left}", why.join(" and "))))
}

/// Fields of TrainingArguments that came or went (sources of 4.45.2, 4.46.3, 4.48.2, 4.51.3, 4.52.4, 4.53.3,
/// 4.56.2, 4.57.1 and 5.6.0 compared).
fn from_arguments(range: &mut Range, has: impl Fn(&str) -> bool) {
    let tell = |field: &str| format!("{field} in training_args.bin");
    for (field, major, minor) in [
        ("average_tokens_across_devices", 4, 46),
        ("tp_size", 4, 49),
        ("liger_kernel_config", 4, 53),
        ("parallelism_config", 4, 56),
        ("trackio_space_id", 4, 57),
        ("enable_jit_checkpoint", 5, 0),
    ] {
        if has(field) {
            range.at_least(major, minor, &tell(field));
        }
    }
    for (field, major, minor) in
        [("evaluation_strategy", 4, 51), ("tp_size", 4, 52), ("use_ipex", 4, 57), ("no_cuda", 5, 0)]
    {
        if has(field) {
            range.below(major, minor, &tell(field));
        }
    }
    // Only where the file is a TrainingArguments at all.
    if has("learning_rate") {
        for (field, major, minor) in
            [("average_tokens_across_devices", 4, 46), ("liger_kernel_config", 4, 53), ("parallelism_config", 4, 56)]
        {
            if !has(field) {
                range.below(major, minor, &format!("no {field} in training_args.bin"));
            }
        }
        if !has("evaluation_strategy") {
            range.at_least(4, 51, "no evaluation_strategy in training_args.bin");
        }
    }
}

fn from_state(range: &mut Range, state: &TrainerState, accumulation: Option<f64>) {
    let losses: Vec<f64> = state.rows.iter().filter_map(|r| r.loss).filter(|l| l.is_finite() && *l != 0.0).collect();
    // 4.x rounds to 4 decimals: one loss that is no multiple of 1e-4 settles it.
    let four = |x: f64| (x * 1e4 - (x * 1e4).round()).abs() < 1e-6;
    if losses.iter().any(|&l| !four(l)) {
        range.at_least(5, 0, "a loss of more than 4 decimals");
    } else if losses.len() >= 8 {
        range.below(5, 0, "losses of 4 decimals");
    }
    if state.has_best_global_step {
        range.at_least(4, 49, "best_global_step in trainer_state.json");
    } else {
        range.below(4, 51, "no best_global_step in trainer_state.json");
    }
    if let Some(first) = state.rows.first()
        && first.step == 1
        && state.rows.len() > 1
        && let (Some(used), Some(next)) = (first.learning_rate, state.rows[1].learning_rate)
        && next > used
        && used == 0.0
    {
        range.at_least(4, 51, "a learning rate of 0 logged at step 1 of a warmup");
    }
    if let Some(counted) = steps_counted(state, accumulation) {
        match counted {
            Counted::Floor => range.below(4, 52, "steps of an epoch counted with floor"),
            Counted::Ceil => range.at_least(4, 52, "steps of an epoch counted with ceil"),
        }
    }
}

enum Counted {
    Floor,
    Ceil,
}

/// Tells floor from ceil by max_steps, where the batches of an epoch (from the epoch's increment) leave a rest.
fn steps_counted(state: &TrainerState, accumulation: Option<f64>) -> Option<Counted> {
    let accumulation = accumulation?;
    let row = state.rows.iter().find(|r| r.epoch.is_some_and(|e| e > 0.0 && e < 1.0))?;
    let batches = (accumulation * row.step as f64 / row.epoch?).round();
    let epochs = state.num_train_epochs?;
    let (floor, ceil) = ((batches / accumulation).floor().max(1.0), (batches / accumulation).ceil());
    let total = state.max_steps? as f64;
    if floor == ceil || (epochs * floor).ceil() == (epochs * ceil).ceil() {
        None
    } else if total == (epochs * floor).ceil() {
        Some(Counted::Floor)
    } else if total == (epochs * ceil).ceil() {
        Some(Counted::Ceil)
    } else {
        None
    }
}
