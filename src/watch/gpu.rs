//! What the GPUs report while a run is watched: faults, and clocks held down. Empty where there is no NVML.

use super::Event;
use crate::device::nvml::{Nvml, Reading, Report};

/// The GPUs of this machine, as far as the driver tells.
#[derive(Debug)]
pub struct Gpus {
    nvml: Option<Nvml>,
    last: Vec<Reading>,
}

impl Gpus {
    pub fn open() -> Self {
        Self { nvml: Nvml::open(), last: Vec::new() }
    }

    /// Reads all GPUs; returns what is worth telling.
    pub fn look(&mut self) -> Vec<Event> {
        let Some(nvml) = &self.nvml else { return Vec::new() };
        let now = nvml.read();
        let events = changes(&self.last, &now, &nvml.reports());
        self.last = now;
        events
    }

    /// The last readings.
    pub fn readings(&self) -> &[Reading] {
        &self.last
    }
}

/// What happened between two readings. A GPU that was not read before has nothing to compare with.
pub fn changes(before: &[Reading], now: &[Reading], reports: &[(u32, Report)]) -> Vec<Event> {
    let mut events: Vec<Event> = reports
        .iter()
        .map(|(gpu, report)| {
            let what = match report {
                Report::Xid(79) => "Xid 79: the GPU has fallen off the bus".to_owned(),
                Report::Xid(number) => format!("Xid {number}: see NVIDIA's list of Xid errors and the kernel log"),
                Report::DoubleBitEcc => "a memory error that ECC could not correct".to_owned(),
            };
            Event::Gpu { gpu: *gpu, what }
        })
        .collect();
    for reading in now {
        let Some(old) = before.iter().find(|old| old.index == reading.index) else { continue };
        if let (Some(was), Some(is)) = (old.ecc_uncorrected, reading.ecc_uncorrected)
            && is > was
        {
            let what = format!("{} more uncorrected memory errors: numbers since then may be wrong", is - was);
            events.push(Event::Gpu { gpu: reading.index, what });
        }
        if old.slowed == Some(false) && reading.slowed == Some(true) {
            let what = "clocks are held down by heat or power: steps take longer, numbers stay right".to_owned();
            events.push(Event::Gpu { gpu: reading.index, what });
        }
    }
    events
}
