//! A sweep on disk: one result file a cell, named by what determines it; a manifest that lists the cells.
//!
//! A file is whole or absent, so that a killed sweep loses the cell in flight and nothing else, and shards on several
//! machines may share a folder or bring theirs together later.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::grid::{Axis, Keep};
use super::{CELL_SCHEMA, Cell, Outcome, SWEEP_SCHEMA};
use crate::diagnosis::number;
use crate::{Error, Result, output};

/// What a sweep is: enough to merge, show and continue it without the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub schema: String,
    /// The run as the user named it, and the root of its relative paths.
    pub run: PathBuf,
    pub root: PathBuf,
    /// Hash of everything of the run that determines its numbers.
    pub fingerprint: String,
    pub axes: Vec<Axis>,
    pub keep: Keep,
    /// The run's own learning rate and accumulation, to mark them in results.
    pub own: BTreeMap<String, Value>,
    pub cells: Vec<Cell>,
}

/// A cell's result file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    pub schema: String,
    pub fingerprint: String,
    pub cell: Cell,
    pub outcome: Outcome,
    /// Wall-clock time of the replay and what it ran on: the only parts that another run may change.
    #[serde(with = "number")]
    pub seconds: f64,
    pub machine: String,
}

/// A folder of results.
#[derive(Debug, Clone)]
pub struct Folder {
    dir: PathBuf,
}

const MANIFEST: &str = "sweep.json";
const CELLS: &str = "cells";

impl Folder {
    /// Makes the folder where it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(dir: &Path) -> Result<Self> {
        let cells = dir.join(CELLS);
        std::fs::create_dir_all(&cells)
            .map_err(|e| Error::output(format!("cannot create: {e}")).at_path(&cells).next("choose another --out"))?;
        Ok(Self { dir: dir.to_owned() })
    }

    /// An existing sweep.
    ///
    /// # Errors
    /// The folder holds none.
    pub fn open(dir: &Path) -> Result<(Self, Manifest)> {
        let path = dir.join(MANIFEST);
        let text = std::fs::read_to_string(&path).map_err(|e| {
            Error::input(format!("no sweep here: {e}")).at_path(&path).next("give the --out folder of a sweep")
        })?;
        let manifest: Manifest = serde_json::from_str(&text)
            .map_err(|e| Error::input(format!("not a sweep's manifest: {e}")).at_path(&path))?;
        if manifest.schema != SWEEP_SCHEMA {
            let what = format!("schema {} where {SWEEP_SCHEMA} is needed", manifest.schema);
            return Err(Error::input(what).at_path(&path).next("use the version of spikeprobe that made the sweep"));
        }
        Ok((Self { dir: dir.to_owned() }, manifest))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Puts the manifest in place; shards that start together all write the same one.
    ///
    /// # Errors
    /// The folder belongs to another run, or cannot be written.
    pub fn set_manifest(&self, manifest: &Manifest) -> Result<()> {
        let path = self.dir.join(MANIFEST);
        if let Ok((_, present)) = Self::open(&self.dir) {
            if present == *manifest {
                return Ok(());
            }
            if present.fingerprint != manifest.fingerprint {
                return Err(Error::input(format!(
                    "holds a sweep of {}, or of an earlier state of it",
                    present.run.display()
                ))
                .at_path(&self.dir)
                .next("choose another --out, or remove the folder"));
            }
        }
        let text = serde_json::to_string_pretty(manifest).map_err(|e| Error::internal(e.to_string()))?;
        output::write_text(&path, &(text + "\n"))
    }

    /// Writes one result.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn store(&self, result: &CellResult) -> Result<()> {
        let path = self.dir.join(CELLS).join(file_name(&result.cell, &result.fingerprint));
        let text = serde_json::to_string(result).map_err(|e| Error::internal(e.to_string()))?;
        output::write_text(&path, &(text + "\n"))
    }

    /// The result of a cell, if it is there and whole.
    ///
    /// # Errors
    /// A file of that name that is no such result: someone changed it.
    pub fn load(&self, cell: &Cell, fingerprint: &str) -> Result<Option<CellResult>> {
        let path = self.dir.join(CELLS).join(file_name(cell, fingerprint));
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::input(format!("cannot be read: {e}")).at_path(&path)),
        };
        let damaged =
            |what: String| Error::input(what).at_path(&path).next("remove the file; the cell is then run again");
        let result: CellResult =
            serde_json::from_str(&text).map_err(|e| damaged(format!("not a cell's result: {e}")))?;
        if result.schema != CELL_SCHEMA || result.cell != *cell || result.fingerprint != fingerprint {
            return Err(damaged("the result of another cell".into()));
        }
        Ok(Some(result))
    }

    /// Copies the results of another folder of the same sweep that are missing here.
    ///
    /// # Errors
    /// The other folder is of another run, or files cannot be copied.
    pub fn absorb(&self, other: &Path, manifest: &Manifest) -> Result<usize> {
        let (other, theirs) = Self::open(other)?;
        if theirs.fingerprint != manifest.fingerprint {
            return Err(
                Error::input(format!("is a sweep of another run: {}", theirs.run.display())).at_path(&other.dir)
            );
        }
        let mut copied = 0;
        for cell in &manifest.cells {
            if self.load(cell, &manifest.fingerprint)?.is_none()
                && let Some(result) = other.load(cell, &manifest.fingerprint)?
            {
                self.store(&result)?;
                copied += 1;
            }
        }
        Ok(copied)
    }

    /// Results in the manifest's order; `None` where one is missing.
    ///
    /// # Errors
    /// As [`Folder::load`].
    pub fn results(&self, manifest: &Manifest) -> Result<Vec<Option<CellResult>>> {
        manifest.cells.iter().map(|cell| self.load(cell, &manifest.fingerprint)).collect()
    }
}

/// A readable beginning, then the hash of what determines the result (device and program aside: those are inside).
pub fn file_name(cell: &Cell, fingerprint: &str) -> String {
    let canonical = serde_json::json!([CELL_SCHEMA, fingerprint, cell]).to_string();
    let hash = hex(&Sha256::digest(canonical.as_bytes())[..8]);
    let mut readable = String::new();
    for value in cell.axes.values() {
        let text = crate::report::page::value_text(value);
        readable.extend(text.chars().map(|c| if c.is_ascii_alphanumeric() || "-._".contains(c) { c } else { '_' }));
        readable.push('-');
    }
    readable.truncate(60);
    format!("{readable}{hash}.json")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Hash of named texts and files. Large files (model weights) count with their size and first mebibyte: reading tens
/// of gigabytes to name a result would cost more than the result.
///
/// # Errors
/// A file cannot be read.
pub fn fingerprint(texts: &[(&str, String)], files: &[PathBuf]) -> Result<String> {
    use std::io::Read;
    let mut hash = Sha256::new();
    for (name, text) in texts {
        hash.update(format!("{name}={text}\n"));
    }
    let mut seen: HashMap<&Path, ()> = HashMap::new();
    for path in files {
        if seen.insert(path, ()).is_some() {
            continue;
        }
        let unreadable = |e: std::io::Error| Error::input(format!("cannot be read: {e}")).at_path(path);
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let size = file.metadata().map_err(unreadable)?.len();
        let mut bytes = Vec::new();
        let limit = if size > 64 << 20 { 1 << 20 } else { size };
        file.take(limit).read_to_end(&mut bytes).map_err(unreadable)?;
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        hash.update(format!("{name} {size}\n"));
        hash.update(&bytes);
    }
    Ok(hex(&hash.finalize()[..16]))
}
