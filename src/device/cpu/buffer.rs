//! Memory of CPU tensors, recycled: a step allocates thousands of megabyte-sized buffers, and handing each back to
//! the system costs more (fresh pages, zeroed twice) than most operations on it.
//!
//! Large buffers are blocks of a few large mappings, the lowest free place first, so that the program's memory stays
//! close to the most that was ever in use; aligned for the widest loads, in huge pages where the system has them. Each
//! thread keeps the small ones that it drops, as they are: zeroing them again took a tenth of a small model's step.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapOptions};

use super::meter::Measured;
use crate::device::checks::ProductSums;

/// Elements of the smallest block; smaller buffers are vectors.
const POOLED: usize = 1 << CLASSES;
/// Classes of vectors, each twice as long as the one before.
const CLASSES: usize = 14;
/// Vectors of each class that a thread keeps: less than 4 MiB of all together.
const SPARE: usize = 32;
/// Elements of a region (1 GB of addresses; pages take memory once they are touched).
const REGION: usize = 1 << 28;
/// Elements of a cache line: blocks begin and end on one.
const LINE: usize = 16;
/// Elements between blocks. Rows of operands at the same distance from a page's start would compete for the same few
/// cache lines.
const GAP: usize = 13 * LINE;

/// A slice of f32 that goes back to the pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    length: usize,
    /// Of the elements as they are: whoever may change them loses it, and copies begin without.
    measured: Option<Box<Measured>>,
    /// The same of a product.
    sums: Option<Box<ProductSums>>,
}

#[derive(Debug)]
enum Memory {
    Vector(Vector),
    Block(Block),
}

/// Kept by the thread that drops it, unless it is too long.
#[derive(Debug)]
struct Vector(Vec<f32>);

thread_local! {
    static SPARES: RefCell<[Vec<Vec<f32>>; CLASSES]> = RefCell::default();
}

fn class(length: usize) -> usize {
    length.max(1).ilog2() as usize
}

impl Vector {
    /// At least n elements: of exactly n where no spare one will do, because what an adapter holds lives long.
    fn new(n: usize) -> Self {
        let spare = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            let spares = spares.get_mut(class(n))?;
            Some(spares.swap_remove(spares.iter().rposition(|spare| spare.len() >= n)?))
        });
        Self(spare.ok().flatten().unwrap_or_else(|| vec![0f32; n]))
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let vector = std::mem::take(&mut self.0);
        // While its thread ends, a vector is freed.
        _ = SPARES.try_with(|spares| match spares.borrow_mut().get_mut(class(vector.len())) {
            Some(spares) if spares.len() < SPARE => spares.push(vector),
            _ => {}
        });
    }
}

/// Elements `offset..offset + size` of a region, in this owner's hands alone.
#[derive(Debug)]
struct Block {
    start: NonNull<f32>,
    region: usize,
    offset: usize,
    size: usize,
}

// SAFETY: a block is owned memory, like a vector's; regions live as long as the program.
unsafe impl Send for Block {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Block {}

/// One mapping and its free ranges: length by offset, no two of them adjacent.
struct Region {
    map: MmapMut,
    free: BTreeMap<usize, usize>,
}

static POOL: Mutex<Vec<Region>> = Mutex::new(Vec::new());

/// Nothing in here panics half-way; a poisoned pool is as good as any.
fn pool() -> MutexGuard<'static, Vec<Region>> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Region {
    /// Zeroed pages, made by the system when they are first touched; `None` if it grants no addresses.
    fn new(elements: usize) -> Option<Self> {
        let map = MmapOptions::new().len(elements * size_of::<f32>()).no_reserve_swap().map_anon().ok()?;
        #[cfg(target_os = "linux")]
        // Only a hint; without huge pages the memory is as good.
        drop(map.advise(memmap2::Advice::HugePage));
        Some(Self { map, free: BTreeMap::from([(0, elements)]) })
    }

    /// The lowest free range of `size` elements.
    fn take(&mut self, size: usize) -> Option<usize> {
        let (&offset, &length) = self.free.iter().find(|&(_, &length)| length >= size)?;
        self.free.remove(&offset);
        if length > size {
            self.free.insert(offset + size, length - size);
        }
        Some(offset)
    }

    fn put(&mut self, mut offset: usize, mut size: usize) {
        if let Some(after) = self.free.remove(&(offset + size)) {
            size += after;
        }
        if let Some((&before, &length)) = self.free.range(..offset).next_back()
            && before + length == offset
        {
            offset = before;
            size += length;
        }
        self.free.insert(offset, size);
    }
}

impl Block {
    /// A block for n elements; `None` if the system grants no addresses.
    fn new(n: usize) -> Option<Self> {
        let size = n.next_multiple_of(LINE) + GAP;
        let mut regions = pool();
        let found = regions.iter_mut().enumerate().find_map(|(i, region)| Some((i, region.take(size)?)));
        let (region, offset) = match found {
            Some(found) => found,
            None => {
                let mut region = Region::new(REGION.max(size))?;
                let offset = region.take(size)?;
                regions.push(region);
                (regions.len() - 1, offset)
            }
        };
        // SAFETY: the offset lies inside the mapping, which is never unmapped; a page is aligned for f32.
        let start = unsafe { regions[region].map.as_mut_ptr().cast::<f32>().add(offset) };
        Some(Self { start: NonNull::new(start)?, region, offset, size })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        pool()[self.region].put(self.offset, self.size);
    }
}

impl Buffer {
    /// n elements of unspecified value: for results that are written whole.
    pub fn unset(n: usize) -> Self {
        let block = if n < POOLED { None } else { Block::new(n) };
        let memory = block.map_or_else(|| Memory::Vector(Vector::new(n)), Memory::Block);
        Self { memory, length: n, measured: None, sums: None }
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

    /// Keeps what was measured of the elements, until they may be changed.
    pub fn keep(&mut self, measured: Measured) {
        self.measured = Some(Box::new(measured));
    }

    pub fn measured(&self) -> Option<&Measured> {
        self.measured.as_deref()
    }

    /// Keeps what was summed of a product, until the elements may be changed.
    pub fn keep_sums(&mut self, sums: ProductSums) {
        self.sums = Some(Box::new(sums));
    }

    pub fn product_sums(&self) -> Option<&ProductSums> {
        self.sums.as_deref()
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
        match &self.memory {
            Memory::Vector(vector) => &vector.0[..self.length],
            // SAFETY: the block holds at least `length` elements (any bits are an f32) and belongs to this buffer.
            Memory::Block(block) => unsafe { std::slice::from_raw_parts(block.start.as_ptr(), self.length) },
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        (self.measured, self.sums) = (None, None);
        match &mut self.memory {
            Memory::Vector(vector) => &mut vector.0[..self.length],
            // SAFETY: as above, borrowed mutably.
            Memory::Block(block) => unsafe { std::slice::from_raw_parts_mut(block.start.as_ptr(), self.length) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_ranges_join_and_the_lowest_is_taken_first() {
        let mut region = Region::new(100).expect("addresses");
        let [a, b, c] = [10, 20, 30].map(|size| region.take(size).expect("room"));
        assert_eq!((a, b, c), (0, 10, 30));
        assert_eq!(region.take(41), None);
        region.put(a, 10);
        region.put(c, 30);
        assert_eq!(region.take(5), Some(0));
        region.put(b, 20);
        assert_eq!(region.take(95), Some(5));
        region.put(5, 95);
        region.put(0, 5);
        assert_eq!(region.free, BTreeMap::from([(0, 100)]));
    }

    #[test]
    fn buffers_in_use_do_not_overlap() {
        let mut buffers: Vec<Buffer> = (0..20).map(|i| Buffer::copied(&vec![i as f32; POOLED + 37 * i])).collect();
        buffers.retain(|buffer| !(buffer[0] as usize).is_multiple_of(3));
        buffers.extend((20..40).map(|i| Buffer::copied(&vec![i as f32; POOLED + 11 * i])));
        for buffer in &buffers {
            assert!(buffer.iter().all(|&x| x == buffer[0]), "buffer of {}", buffer[0]);
            assert_eq!(buffer.as_ptr().addr() % 64, 0);
        }
    }
}
