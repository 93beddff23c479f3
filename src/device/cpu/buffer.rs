//! Memory of CPU tensors, recycled: a step allocates thousands of megabyte-sized buffers, and handing each back to
//! the system costs more (fresh pages, zeroed twice) than most operations on it.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Smaller buffers are left to the allocator, which keeps them anyway.
const RECYCLED: usize = 1 << 14;
/// Most elements kept while unused (256 MB).
const KEPT: usize = 1 << 26;

/// A slice of f32 on the heap that goes back to the pool when dropped.
#[derive(Debug)]
pub struct Buffer(Vec<f32>);

#[derive(Default)]
struct Pool {
    /// Unused vectors by capacity class.
    unused: HashMap<usize, Vec<Vec<f32>>>,
    elements: usize,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// A poisoned pool is as good as any: it holds plain vectors.
fn pool() -> MutexGuard<'static, Option<Pool>> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Capacity for n elements: n rounded up to an eighth of its power of two, so that windows of nearly the same length
/// share buffers.
fn class(n: usize) -> usize {
    n.next_multiple_of((1 << n.ilog2()) / 8)
}

impl Buffer {
    /// n elements of unspecified value: for results that are written whole.
    pub fn unset(n: usize) -> Self {
        if n < RECYCLED {
            return Self(vec![0f32; n]);
        }
        let class = class(n);
        let found = pool().as_mut().and_then(|pool| {
            let vector = pool.unused.get_mut(&class)?.pop()?;
            pool.elements -= class;
            Some(vector)
        });
        let mut vector = found.unwrap_or_else(|| Vec::with_capacity(class));
        vector.resize(n, 0.0);
        Self(vector)
    }

    /// n zeros.
    pub fn zeros(n: usize) -> Self {
        let mut buffer = Self::unset(n);
        buffer.fill(0.0);
        buffer
    }

    pub fn copied(values: &[f32]) -> Self {
        let mut buffer = Self::unset(values.len());
        buffer.copy_from_slice(values);
        buffer
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let vector = std::mem::take(&mut self.0);
        let capacity = vector.capacity();
        if vector.len() < RECYCLED || class(capacity) != capacity {
            return;
        }
        let mut pool = pool();
        let pool = pool.get_or_insert_default();
        if pool.elements + capacity <= KEPT {
            pool.elements += capacity;
            pool.unused.entry(capacity).or_default().push(vector);
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self::copied(self)
    }
}

impl Deref for Buffer {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}
