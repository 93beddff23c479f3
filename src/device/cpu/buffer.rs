//! Memory of CPU tensors, recycled: a step allocates thousands of megabyte-sized buffers, and handing each back to
//! the system costs more (fresh pages, zeroed twice) than most operations on it.

use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Smaller buffers are left to the allocator, which keeps them anyway.
const RECYCLED: usize = 1 << 14;
/// Most elements kept while unused (512 MB): one chunk's activations come and go as a whole.
const KEPT: usize = 1 << 27;

/// A slice of f32 on the heap that goes back to the pool when dropped.
#[derive(Debug)]
pub struct Buffer(Vec<f32>);

#[derive(Default)]
struct Pool {
    /// Unused vectors by capacity.
    unused: BTreeMap<usize, Vec<Vec<f32>>>,
    elements: usize,
}

static POOL: Mutex<Pool> = Mutex::new(Pool { unused: BTreeMap::new(), elements: 0 });

/// A poisoned pool is as good as any: it holds plain vectors.
fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Capacity for n elements: n rounded up to an eighth of its power of two, so that windows of nearly the same length
/// share buffers.
fn class(n: usize) -> usize {
    n.next_multiple_of((1 << n.ilog2()) / 8)
}

impl Pool {
    /// The smallest unused vector of at least n elements that does not waste more than a quarter.
    fn take(&mut self, n: usize) -> Option<Vec<f32>> {
        let (&capacity, vectors) = self.unused.range_mut(n..=n + n / 4).next()?;
        let vector = vectors.pop();
        if vectors.is_empty() {
            self.unused.remove(&capacity);
        }
        self.elements -= capacity;
        vector
    }

    fn put(&mut self, vector: Vec<f32>) {
        let capacity = vector.capacity();
        if self.elements + capacity <= KEPT {
            self.elements += capacity;
            self.unused.entry(capacity).or_default().push(vector);
        }
    }
}

impl Buffer {
    /// n elements of unspecified value: for results that are written whole.
    pub fn unset(n: usize) -> Self {
        if n < RECYCLED {
            return Self(vec![0f32; n]);
        }
        let found = pool().take(n);
        // Zeroed by the system, page by page, as the pages are first touched.
        let mut vector = found.unwrap_or_else(|| vec![0f32; class(n)]);
        // A recycled vector is as long as its last use; what it lacks is zeroed.
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
        if self.0.len() >= RECYCLED {
            pool().put(std::mem::take(&mut self.0));
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
