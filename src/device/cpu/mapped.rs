//! Memory-mapped files: the only way weights enter the program, and its unsafe part.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::device::{DType, Storage, Tensor};
use crate::{Error, Result};

/// A range of bytes of a memory-mapped file; cheap to clone, keeps the map alive.
#[derive(Debug, Clone)]
pub struct MappedBytes {
    pub map: Arc<memmap2::Mmap>,
    pub offset: usize,
    pub length: usize,
}

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

    /// The bytes; an error if the range leaves the file.
    pub fn bytes(&self) -> Result<&[u8]> {
        self.offset.checked_add(self.length).and_then(|end| self.map.get(self.offset..end)).ok_or_else(|| {
            Error::internal(format!(
                "bytes {}+{} lie outside a mapped file of {}",
                self.offset,
                self.length,
                self.map.len()
            ))
        })
    }
}

impl Tensor {
    /// A frozen weight that stays in its file: [`Storage::Mapped`], row-major little-endian elements of `dtype`.
    pub fn mapped(bytes: MappedBytes, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let elements: usize = shape.iter().product();
        if bytes.length != elements * dtype.size() {
            return Err(Error::input(format!(
                "{} bytes for a tensor of shape {shape:?} in {dtype:?}, which takes {}",
                bytes.length,
                elements * dtype.size()
            )));
        }
        bytes.bytes()?;
        Ok(Tensor { shape: shape.to_vec(), dtype, storage: Storage::Mapped(bytes) })
    }
}
