//! Memory-mapped files: the only way weights enter the program, and its unsafe part.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::MappedBytes;
use crate::{Error, Result};

impl MappedBytes {
    /// Maps a whole file read-only.
    ///
    /// # Errors
    /// The file cannot be opened or mapped.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| {
            Error::input(format!("cannot read: {e}")).at_path(path).next("check the path and its permissions")
        };
        let file = File::open(path).map_err(failed)?;
        // SAFETY: the map is read-only and private to this process; like every user of mapped model files (and
        // safetensors itself) we rely on nobody truncating a model file while it is being read.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        let length = map.len();
        Ok(Self { map: Arc::new(map), offset: 0, length })
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.map[self.offset..self.offset + self.length]
    }

    /// `length` bytes from `offset` of this range; `None` if they are not all inside it.
    pub fn slice(&self, offset: usize, length: usize) -> Option<Self> {
        let inside = offset.checked_add(length)? <= self.length;
        inside.then(|| Self { map: Arc::clone(&self.map), offset: self.offset + offset, length })
    }
}
