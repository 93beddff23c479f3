//! `torch.save` files: a stored ZIP of one pickle and raw little-endian storages (contract 7.2).
//!
//! Opens the archive and turns a recorded `_rebuild_tensor_v2` call into numbers. Which keys a file must have is for
//! `checkpoint.rs`.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::pickle::{Pickle, View};
use crate::{Error, Result};

/// An open `.pt`, `.pth` or `.bin` file.
#[derive(Debug)]
pub struct TorchFile {
    path: PathBuf,
    archive: zip::ZipArchive<File>,
    /// Folder inside the archive (`optimizer`, `archive`, …).
    stem: String,
    /// Bytes on disk: no entry of a stored archive can be longer.
    size: u64,
    pub pickle: Pickle,
}

/// A tensor of a torch file, row-major, widened to f64 for integers and doubles and f32 values alike.
#[derive(Debug, Clone, PartialEq)]
pub struct TorchTensor {
    pub shape: Vec<usize>,
    /// torch's storage class without "Storage": `Float`, `BFloat16`, `Half`, `Double`, `Long`, `Byte` …
    pub dtype: String,
    pub values: Vec<f32>,
}

impl TorchFile {
    /// Opens the archive and parses its pickle.
    ///
    /// # Errors
    /// Missing or unreadable file, not a ZIP, no `data.pkl`, a broken pickle.
    pub fn open(path: &Path) -> Result<Self> {
        let broken = |e: &dyn std::fmt::Display| {
            Error::input(format!("not a readable torch.save file: {e}"))
                .at_path(path)
                .next("the file is damaged or only partly copied; copy it again or start from another checkpoint")
        };
        let file = File::open(path).map_err(|e| Error::input(e.to_string()).at_path(path))?;
        let size = file.metadata().map_err(|e| broken(&e))?.len();
        let mut archive = zip::ZipArchive::new(file).map_err(|e| broken(&e))?;
        let name = archive
            .file_names()
            .filter_map(|name| Some(name.ok()?.into_owned()))
            .find(|name| name.ends_with("/data.pkl") || name == "data.pkl");
        let name = name.ok_or_else(|| broken(&"it holds no data.pkl"))?;
        let stem = name.strip_suffix("data.pkl").unwrap_or_default().to_owned();
        if let Some(order) = read_entry(&mut archive, &format!("{stem}byteorder"), size).ok()
            && order != b"little"
        {
            return Err(broken(&"it was written on a big-endian machine"));
        }
        let bytes = read_entry(&mut archive, &name, size).map_err(|e| broken(&e))?;
        let pickle = Pickle::parse(&bytes).map_err(|e| e.at_path(path))?;
        Ok(Self { path: path.to_owned(), archive, stem, size, pickle })
    }

    /// Reads the tensor that `view` of `pickle` describes. `what` names it in messages.
    ///
    /// # Errors
    /// `view` is no tensor, its storage is missing, short, or of an unknown dtype, or its strides leave the storage.
    pub fn tensor(&mut self, recipe: &TensorRecipe, what: &str) -> Result<TorchTensor> {
        let at = |e: Error| e.at(what).at_path(&self.path);
        let name = format!("{}data/{}", self.stem, recipe.key);
        let bytes = read_entry(&mut self.archive, &name, self.size)
            .map_err(|e| at(Error::input(format!("storage {} cannot be read: {e}", recipe.key))))?;
        let values = recipe.gather(&bytes).map_err(at)?;
        Ok(TorchTensor { shape: recipe.shape.clone(), dtype: recipe.dtype.clone(), values })
    }

    /// The bytes of a storage, as they lie in the file.
    pub fn storage(&mut self, recipe: &TensorRecipe) -> Result<Vec<u8>> {
        let name = format!("{}data/{}", self.stem, recipe.key);
        read_entry(&mut self.archive, &name, self.size)
            .map_err(|e| Error::input(format!("storage {} cannot be read: {e}", recipe.key)).at_path(&self.path))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn read_entry(archive: &mut zip::ZipArchive<File>, name: &str, limit: u64) -> std::result::Result<Vec<u8>, String> {
    let entry = archive.by_name(name).map_err(|e| e.to_string())?;
    if entry.size() > limit {
        return Err(format!("{name} claims {} bytes, the file has {limit}", entry.size()));
    }
    let claimed = entry.size();
    let mut bytes = Vec::new();
    entry.take(limit).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    if bytes.len() as u64 != claimed {
        return Err(format!("{name} is short: {} of {claimed} bytes", bytes.len()));
    }
    Ok(bytes)
}

/// Where a tensor's elements lie: what `_rebuild_tensor_v2` would have been called with.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorRecipe {
    pub dtype: String,
    pub key: String,
    offset: usize,
    pub shape: Vec<usize>,
    stride: Vec<usize>,
}

impl TensorRecipe {
    /// `None`: the value is no tensor.
    pub fn of(view: View<'_>) -> Option<Self> {
        let (mut callable, mut arguments) = view.as_call()?;
        // A Parameter holds its tensor. Once only: values of a pickle may refer to themselves.
        if callable.as_global()?.1 == "_rebuild_parameter" {
            (callable, arguments) = arguments.first()?.as_call()?;
        }
        if callable.as_global()?.1 != "_rebuild_tensor_v2" {
            return None;
        }
        let [storage, offset, shape, stride, ..] = arguments.as_slice() else { return None };
        let storage = storage.as_persistent()?.elements()?;
        let [_, class, key, ..] = storage.as_slice() else { return None };
        let sizes = |view: &View<'_>| -> Option<Vec<usize>> {
            view.elements()?.into_iter().map(|v| usize::try_from(v.as_i64()?).ok()).collect()
        };
        let (shape, stride) = (sizes(shape)?, sizes(stride)?);
        (shape.len() == stride.len()).then_some(())?;
        Some(Self {
            dtype: class.as_global()?.1.strip_suffix("Storage")?.to_owned(),
            key: key.as_str()?.to_owned(),
            offset: usize::try_from(offset.as_i64()?).ok()?,
            shape,
            stride,
        })
    }

    /// Reads the elements row-major. A tensor may not have more elements than its storage (no broadcast views), so
    /// nothing is allocated beyond the file's own size.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<f32>> {
        let (width, read): (usize, fn(&[u8]) -> f32) = match self.dtype.as_str() {
            "Float" => (4, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
            "BFloat16" => (2, |b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()),
            "Half" => (2, |b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()),
            "Double" => (8, |b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32),
            "Long" => (8, |b| i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32),
            "Int" => (4, |b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32),
            other => {
                return Err(Error::input(format!("storage of type {other} is not supported"))
                    .next("float32, bfloat16, float16, float64 and integer tensors are"));
            }
        };
        let stored = bytes.len() / width;
        let elements = self.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).filter(|&n| n <= stored);
        let last = self.shape.iter().zip(&self.stride).try_fold(self.offset, |at, (&d, &s)| {
            d.saturating_sub(1).checked_mul(s).and_then(|reach| at.checked_add(reach))
        });
        let (Some(elements), Some(last)) = (elements, last) else { return Err(self.too_small(stored)) };
        if elements == 0 {
            return Ok(Vec::new());
        }
        if last >= stored {
            return Err(self.too_small(stored));
        }
        let mut values = Vec::with_capacity(elements);
        let mut index = vec![0usize; self.shape.len()];
        for _ in 0..elements {
            let at = self.offset + index.iter().zip(&self.stride).map(|(&i, &s)| i * s).sum::<usize>();
            values.push(read(&bytes[at * width..(at + 1) * width]));
            for d in (0..index.len()).rev() {
                index[d] += 1;
                if index[d] < self.shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
        Ok(values)
    }

    fn too_small(&self, stored: usize) -> Error {
        Error::input(format!("a tensor of shape {:?} does not fit its storage of {stored} elements", self.shape))
            .next("the file is damaged; use another checkpoint")
    }
}
