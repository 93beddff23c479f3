//! Reading and making CPU tensors: f32 views of them, frozen weights in mapped files, shape checks.

use std::borrow::Cow;
use std::sync::Arc;

use super::{Buffer, rounding};
use crate::device::{DType, Storage, Tensor};
use crate::{Error, Result};

/// Elements as they lie in memory.
#[derive(Clone, Copy)]
pub enum Elements<'a> {
    Wide(&'a [f32]),
    /// Little-endian bytes of the dtype.
    Packed(&'a [u8], DType),
}

impl Elements<'_> {
    /// Copies elements `at..at + out.len()` as f32.
    #[inline]
    pub fn read(&self, at: usize, out: &mut [f32]) {
        match *self {
            Elements::Wide(x) => out.copy_from_slice(&x[at..at + out.len()]),
            Elements::Packed(bytes, dtype) => {
                rounding::widen(&bytes[at * dtype.size()..(at + out.len()) * dtype.size()], dtype, out);
            }
        }
    }
}

/// The elements of a tensor that lives on the CPU.
pub fn elements(x: &Tensor) -> Result<Elements<'_>> {
    let found = match &x.storage {
        Storage::Cpu(values) => Elements::Wide(values),
        Storage::Mapped(bytes) => Elements::Packed(bytes.bytes()?, x.dtype),
        #[allow(unreachable_patterns)] // the other devices' storages, where they are compiled in
        _ => return Err(Error::internal("a tensor of another device reached the CPU")),
    };
    let length = match found {
        Elements::Wide(values) => values.len(),
        Elements::Packed(bytes, dtype) => bytes.len() / dtype.size(),
    };
    if length != x.elements() {
        return Err(Error::internal(format!("a tensor of shape {:?} holds {length} elements", x.shape)));
    }
    Ok(found)
}

/// All elements as f32; copied only where they lie in a file.
pub fn values(x: &Tensor) -> Result<Cow<'_, [f32]>> {
    match elements(x)? {
        Elements::Wide(values) => Ok(Cow::Borrowed(values)),
        packed => {
            let mut out = vec![0f32; x.elements()];
            packed.read(0, &mut out);
            Ok(Cow::Owned(out))
        }
    }
}

/// The elements of a tensor that is given up, for changing: its own buffer if nobody else holds it.
pub fn owned(x: Tensor) -> Result<Buffer> {
    match x.storage {
        Storage::Cpu(values) => Ok(Arc::try_unwrap(values).unwrap_or_else(|shared| Buffer::copied(&shared))),
        _ => Ok(Buffer::copied(&values(&x)?)),
    }
}

/// The elements of an owned tensor for changing in place (copied first if someone else holds them too).
pub fn values_mut(x: &mut Tensor) -> Result<&mut [f32]> {
    match &mut x.storage {
        Storage::Cpu(values) => {
            let buffer: &mut Buffer = Arc::make_mut(values);
            Ok(buffer)
        }
        _ => Err(Error::internal("only a tensor that the CPU device made can be changed in place")),
    }
}

/// A tensor from values that are already rounded to `dtype`.
pub fn tensor(values: Buffer, shape: Vec<usize>, dtype: DType) -> Tensor {
    debug_assert_eq!(values.len(), shape.iter().product::<usize>());
    Tensor { shape, dtype, storage: Storage::Cpu(Arc::new(values)) }
}

/// Shape promises between the model and the device; a broken one is our own bug, and named.
pub fn expect(holds: bool, operation: &str, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::internal(format!("{operation}: {}", what()))) }
}

/// Checks the unit boundaries of n rows.
pub fn expect_offsets(offsets: &[usize], rows: usize, operation: &str) -> Result<()> {
    let ordered = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    expect(offsets.first() == Some(&0) && offsets.last() == Some(&rows) && ordered, operation, || {
        format!("unit boundaries {offsets:?} do not cover {rows} rows")
    })
}
