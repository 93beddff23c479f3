//! `--keep-evidence`: copies of the newest checkpoints, made before save_total_limit deletes the originals.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::run::Checkpoint;
use crate::{Error, Result};

/// Copies kept while nothing happened; after a spike all are.
const NEWEST: usize = 2;

/// Copies checkpoints of one output folder into another folder.
#[derive(Debug)]
pub struct Keeper {
    from: PathBuf,
    to: PathBuf,
    /// Bytes of a checkpoint when last looked at: it is copied when they stand still.
    sizes: HashMap<u64, u64>,
    kept: Vec<u64>,
    frozen: bool,
}

impl Keeper {
    /// # Errors
    /// The folder for the copies cannot be made.
    pub fn new(from: &Path, to: &Path) -> Result<Self> {
        std::fs::create_dir_all(to).map_err(|e| Error::output(e.to_string()).at_path(to))?;
        let kept = Checkpoint::list(to)?.iter().map(|c| c.step).collect();
        Ok(Self { from: from.to_owned(), to: to.to_owned(), sizes: HashMap::new(), kept, frozen: false })
    }

    /// From now on nothing that was kept is deleted: it is evidence.
    pub fn freeze(&mut self) {
        self.frozen = true;
    }

    /// Copies checkpoints that are complete (their size stood still since the last call). Returns the names copied.
    ///
    /// # Errors
    /// The copy cannot be written. A checkpoint that the trainer deletes meanwhile is no error.
    pub fn look(&mut self) -> Result<Vec<String>> {
        let mut copied = Vec::new();
        for checkpoint in Checkpoint::list(&self.from).unwrap_or_default() {
            let step = checkpoint.step;
            if self.kept.contains(&step) || !checkpoint.dir.join("trainer_state.json").is_file() {
                continue;
            }
            let Some(size) = size(&checkpoint.dir) else { continue };
            if self.sizes.insert(step, size) != Some(size) {
                continue;
            }
            let name = format!("checkpoint-{step}");
            if self.copy(&checkpoint.dir, &name)? {
                self.kept.push(step);
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
        let Ok(entries) = std::fs::read_dir(from) else { return Ok(false) };
        for entry in entries.flatten() {
            let path = entry.path();
            if !path.is_file() {
                continue;
            }
            match std::fs::copy(&path, part.path().join(entry.file_name())) {
                Ok(_) => {}
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
                Err(e) => return Err(failed(e)),
            }
        }
        std::fs::rename(part.path(), self.to.join(name)).map_err(failed)?;
        Ok(true)
    }

    fn prune(&mut self) {
        self.kept.sort_unstable();
        while !self.frozen && self.kept.len() > NEWEST {
            let oldest = self.kept.remove(0);
            // Only copies of our own making; failing to tidy up loses nothing.
            let _ = std::fs::remove_dir_all(self.to.join(format!("checkpoint-{oldest}")));
        }
    }
}

fn size(dir: &Path) -> Option<u64> {
    std::fs::read_dir(dir).ok()?.map(|e| e.ok()?.metadata().ok().map(|m| m.len())).sum()
}
