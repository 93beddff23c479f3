//! Results of replays on disk, so that a diagnosis that is asked for again, or was cut short, does not repeat them.
//!
//! Owns the files: one per result, named by a hash of everything the result depends on, headed by a checksum, written
//! whole. What a result is made of is `remembering.rs`'. A file that is damaged is named once and its result made
//! anew; a folder that cannot be written costs time, never an answer.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::{Error, output};

/// Bytes that the folder may hold; beyond them the oldest results go.
const LIMIT: u64 = 256 << 20;

/// A folder of results.
#[derive(Debug)]
pub struct Archive {
    folder: PathBuf,
    notices: RefCell<Vec<String>>,
}

impl Archive {
    /// In `folder`, which is made when the first result is kept.
    pub fn new(folder: &Path) -> Self {
        let archive = Self { folder: folder.to_owned(), notices: RefCell::default() };
        archive.prune();
        archive
    }

    /// What went wrong with files, for people.
    pub fn notices(&self) -> Vec<String> {
        self.notices.take()
    }

    /// The result of this key; `None` when there is none, or none that is whole.
    pub fn read(&self, key: &str) -> Option<Vec<u8>> {
        let path = self.path(key);
        let file = std::fs::read(&path).ok()?;
        let (sum, body) = file.split_at_checked(32).unwrap_or_default();
        if sum != Sha256::digest(body).as_slice() {
            let told = format!("{} is damaged; the replay is made anew", path.display());
            self.notices.borrow_mut().push(told);
            return None;
        }
        Some(body.to_vec())
    }

    /// A result that could not be understood although it is whole: of another program, or tampered with.
    pub fn not_understood(&self, key: &str) {
        let told = format!("{} is not understood; the replay is made anew", self.path(key).display());
        self.notices.borrow_mut().push(told);
    }

    /// Keeps a result.
    pub fn write(&self, key: &str, body: &[u8]) {
        let sum = Sha256::digest(body);
        let fill = |out: &mut dyn std::io::Write| {
            out.write_all(&sum).and_then(|()| out.write_all(body)).map_err(|e| Error::output(e.to_string()))
        };
        let made = std::fs::create_dir_all(&self.folder).map_err(|e| Error::output(e.to_string()));
        if let Err(error) = made.and_then(|()| output::write_file(&self.path(key), fill)) {
            let mut notices = self.notices.borrow_mut();
            if notices.is_empty() {
                notices.push(format!("results are not kept in {}: {}", self.folder.display(), error.what));
            }
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.result"))
    }

    /// Removes the oldest results beyond [`LIMIT`]. Another diagnosis may do the same: what is gone is gone.
    fn prune(&self) {
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        let mut files: Vec<_> = entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let about = entry.metadata().ok()?;
                let ours = entry.path().extension().is_some_and(|e| e == "result");
                ours.then_some((about.modified().ok()?, about.len(), entry.path()))
            })
            .collect();
        files.sort();
        let mut held: u64 = files.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in files {
            if held <= LIMIT {
                break;
            }
            if std::fs::remove_file(path).is_ok() {
                held -= bytes;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_read_back_and_a_damaged_one_is_not_and_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let archive = Archive::new(folder.path());
        assert_eq!(archive.read("k"), None);
        archive.write("k", b"twelve steps");
        assert_eq!(archive.read("k").as_deref(), Some(&b"twelve steps"[..]));
        assert!(archive.notices().is_empty());
        for damaged in [&b""[..], b"short", &[7; 80]] {
            std::fs::write(folder.path().join("k.result"), damaged).expect("written");
            assert_eq!(archive.read("k"), None);
            assert!(archive.notices()[0].contains("damaged"));
        }
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named_once_and_harmless() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let archive = Archive::new(&file.path().join("below"));
        archive.write("a", b"x");
        archive.write("b", b"x");
        assert_eq!((archive.notices().len(), archive.read("a")), (1, None));
    }
}
