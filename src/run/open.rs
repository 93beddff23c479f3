//! [`Run::open`]: the pipeline from a path to a [`Run`].

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::attempts::{self, Process};
use super::checkpoint::read_training_args;
use super::settings::Settings;
use super::state_file::{TrainerLog, TrainerState};
use super::versions::VersionEvidence;
use super::{Attempt, Checkpoint, Run, TrainConfig, TrainerSemantics, Versions, find, keys, log};
use crate::{Error, Result};

impl Run {
    /// Opens a run.
    ///
    /// - `path`: a configuration (YAML or JSON), or a folder with exactly one (`train.yaml` preferred).
    /// - `root`: the folder that relative paths inside the configuration start from.
    /// - `overrides`: `key`, `value` pairs laid over the configuration of every attempt.
    /// - `versions`: package, version pairs that win over everything the files say.
    ///
    /// # Errors
    /// Unreadable files, unknown keys, wrong values, and keys that change the numbers and are not covered; each names
    /// its file and key.
    pub fn open(
        path: &Path,
        root: &Path,
        overrides: &[(String, String)],
        versions: &[(String, String)],
    ) -> Result<Self> {
        Self::open_as(path, root, overrides, versions, true)
    }

    /// Opens a run to look at, not to replay: what a replay does not cover is a remark, and the output folder of a
    /// trainer without its YAML will do, as far as training_args.bin goes.
    ///
    /// # Errors
    /// As [`Run::open`], less the refusals.
    pub fn open_for_inspection(path: &Path, root: &Path, versions: &[(String, String)]) -> Result<Self> {
        Self::open_as(path, root, &[], versions, false)
    }

    fn open_as(
        path: &Path,
        root: &Path,
        overrides: &[(String, String)],
        versions: &[(String, String)],
        strict: bool,
    ) -> Result<Self> {
        let (config_path, settings) = find::settings(path, overrides, strict)?;
        let model = BaseConfig::read(&settings, root)?;
        let refusal = keys::check_covered(&settings).and_then(|()| model.check_rope(&settings)).err();
        let mut files = OutputFiles::read(&settings, root)?;
        match refusal {
            Some(refusal) if strict => return Err(refusal),
            Some(refusal) => files.remarks.push(format!("a replay would refuse this run: {refusal}")),
            None => {}
        }
        let beside = config_path.parent().map(|dir| dir.join("versions.json"));
        let versions = Versions::resolve(versions, beside.as_deref(), &files.evidence(&settings, &model))?;
        let optim = settings.find("optim").and_then(|(v, _)| v.as_str().map(str::to_lowercase));
        let semantics = TrainerSemantics::of(&versions, model.model_type.as_deref(), optim.as_deref().unwrap_or(""));
        let mut builder = Builder { settings, versions, semantics, strict };
        let draft = builder.config(None, &files)?;
        builder.semantics = TrainerSemantics::of(&builder.versions, model.model_type.as_deref(), &draft.optim);
        let processes = files.processes(&draft);
        let starts: Vec<u64> = processes.iter().map(|p| p.resumed_from.unwrap_or(0)).collect();
        let spans: Vec<log::Span> = processes.iter().map(|p| p.span.clone()).collect();
        let log = log::assemble(&spans, &starts, files.log.as_ref(), files.newest_state());
        let attempts = processes.into_iter().map(|p| builder.attempt(p, &files)).collect::<Result<Vec<_>>>()?;
        let config = attempts.last().map_or(draft, |a| a.config.clone());
        Ok(Self {
            root: root.to_owned(),
            config_path,
            config,
            versions: builder.versions,
            semantics: builder.semantics,
            log,
            attempts,
            checkpoints: files.checkpoints,
            model_type: model.model_type,
            base_dtype: model.dtype,
            vocab_size: model.vocab_size,
            remarks: files.remarks,
        })
    }

    /// A path of the configuration, resolved against the root.
    pub fn path(&self, relative: &Path) -> PathBuf {
        self.root.join(relative)
    }

    /// `file:line` of a key of the configuration; the file where it is a default.
    pub fn place(&self, key: &str) -> String {
        let text = std::fs::read_to_string(&self.config_path).unwrap_or_default();
        super::settings::line_of(&text, key, &self.config_path)
    }

    /// The checkpoint of this step.
    ///
    /// # Errors
    /// None such; the message lists those that exist.
    pub fn checkpoint(&self, step: u64) -> Result<&Checkpoint> {
        self.checkpoints.iter().find(|c| c.step == step).ok_or_else(|| {
            let known: Vec<String> = self.checkpoints.iter().map(|c| c.step.to_string()).collect();
            Error::input(format!("there is no checkpoint-{step}")).at_path(&self.path(&self.config.output_dir)).next(
                format!("checkpoints on disk: {}", if known.is_empty() { "none".into() } else { known.join(", ") }),
            )
        })
    }
}

struct Builder {
    settings: Settings,
    versions: Versions,
    semantics: TrainerSemantics,
    /// Refuse what a replay does not cover.
    strict: bool,
}

impl Builder {
    fn config(&self, arguments: Option<&Value>, files: &OutputFiles) -> Result<TrainConfig> {
        let settings = match arguments {
            Some(arguments) => self.settings.clone().with_recorded(arguments),
            None => self.settings.clone(),
        };
        if self.strict {
            keys::check_covered(&settings)?;
        }
        let written = settings.find(keys::WORLD_SIZE).is_some();
        let mut config = TrainConfig::from_settings(settings, &self.versions, &self.semantics)?;
        if !written && let Some((ranks, origin)) = files.world_size(arguments) {
            config.world_size = ranks;
            config.origins.insert(keys::WORLD_SIZE.into(), super::Origin::Evidence(origin));
        }
        Ok(config)
    }

    fn attempt(&self, process: Process, files: &OutputFiles) -> Result<Attempt> {
        let mut config = self.config(process.arguments.as_ref(), files)?;
        if process.resumed_from.is_none() {
            // The configuration on disk is the last attempt's.
            config.resume_from_checkpoint = None;
        }
        Ok(Attempt {
            config,
            resumed_from: process.resumed_from,
            first_step: process.span.first_step(),
            last_step: process.span.last_step(),
            total_steps: process.span.total_steps(),
        })
    }
}

/// The base model's config.json, as far as it decides how the run is read.
struct BaseConfig {
    model_type: Option<String>,
    dtype: Option<String>,
    max_positions: Option<u64>,
    vocab_size: Option<u64>,
}

impl BaseConfig {
    /// A missing config.json is no error here: the log can be inspected without the model.
    fn read(settings: &Settings, root: &Path) -> Result<Self> {
        let folder = settings.find("model_name_or_path").and_then(|(v, _)| v.as_str().map(PathBuf::from));
        let path = root.join(folder.unwrap_or_default()).join("config.json");
        let value = match std::fs::read_to_string(&path) {
            Ok(text) => super::json::parse(&text).map_err(|e| {
                Error::input(format!("invalid JSON: {e}")).at_path(&path).next("copy the model's config.json again")
            })?,
            Err(_) => Value::Null,
        };
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        Ok(Self {
            model_type: text("model_type"),
            dtype: text("dtype").or_else(|| text("torch_dtype")),
            max_positions: value.get("max_position_embeddings").and_then(Value::as_u64),
            vocab_size: value.get("vocab_size").and_then(Value::as_u64),
        })
    }

    /// LLaMA-Factory switches rope_scaling off where the rows fit the model's positions.
    fn check_rope(&self, settings: &Settings) -> Result<()> {
        let Some((value, _)) = settings.find("rope_scaling").filter(|(v, _)| !v.is_null()) else { return Ok(()) };
        let cutoff = settings.find("cutoff_len").and_then(|(v, _)| v.as_u64()).unwrap_or(2048);
        if self.max_positions.is_some_and(|positions| cutoff <= positions) {
            return Ok(());
        }
        Err(Error::refused(format!("rope scaling {} is not covered by a replay", settings.show(&value)))
            .at(settings.place("rope_scaling"))
            .next("it has no effect while cutoff_len is within the model's max_position_embeddings"))
    }
}

/// What the output folder holds.
struct OutputFiles {
    log: Option<TrainerLog>,
    state: Option<TrainerState>,
    checkpoint_states: Vec<TrainerState>,
    final_arguments: Option<Value>,
    arguments: Vec<Option<Value>>,
    checkpoints: Vec<Checkpoint>,
    remarks: Vec<String>,
}

impl OutputFiles {
    fn read(settings: &Settings, root: &Path) -> Result<Self> {
        let folder = settings.find("output_dir").and_then(|(v, _)| super::settings::as_text(&v));
        let Some(output) = folder.map(|folder| root.join(folder)) else {
            return Err(Error::input("this key is missing, or no path")
                .at(settings.place("output_dir"))
                .next("write `output_dir: …` with the folder that the run was saved to"));
        };
        let mut remarks = Vec::new();
        // Whatever bears the name is read, so that a folder there is an error and not a run without a log.
        let log = Some(output.join("trainer_log.jsonl")).filter(|p| p.exists());
        // Two files of up to tens of megabytes: side by side.
        let state_file = output.join("trainer_state.json");
        let (log, state) = rayon::join(
            || log.map(|p| TrainerLog::read(&p)).transpose(),
            || {
                let mut remarks = Vec::new();
                (note(&state_file, TrainerState::read, &mut remarks), remarks)
            },
        );
        let log = log?;
        let (state, said) = state;
        remarks.extend(said);
        let mut optional = |path: PathBuf| note(&path, TrainerState::read, &mut remarks);
        let checkpoints = Checkpoint::list(&output)?;
        // Newest first: a later state repeats the earlier ones' history.
        let checkpoint_states =
            checkpoints.iter().rev().filter_map(|c| optional(c.dir.join("trainer_state.json"))).collect();
        let mut arguments_of = |dir: &Path| note(&dir.join("training_args.bin"), read_training_args, &mut remarks);
        let final_arguments = arguments_of(&output);
        let arguments = checkpoints.iter().map(|c| arguments_of(&c.dir)).collect();
        Ok(Self { log, state, checkpoint_states, final_arguments, arguments, checkpoints, remarks })
    }

    fn newest_state(&self) -> Option<&TrainerState> {
        self.state.as_ref().or(self.checkpoint_states.first())
    }

    fn evidence<'a>(&'a self, settings: &Settings, model: &'a BaseConfig) -> VersionEvidence<'a> {
        VersionEvidence {
            state: self.newest_state(),
            arguments: self.arguments.iter().flatten().next_back().or(self.final_arguments.as_ref()),
            adapter_peft: self
                .checkpoints
                .iter()
                .rev()
                .find_map(|c| c.adapter_config()?.get("peft_version")?.as_str().map(str::to_owned)),
            gradient_accumulation_steps: settings
                .find("gradient_accumulation_steps")
                .and_then(|(v, _)| super::settings::as_float(&v)),
            model_type: model.model_type.as_deref(),
        }
    }

    fn processes(&mut self, draft: &TrainConfig) -> Vec<Process> {
        let states: Vec<&TrainerState> = self.state.iter().chain(&self.checkpoint_states).collect();
        let mut spans = log::spans(self.log.as_ref(), &states);
        let resumes = self.arguments.iter().flatten().chain(&self.final_arguments).filter_map(attempts::resumed_step);
        let last_resume = draft.resume_from_checkpoint.as_deref().and_then(attempts::step_of);
        let mut cuts: Vec<u64> = resumes.chain(last_resume).collect();
        cuts.sort_unstable();
        cuts.dedup();
        for step in cuts {
            log::split_at_resume(&mut spans, step);
        }
        attempts::reconstruct(
            spans,
            &mut self.checkpoints,
            &self.arguments,
            self.final_arguments.as_ref(),
            last_resume,
            draft.logging_steps as u64,
        )
    }

    /// Number of data-parallel processes, where the files tell.
    fn world_size(&self, arguments: Option<&Value>) -> Option<(usize, String)> {
        let recorded = arguments.and_then(|a| a.get("num_processes")?.as_u64());
        if let Some(count) = recorded.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0) {
            return Some((count, "num_processes in training_args.bin".into()));
        }
        let checkpoint = self.checkpoints.last()?;
        let ranks = checkpoint.ranks();
        (ranks > 1).then(|| (ranks, format!("rng_state_0 … rng_state_{} in checkpoint-{}", ranks - 1, checkpoint.step)))
    }
}

/// Reads a file that a run can do without; what is wrong with it becomes a remark.
fn note<T>(path: &Path, read: impl Fn(&Path) -> Result<T>, remarks: &mut Vec<String>) -> Option<T> {
    if !path.is_file() {
        return None;
    }
    read(path).map_err(|e| remarks.push(format!("left out: {e}"))).ok()
}
