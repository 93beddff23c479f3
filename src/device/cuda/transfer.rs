//! Copies between host and device through page-locked slots, so that the host runs ahead of the device.
//!
//! A slot fills up from its start; when it is full an event marks its last copy, and the slot is written again only
//! after that event. Two slots: the host fills one while the device reads the other.

use super::driver::{Driver, Event, Stream};
use crate::Result;

/// Bytes a slot: a few milliseconds of PCIe traffic, long enough to hide the cost of a copy call.
const SLOT: usize = 8 << 20;

/// Page-locked slots for one stream.
#[derive(Debug)]
pub struct Staging {
    driver: std::sync::Arc<Driver>,
    stream: Stream,
    slots: Vec<Slot>,
    current: usize,
}

#[derive(Debug)]
struct Slot {
    address: *mut u8,
    used: usize,
    read: Event,
}

// SAFETY: the slots' memory belongs to this value alone; it is used under &mut only.
unsafe impl Send for Staging {}

impl Staging {
    pub fn new(driver: std::sync::Arc<Driver>, stream: Stream) -> Self {
        Self { driver, stream, slots: Vec::new(), current: 0 }
    }

    /// The current slot with at least one free byte; waits for the device if all are being read.
    fn slot(&mut self) -> Result<&mut Slot> {
        if self.slots.is_empty() {
            for _ in 0..2 {
                let read = self.driver.event()?;
                self.slots.push(Slot { address: self.driver.allocate_host(SLOT)?, used: 0, read });
            }
        }
        if self.slots[self.current].used == SLOT {
            self.driver.record(&self.slots[self.current].read, self.stream)?;
            self.current = (self.current + 1) % self.slots.len();
            let next = &mut self.slots[self.current];
            if next.used > 0 {
                self.driver.wait(&next.read)?;
                next.used = 0;
            }
        }
        Ok(&mut self.slots[self.current])
    }

    /// Queues a copy of `bytes` to the device; they may be changed as soon as this returns.
    ///
    /// # Safety
    /// `to..to + bytes.len()` lies in one live allocation that no other stream uses.
    pub unsafe fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        let (driver, stream) = (self.driver.clone(), self.stream);
        let mut done = 0;
        while done < bytes.len() {
            let slot = self.slot()?;
            let count = (SLOT - slot.used).min(bytes.len() - done);
            // SAFETY: the slot has `SLOT` bytes, `used + count` of them at most are touched, and nothing queued reads
            // this part (see `slot`). The target is the caller's promise.
            unsafe {
                let from = slot.address.add(slot.used);
                std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), from, count);
                driver.copy_to_device(to + done as u64, from, count, stream)?;
            }
            // Starts stay aligned for the copy engine.
            slot.used = (slot.used + count).next_multiple_of(256).min(SLOT);
            done += count;
        }
        Ok(())
    }

    /// Copies from the device, after all work queued so far.
    ///
    /// # Safety
    /// `from..from + bytes.len()` lies in one live allocation.
    pub unsafe fn download(&mut self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let (driver, stream) = (self.driver.clone(), self.stream);
        // Everything queued has read its slot once the stream is idle.
        driver.synchronize(stream)?;
        for slot in &mut self.slots {
            slot.used = 0;
        }
        let slot = self.slot()?;
        for (i, run) in bytes.chunks_mut(SLOT).enumerate() {
            // SAFETY: the slot is idle and large enough; the source is the caller's promise.
            unsafe {
                driver.copy_to_host(slot.address, from + (i * SLOT) as u64, run.len(), stream)?;
                driver.synchronize(stream)?;
                std::ptr::copy_nonoverlapping(slot.address, run.as_mut_ptr(), run.len());
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A slot may still be read by queued copies.
        let _ = self.driver.synchronize(self.stream);
        for slot in &self.slots {
            self.driver.free_host(slot.address);
        }
    }
}
