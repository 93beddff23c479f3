//! Device memory: buffers counted by reference, a pool of returned ones, and what happens when there is no more.
//!
//! All kernels run on one stream, so a buffer can be given to the next owner as soon as the host drops it: what the
//! next owner queues runs later. Sizes are rounded up to 512 bytes and reused by exact size; a replay repeats the same
//! shapes, so the pool finds a buffer nearly always and cuMemAlloc (which may wait for the device) is rare.
//! SPIKEPROBE_CUDA_POOL=off gives every buffer an allocation of its own size, so that compute-sanitizer and the
//! emulator see its true bounds.
//!
//! A buffer also carries what the kernel that filled it measured on the way; writing to it forgets that.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::driver::Driver;
use super::meter::Stash;
use crate::{Error, Result};

/// Bytes on the device; the memory returns to the pool with the last clone.
#[derive(Debug, Clone)]
pub struct Buffer(Arc<Block>);

#[derive(Debug)]
struct Block {
    address: u64,
    bytes: usize,
    memory: Arc<Memory>,
    stash: Mutex<Option<Stash>>,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.memory.give_back(self.address, self.bytes);
    }
}

impl Buffer {
    pub fn address(&self) -> u64 {
        self.0.address
    }
    /// Whether nobody else can see changes made in place.
    pub fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some()
    }
    /// What was measured of the contents, `None` once they are written again.
    pub(super) fn set_stash(&self, stash: Option<Stash>) {
        *self.0.stash.lock().unwrap_or_else(PoisonError::into_inner) = stash;
    }
    pub(super) fn stash(&self) -> Option<Stash> {
        self.0.stash.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The allocator of one device.
#[derive(Debug)]
pub struct Memory {
    pub driver: Arc<Driver>,
    pooled: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Returned buffers by size.
    free: HashMap<usize, Vec<u64>>,
    free_bytes: usize,
    used_bytes: usize,
}

impl Memory {
    pub fn new(driver: Arc<Driver>) -> Arc<Self> {
        let pooled = std::env::var_os("SPIKEPROBE_CUDA_POOL").is_none_or(|value| value != "off");
        Arc::new(Self { driver, pooled, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The counters stay consistent between any two statements; a panic elsewhere does not spoil them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rounded(&self, bytes: usize) -> usize {
        if self.pooled { bytes.max(1).next_multiple_of(512) } else { bytes.max(1) }
    }

    /// Uninitialised memory. `make_room` frees what it can when the device is full (cached weights) and says whether
    /// it did.
    pub fn allocate(self: &Arc<Self>, bytes: usize, make_room: impl Fn() -> bool) -> Result<Buffer> {
        let size = self.rounded(bytes);
        loop {
            if let Some(address) = self.take(size)? {
                self.state().used_bytes += size;
                let (memory, stash) = (self.clone(), Mutex::default());
                return Ok(Buffer(Arc::new(Block { address, bytes: size, memory, stash })));
            }
            if !self.trim() && !make_room() {
                return Err(self.exhausted(bytes));
            }
        }
    }

    fn take(&self, size: usize) -> Result<Option<u64>> {
        {
            let mut state = self.state();
            if let Some(address) = state.free.get_mut(&size).and_then(Vec::pop) {
                state.free_bytes -= size;
                return Ok(Some(address));
            }
        }
        self.driver.allocate(size)
    }

    fn give_back(&self, address: u64, size: usize) {
        let mut state = self.state();
        state.used_bytes -= size;
        if self.pooled {
            state.free.entry(size).or_default().push(address);
            state.free_bytes += size;
        } else {
            drop(state);
            self.driver.free(address);
        }
    }

    /// Returns the pool's memory to the driver; whether there was any.
    fn trim(&self) -> bool {
        let free = {
            let mut state = self.state();
            state.free_bytes = 0;
            std::mem::take(&mut state.free)
        };
        let any = free.values().any(|addresses| !addresses.is_empty());
        for address in free.into_values().flatten() {
            self.driver.free(address);
        }
        any
    }

    fn exhausted(&self, bytes: usize) -> Error {
        let mebibytes = |bytes: usize| bytes.div_ceil(1 << 20);
        let (free, total) = self.driver.memory().unwrap_or_default();
        Error::memory(format!(
            "out of GPU memory: {} MiB wanted, {} MiB free of {} MiB, {} MiB held by this replay",
            mebibytes(bytes),
            mebibytes(free),
            mebibytes(total),
            mebibytes(self.state().used_bytes)
        ))
        .at(format!("cuda:{}", self.driver.ordinal))
        .next("close other programs on the GPU, shorten cutoff_len or the accumulation window, or use --device cpu")
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.trim();
    }
}
