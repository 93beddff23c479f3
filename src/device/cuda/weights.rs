//! Frozen weights: from the mapped file to the device when first used, kept while there is room, streamed when not.
//!
//! Copies run on a stream of their own while kernels compute: the host queues the kernels of layer i, goes on to layer
//! i + 1 and copies its weights meanwhile. Two orders must hold, both kept by events: a kernel waits for the copy of its
//! weight, and a copy into a reused buffer waits for the last kernel that read the old weight.

use std::collections::HashMap;
use std::sync::Arc;

use super::driver::{Driver, Event};
use super::memory::{Buffer, Memory};
use super::transfer::Staging;
use crate::Result;
use crate::device::cpu::MappedBytes;

/// Share of the free memory at start that weights may fill; the rest is for activations.
const SHARE: f64 = 0.6;

/// A weight on the device; while it is held the cache does not give its memory away.
#[derive(Debug, Clone)]
pub struct Weight(Arc<Resident>);

#[derive(Debug)]
struct Resident {
    driver: Arc<Driver>,
    buffer: Buffer,
    last_use: Event,
}

impl Weight {
    pub fn address(&self) -> u64 {
        self.0.buffer.address()
    }
    /// To be called when the kernels that read it have been queued.
    pub fn used(&self) -> Result<()> {
        self.0.driver.record(&self.0.last_use, self.0.driver.compute)
    }
}

/// (address of the map, offset, length): one per tensor of a file.
type Key = (usize, usize, usize);

/// What is on the device, oldest use first to go.
#[derive(Debug)]
pub struct Weights {
    memory: Arc<Memory>,
    staging: Staging,
    budget: usize,
    held: usize,
    clock: u64,
    entries: HashMap<Key, Entry>,
}

#[derive(Debug)]
struct Entry {
    weight: Weight,
    bytes: usize,
    used_at: u64,
    /// Keeps the file mapped, so that its address cannot come to mean another file.
    _source: MappedBytes,
}

impl Weights {
    /// # Errors
    /// The driver cannot say how much memory is free.
    pub fn new(memory: Arc<Memory>) -> Result<Self> {
        let driver = memory.driver.clone();
        let budget = (driver.memory()?.0 as f64 * SHARE) as usize;
        let staging = Staging::new(driver.clone(), driver.copies);
        Ok(Self { memory, staging, budget, held: 0, clock: 0, entries: HashMap::new() })
    }

    /// The weight, copied to the device if it is not there. Later kernels wait for the copy.
    ///
    /// # Errors
    /// Out of memory with every other weight given up, a driver failure.
    pub fn get(&mut self, source: &MappedBytes) -> Result<Weight> {
        self.clock += 1;
        let key = (Arc::as_ptr(&source.map) as usize, source.offset, source.length);
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.used_at = self.clock;
            return Ok(entry.weight.clone());
        }
        let weight = self.place(source.length)?;
        let driver = self.memory.driver.clone();
        // SAFETY: the buffer is `length` bytes long and used by this copy alone until the event below.
        unsafe { self.staging.upload(weight.address(), source.as_slice())? };
        let copied = driver.event()?;
        driver.record(&copied, driver.copies)?;
        driver.order(driver.compute, &copied)?;
        self.held += source.length;
        let entry =
            Entry { weight: weight.clone(), bytes: source.length, used_at: self.clock, _source: source.clone() };
        self.entries.insert(key, entry);
        Ok(weight)
    }

    /// Memory for a weight: the buffer of an old weight of the same size if the budget is full, else fresh.
    fn place(&mut self, bytes: usize) -> Result<Weight> {
        let driver = self.memory.driver.clone();
        while self.held + bytes > self.budget {
            let Some(victim) = self.oldest(Some(bytes)).or_else(|| self.oldest(None)) else { break };
            let Some(entry) = self.remove(victim) else { break };
            if entry.bytes == bytes {
                driver.order(driver.copies, &entry.weight.0.last_use)?;
                return Ok(entry.weight);
            }
        }
        let memory = self.memory.clone();
        let buffer = memory.allocate(bytes, || false).or_else(|_| {
            self.evict();
            memory.allocate(bytes, || false)
        })?;
        let resident = Resident { last_use: driver.event()?, driver: driver.clone(), buffer };
        // A buffer from the pool may still be read by queued kernels of its former owner.
        driver.record(&resident.last_use, driver.compute)?;
        driver.order(driver.copies, &resident.last_use)?;
        Ok(Weight(Arc::new(resident)))
    }

    /// The entry used longest ago that no operation holds, of this size if one is asked for.
    fn oldest(&self, bytes: Option<usize>) -> Option<Key> {
        let candidates = self
            .entries
            .iter()
            .filter(|(_, e)| bytes.is_none_or(|b| e.bytes == b) && Arc::strong_count(&e.weight.0) == 1);
        candidates.min_by_key(|(_, e)| e.used_at).map(|(key, _)| *key)
    }

    fn remove(&mut self, key: Key) -> Option<Entry> {
        let entry = self.entries.remove(&key)?;
        self.held -= entry.bytes;
        Some(entry)
    }

    /// Gives up every weight that no operation holds; whether there was one. Kernels already queued still read them:
    /// their memory goes back through the pool, whose next owner's work is queued behind.
    pub fn evict(&mut self) -> bool {
        let mut any = false;
        while let Some(key) = self.oldest(None) {
            any |= self.remove(key).is_some();
        }
        any
    }
}
