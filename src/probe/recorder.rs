//! Gathers measurements while a pass runs.

use std::cell::RefCell;

use super::Site;
use crate::Result;
use crate::device::{DType, Device, Offsets, Statistics, Tensor};

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

/// Collects [`Measurement`]s in execution order.
#[derive(Debug, Default)]
pub struct Recorder {
    probes: Probes,
    range: Option<DType>,
    measured: RefCell<Vec<Measurement>>,
}

impl Recorder {
    /// `range`: dtype to count against; `None`: each tensor's own.
    pub fn new(probes: Probes, range: Option<DType>) -> Self {
        Self { probes, range, measured: RefCell::default() }
    }

    pub fn is_off(&self) -> bool {
        self.probes == Probes::Off
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
        let whole = [0, offsets.last().copied().unwrap_or(0)];
        let (units, numbered) = match self.probes {
            Probes::Off => return Ok(()),
            Probes::PerSite | Probes::Values => (&whole[..], false),
            Probes::PerUnit => (offsets, true),
        };
        let range = self.range.unwrap_or(x.dtype);
        let all = device.statistics(x, units, range).map_err(|e| e.at(site))?;
        let values = match self.probes {
            Probes::Values => Some(device.download(x)?),
            _ => None,
        };
        let mut measured = self.measured.borrow_mut();
        measured.extend(all.into_iter().enumerate().map(|(i, statistics)| Measurement {
            site,
            unit: numbered.then_some(first_unit + i),
            dtype: x.dtype,
            range,
            statistics,
            values: values.clone(),
        }));
        Ok(())
    }

    /// Everything measured, in execution order.
    pub fn finish(self) -> Vec<Measurement> {
        self.measured.into_inner()
    }
}
