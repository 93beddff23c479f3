//! `checkpoint-K` folders: which there are, what they hold, and one reader per file.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::state_file::TrainerState;
use super::torch_file::TorchFile;
use super::{AdapterWeights, Checkpoint, GeneratorFile, OptimizerFile, ScalerFile, SchedulerFile};
use crate::{Error, Result};

impl Checkpoint {
    /// The checkpoint folders of an output folder, ascending; none if it does not exist.
    ///
    /// # Errors
    /// A folder that cannot be listed.
    pub fn list(output_dir: &Path) -> Result<Vec<Self>> {
        if !output_dir.is_dir() {
            return Ok(Vec::new());
        }
        let fail = |e: std::io::Error| Error::input(e.to_string()).at_path(output_dir);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(output_dir).map_err(fail)? {
            let dir = entry.map_err(fail)?.path();
            let name = dir.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            let Some(step) = name.strip_prefix("checkpoint-").and_then(|k| k.parse().ok()) else { continue };
            if dir.is_dir() {
                found.push(Self::at(step, dir));
            }
        }
        found.sort_by_key(|c| c.step);
        Ok(found)
    }

    fn at(step: u64, dir: PathBuf) -> Self {
        let has = |name: &str| dir.join(name).is_file();
        Self {
            step,
            has_optimizer: has("optimizer.pt"),
            has_scheduler: has("scheduler.pt"),
            has_scaler: has("scaler.pt"),
            attempt: 0,
            dir,
        }
    }

    fn need(&self, name: &str) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if path.is_file() {
            return Ok(path);
        }
        Err(Error::input("the checkpoint does not hold this file").at_path(&path).next(
            "start from another checkpoint, or from the beginning (--from initial); \
             save_only_model: true leaves optimizer and scheduler out",
        ))
    }

    /// The adapter, in registration order.
    ///
    /// # Errors
    /// See [`AdapterWeights::read`].
    pub fn adapter(&self) -> Result<AdapterWeights> {
        AdapterWeights::read(&self.dir)
    }

    /// Adam's moments, in the order of `adapter`'s matrices (A, B of each module).
    ///
    /// # Errors
    /// See [`OptimizerFile::read`].
    pub fn optimizer(&self, adapter: &AdapterWeights) -> Result<OptimizerFile> {
        OptimizerFile::read(&self.need("optimizer.pt")?, adapter)
    }

    /// Adam's count of updates of the first matrix: the checkpoint's step, less skipped or forgotten ones. `None`: an
    /// optimizer without moments. Reads no moments.
    ///
    /// # Errors
    /// As [`Checkpoint::optimizer`].
    pub fn update_count(&self) -> Result<Option<f64>> {
        super::optimizer_file::read_update_count(&self.need("optimizer.pt")?)
    }

    /// # Errors
    /// See [`SchedulerFile::read`].
    pub fn scheduler(&self) -> Result<SchedulerFile> {
        SchedulerFile::read(&self.need("scheduler.pt")?)
    }

    /// # Errors
    /// See [`ScalerFile::read`].
    pub fn scaler(&self) -> Result<ScalerFile> {
        ScalerFile::read(&self.need("scaler.pt")?)
    }

    /// torch's CPU generator as process `rank` of `world` loads it; `None`: the checkpoint does not hold it
    /// (save_only_model, or written by another number of processes).
    ///
    /// # Errors
    /// See [`GeneratorFile::read`].
    pub fn generator(&self, rank: usize, world: usize) -> Result<Option<GeneratorFile>> {
        // Trainer._load_rng_state.
        let path = self.dir.join(if world > 1 { format!("rng_state_{rank}.pth") } else { "rng_state.pth".to_owned() });
        path.is_file().then(|| GeneratorFile::read(&path)).transpose()
    }

    /// # Errors
    /// See [`TrainerState::read`].
    pub fn trainer_state(&self) -> Result<TrainerState> {
        TrainerState::read(&self.need("trainer_state.json")?)
    }

    /// training_args.bin as JSON.
    ///
    /// # Errors
    /// See [`read_training_args`].
    pub fn training_args(&self) -> Result<Value> {
        read_training_args(&self.need("training_args.bin")?)
    }

    /// Ranks that saved a generator state: the world size when the checkpoint was written, 1 for a single process.
    pub fn ranks(&self) -> usize {
        let count = (0..4096).take_while(|p| self.dir.join(format!("rng_state_{p}.pth")).is_file()).count();
        count.max(1)
    }

    /// adapter_config.json, where it can be read.
    pub fn adapter_config(&self) -> Option<Value> {
        let text = std::fs::read_to_string(self.dir.join("adapter_config.json")).ok()?;
        super::json::parse(&text).ok()
    }
}

/// training_args.bin: the fields of the pickled TrainingArguments as JSON (numbers, flags, words and plain lists and
/// mappings of them; everything else null), and `num_processes` where it is recorded. Nothing is executed.
///
/// # Errors
/// Damaged file, or a pickle of something else.
pub fn read_training_args(path: &Path) -> Result<Value> {
    // Fields are at most mappings of plain values.
    const DEPTH: usize = 6;
    let file = TorchFile::open(path)?;
    let root = file.pickle.root();
    let state = root.state().filter(|s| s.get("output_dir").is_some());
    let state = state.ok_or_else(|| Error::input("it holds no TrainingArguments").at_path(path))?;
    let mut fields = state.to_json(DEPTH);
    let processes = state.get("distributed_state").and_then(|d| d.state()?.get("num_processes")?.as_i64());
    if let (Some(count), Some(map)) = (processes, fields.as_object_mut()) {
        map.insert("num_processes".to_owned(), Value::from(count));
    }
    Ok(fields)
}
