//! `--keep-evidence`: copies of the newest checkpoints, made before save_total_limit deletes the originals.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::run::Checkpoint;
use crate::{Error, Result};

/// Copies kept while nothing happened. After a spike these stay, and as many of the checkpoints after it are added.
const NEWEST: usize = 2;

/// Copies checkpoints of one output folder into another folder. Only ever reads in the first.
#[derive(Debug)]
pub struct Keeper {
    from: PathBuf,
    to: PathBuf,
    /// Bytes of a checkpoint when last looked at: it is copied when they stand still.
    sizes: HashMap<u64, u64>,
    /// Copies made here, oldest first.
    kept: Vec<u64>,
    /// Never to be copied (again): what the folder held before, and every copy made, deleted ones too.
    done: Vec<u64>,
    /// Checkpoints that are still to be added since the spike; `None`: nothing happened.
    wanted: Option<usize>,
}

impl Keeper {
    /// # Errors
    /// The folder for the copies cannot be made, or is the trainer's.
    pub fn new(from: &Path, to: &Path) -> Result<Self> {
        std::fs::create_dir_all(to).map_err(|e| {
            Error::output(e.to_string()).at_path(to).next("give --keep-evidence a folder you may write")
        })?;
        let same = |a: &Path, b: &Path| matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b);
        if same(from, to) {
            return Err(Error::usage("this is the folder that is watched")
                .at("--keep-evidence")
                .next("give another folder: the trainer deletes in its own"));
        }
        let done = Checkpoint::list(to)?.iter().map(|c| c.step).collect();
        let (from, to) = (from.to_owned(), to.to_owned());
        Ok(Self { from, to, sizes: HashMap::new(), kept: Vec::new(), done, wanted: None })
    }

    /// A spike happened: nothing that was kept is deleted any more, and the next checkpoints join it.
    pub fn freeze(&mut self) {
        self.wanted.get_or_insert(NEWEST);
    }

    /// A checkpoint was seen for the first time, or still grew: looking again soon is worth it.
    pub fn waits(&self) -> bool {
        self.wanted != Some(0) && !self.sizes.keys().all(|step| self.done.contains(step))
    }

    /// Copies checkpoints that are complete (their size stood still since the last call). Returns the names copied.
    ///
    /// # Errors
    /// The copy cannot be written. A checkpoint that the trainer deletes meanwhile is no error.
    pub fn look(&mut self) -> Result<Vec<String>> {
        let mut copied = Vec::new();
        let there = Checkpoint::list(&self.from).unwrap_or_default();
        self.sizes.retain(|step, _| there.iter().any(|c| c.step == *step));
        // Older ones would be deleted again at once.
        let from = there.len().saturating_sub(NEWEST);
        for checkpoint in &there[from..] {
            let step = checkpoint.step;
            // trainer_state.json is what the trainer writes last.
            if self.done.contains(&step) || !checkpoint.dir.join("trainer_state.json").is_file() {
                continue;
            }
            let Some(size) = size(&checkpoint.dir) else { continue };
            if self.wanted == Some(0) || self.sizes.insert(step, size) != Some(size) {
                continue;
            }
            let name = format!("checkpoint-{step}");
            if self.copy(&checkpoint.dir, &name)? {
                self.kept.push(step);
                self.done.push(step);
                self.wanted = self.wanted.map(|n| n - 1);
                copied.push(name);
            }
        }
        self.prune();
        Ok(copied)
    }

    /// Through a temporary folder, so that a copy is whole or absent. False: the original went away.
    fn copy(&self, from: &Path, name: &str) -> Result<bool> {
        let failed = |e: std::io::Error| {
            Error::output(format!("cannot keep {name}: {e}")).at_path(&self.to).next("check free space and permissions")
        };
        let part = tempfile::Builder::new().prefix(".spikeprobe-").tempdir_in(&self.to).map_err(failed)?;
        match copy_folder(from, part.path()) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(failed(e)),
        }
        std::fs::rename(part.path(), self.to.join(name)).map_err(failed)?;
        Ok(true)
    }

    fn prune(&mut self) {
        self.kept.sort_unstable();
        while self.wanted.is_none() && self.kept.len() > NEWEST {
            let oldest = self.kept.remove(0);
            // Only copies of our own making; failing to tidy up loses nothing.
            let _ = std::fs::remove_dir_all(self.to.join(format!("checkpoint-{oldest}")));
        }
    }
}

/// Files and folders within (DeepSpeed keeps optimizer states in one). NotFound: something was deleted meanwhile.
fn copy_folder(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let Some(name) = path.file_name() else { continue };
        if path.is_dir() {
            std::fs::create_dir(to.join(name))?;
            copy_folder(&path, &to.join(name))?;
        } else {
            std::fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// Bytes of all files; `None` where one of them went away.
fn size(dir: &Path) -> Option<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(dir).ok()? {
        let path = entry.ok()?.path();
        total += if path.is_dir() { size(&path)? } else { std::fs::metadata(&path).ok()?.len() };
    }
    Some(total)
}
