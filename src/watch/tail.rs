//! Reading what was appended to a file that another process writes, truncates and replaces.

use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Bytes before the read position that are remembered: a log line is longer and holds a time, so other contents differ.
const REMEMBERED: usize = 256;

/// A file and how far it was read.
#[derive(Debug)]
pub struct Tail {
    path: PathBuf,
    offset: u64,
    /// Which file it was (inode; 0 where the platform has none).
    identity: u64,
    /// The last bytes before `offset`: where they changed, the file was truncated and has outgrown its old length.
    behind: Vec<u8>,
    /// Bytes after the last line end: a line that is still being written.
    pending: Vec<u8>,
}

/// What was new.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct News {
    /// The file was truncated or replaced; `lines` are from its new beginning.
    pub restarted: bool,
    pub lines: Vec<String>,
}

impl Tail {
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), offset: 0, identity: 0, behind: Vec::new(), pending: Vec::new() }
    }

    /// Complete lines appended since the last call. A file that does not exist (yet) has none.
    ///
    /// # Errors
    /// A file that exists and cannot be read.
    pub fn read(&mut self) -> Result<News> {
        let path = self.path.clone();
        let fail = |e: std::io::Error| {
            Error::input(e.to_string()).at_path(&path).next("check that it is a file that you may read")
        };
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(News::default()),
            Err(e) => return Err(fail(e)),
        };
        let metadata = file.metadata().map_err(fail)?;
        let replaced = self.identity != 0 && identity(&metadata) != self.identity;
        let restarted = replaced || metadata.len() < self.offset || self.rewritten(&mut file).map_err(fail)?;
        if restarted {
            (self.offset, self.behind, self.pending) = (0, Vec::new(), Vec::new());
        }
        file.seek(SeekFrom::Start(self.offset)).map_err(fail)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fail)?;
        self.identity = identity(&metadata);
        self.offset += bytes.len() as u64;
        self.behind.extend_from_slice(&bytes);
        self.behind.drain(..self.behind.len().saturating_sub(REMEMBERED));
        self.pending.extend(bytes);
        let complete = self.pending.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        let whole: Vec<u8> = self.pending.drain(..complete).collect();
        let text = String::from_utf8_lossy(&whole);
        let lines = text.lines().filter(|l| !l.trim().is_empty()).map(str::to_owned).collect();
        Ok(News { restarted, lines })
    }

    /// Whether the bytes before the read position are others than those that were read.
    fn rewritten(&self, file: &mut File) -> std::io::Result<bool> {
        file.seek(SeekFrom::Start(self.offset - self.behind.len() as u64))?;
        let mut now = vec![0; self.behind.len()];
        match file.read_exact(&mut now) {
            Ok(()) => Ok(now != self.behind),
            // Truncated between two calls of this function.
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(true),
            Err(e) => Err(e),
        }
    }
}

#[cfg(unix)]
fn identity(metadata: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> u64 {
    0
}
