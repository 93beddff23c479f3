//! Gathers measurements while a pass runs.

use std::cell::RefCell;

use super::Site;
use crate::Result;
use crate::device::{DType, Device, Offsets, PendingStatistics, Statistics, Tensor};

/// How closely a pass is measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Probes {
    /// Nothing is read.
    #[default]
    Off,
    /// One measurement per site and chunk of micro-batches.
    PerSite,
    /// One per site and micro-batch.
    PerUnit,
    /// One per site and chunk, with every value: for histograms, and for comparing single passes.
    Values,
}

/// Statistics of one site.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    pub site: Site,
    /// Micro-batch of the window; `None`: all of a chunk's together.
    pub unit: Option<usize>,
    /// Dtype of the tensor.
    pub dtype: DType,
    /// The dtype whose range underflow, subnormals and overflow are counted against.
    pub range: DType,
    pub statistics: Statistics,
    /// The elements, row-major, where [`Probes::Values`] asks for them.
    pub values: Option<Vec<f32>>,
}

/// One site of one chunk, its statistics perhaps still being computed.
#[derive(Debug)]
struct Pending {
    site: Site,
    /// Index of the first unit, where units are told apart.
    first_unit: Option<usize>,
    dtype: DType,
    range: DType,
    statistics: PendingStatistics,
    values: Option<Vec<f32>>,
}

/// Collects [`Measurement`]s in execution order.
#[derive(Debug, Default)]
pub struct Recorder {
    probes: Probes,
    range: Option<DType>,
    pending: RefCell<Vec<Pending>>,
}

/// Tells the device what will be measured, until it is dropped.
pub struct Expecting<'a> {
    device: &'a dyn Device,
    /// What it is told then.
    after: Option<(Vec<usize>, Option<DType>)>,
}

impl Drop for Expecting<'_> {
    fn drop(&mut self) {
        self.device.expect_statistics(self.after.as_ref().map(|(units, range)| (&units[..], *range)));
    }
}

impl Recorder {
    /// `range`: dtype to count against; `None`: each tensor's own.
    pub fn new(probes: Probes, range: Option<DType>) -> Self {
        Self { probes, range, pending: RefCell::default() }
    }

    pub fn is_off(&self) -> bool {
        self.probes == Probes::Off
    }

    /// The units that are told apart, of those that `offsets` delimit; `None` when probing is off.
    fn units(&self, offsets: Offsets<'_>) -> Option<Vec<usize>> {
        match self.probes {
            Probes::Off => None,
            Probes::PerSite | Probes::Values => Some(vec![0, offsets.last().copied().unwrap_or(0)]),
            Probes::PerUnit => Some(offsets.to_vec()),
        }
    }

    /// Announces measurements of tensors whose rows belong to the units that `offsets` delimit, and once more of those of
    /// `after`, if any, when what it returns is dropped.
    #[must_use]
    pub fn expect<'a>(
        &self,
        device: &'a dyn Device,
        offsets: Offsets<'_>,
        after: Option<Offsets<'_>>,
    ) -> Option<Expecting<'a>> {
        let units = self.units(offsets)?;
        device.expect_statistics(Some((&units, self.range)));
        let after = after.and_then(|offsets| self.units(offsets)).map(|units| (units, self.range));
        Some(Expecting { device, after })
    }

    /// Measures `x`, whose rows belong to the units that `offsets` delimit, of which the first is `first_unit`.
    /// Nothing happens when probing is off.
    pub fn measure(
        &self,
        device: &dyn Device,
        site: Site,
        x: &Tensor,
        offsets: Offsets<'_>,
        first_unit: usize,
    ) -> Result<()> {
        let Some(units) = self.units(offsets) else { return Ok(()) };
        let range = self.range.unwrap_or(x.dtype);
        let statistics = device.queue_statistics(x, &units, range).map_err(|e| e.at(site))?;
        let values = match self.probes {
            Probes::Values => Some(device.download(x)?),
            _ => None,
        };
        let first_unit = (self.probes == Probes::PerUnit).then_some(first_unit);
        self.pending.borrow_mut().push(Pending { site, first_unit, dtype: x.dtype, range, statistics, values });
        Ok(())
    }

    /// Everything measured, in execution order.
    ///
    /// # Errors
    /// The device failed since.
    pub fn finish(self, device: &dyn Device) -> Result<Vec<Measurement>> {
        let mut measured = Vec::new();
        for Pending { site, first_unit, dtype, range, statistics, values } in self.pending.into_inner() {
            let all = device.finish_statistics(statistics).map_err(|e| e.at(site))?;
            measured.extend(all.into_iter().enumerate().map(|(i, statistics)| Measurement {
                site,
                unit: first_unit.map(|first| first + i),
                dtype,
                range,
                statistics,
                values: values.clone(),
            }));
        }
        Ok(measured)
    }
}
