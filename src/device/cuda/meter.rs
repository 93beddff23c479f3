//! Measuring in the kernels that compute (`*_measured`, kernels/measure.cuh): no read of memory for it.
//!
//! A pass that is measured says so beforehand (`expect_statistics`). Kernels that make a tensor with as many rows then
//! count while its elements are in registers, one partial result a run, and the buffer keeps where those lie ([`Stash`]).
//! `measure` adds them up when the tensor's statistics are asked for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use bytemuck::{Pod, Zeroable};

use super::kernels::Launch;
use super::measure::{CHUNK, Limits, Partial};
use super::memory::Buffer;
use super::{CudaDevice, lock, narrow};
use crate::Result;
use crate::device::{DType, Offsets, Storage, Tensor};

/// `struct Run` of measure.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Run {
    begin: u64,
    count: u32,
    unused: u32,
}

/// What a measured pass asks for: see [`crate::device::Device::expect_statistics`].
#[derive(Debug)]
pub(super) struct Expected {
    units: Vec<usize>,
    target: Option<DType>,
    /// By columns: a pass makes many tensors of few widths.
    tables: Mutex<HashMap<usize, Table>>,
}

/// The runs of a tensor of one width, on the device.
#[derive(Debug, Clone)]
struct Table {
    runs: Buffer,
    count: u32,
    /// Of each unit's runs, and the end.
    begins: Buffer,
}

/// Partial results of a tensor's runs, kept by its buffer.
#[derive(Debug, Clone)]
pub(super) struct Stash {
    expected: Arc<Expected>,
    columns: usize,
    target: DType,
    /// Of this tensor's first partial, in a buffer that is kept alive with it.
    pub address: u64,
    _partials: Buffer,
    pub begins: Buffer,
}

/// A measured launch in preparation.
pub(super) struct Meter {
    expected: Arc<Expected>,
    table: Table,
    partials: Buffer,
}

impl Stash {
    /// Whether it holds what is asked of x: these units, against this dtype.
    pub fn is_of(&self, x: &Tensor, units: &[usize], target: DType) -> bool {
        self.target == target && self.expected.units == units && self.columns == x.columns()
    }
}

impl CudaDevice {
    pub(super) fn expect(&self, of: Option<(Offsets<'_>, Option<DType>)>) {
        let expected = of.map(|(units, target)| Expected { units: units.to_vec(), target, tables: Mutex::default() });
        *lock(&self.expected) = expected.map(Arc::new);
    }

    /// Room for the partial results of `tensors` tensors like `x` made by one kernel, if such are to be measured.
    pub(super) fn meter(&self, x: &Tensor, tensors: usize) -> Result<Option<Meter>> {
        let Some(expected) = lock(&self.expected).clone() else { return Ok(None) };
        let columns = x.columns();
        if expected.units.last() != Some(&x.rows()) || x.elements() == 0 || u32::try_from(columns).is_err() {
            return Ok(None);
        }
        let known = lock(&expected.tables).get(&columns).cloned();
        let table = match known {
            Some(table) => table,
            None => {
                let table = self.table(&expected.units, columns)?;
                lock(&expected.tables).insert(columns, table.clone());
                table
            }
        };
        let partials = self.bytes(tensors * table.count as usize * size_of::<Partial>())?;
        Ok(Some(Meter { expected, table, partials }))
    }

    /// Whole rows, about [`CHUNK`] elements a run.
    fn table(&self, units: &[usize], columns: usize) -> Result<Table> {
        let rows_a_run = (CHUNK / columns).max(1);
        let (mut runs, mut begins) = (Vec::new(), vec![0u32]);
        for unit in units.windows(2) {
            runs.extend((unit[0]..unit[1]).step_by(rows_a_run).map(|row| {
                let rows = rows_a_run.min(unit[1] - row);
                Run { begin: (row * columns) as u64, count: (rows * columns) as u32, unused: 0 }
            }));
            begins.push(narrow(runs.len(), "run count")?);
        }
        Ok(Table { count: narrow(runs.len(), "run count")?, runs: self.put(&runs)?, begins: self.put(&begins)? })
    }

    /// Ends and queues a launch whose last parameters are n, or partials, runs and limits where it is measured.
    ///
    /// # Safety
    /// As [`Launch::run_over`] or, with a meter, [`Launch::run`] of the kernel's `_measured` twin; `outs` are the
    /// tensors it makes, in the order of their partials.
    pub(super) unsafe fn make(
        &self,
        launch: Launch<'_>,
        meter: Option<Meter>,
        outs: &[&Tensor],
        n: usize,
    ) -> Result<()> {
        match meter {
            // SAFETY: the caller's promise.
            None => unsafe { launch.value(n as u64).run_over(n) },
            // SAFETY: the caller's promise; runs lie inside the tensors, one block a run.
            Some(meter) => unsafe { self.make_measured(launch, meter, outs, 256) },
        }
    }

    /// The measured half of [`Self::make`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn make_measured(
        &self,
        launch: Launch<'_>,
        meter: Meter,
        outs: &[&Tensor],
        threads: u32,
    ) -> Result<()> {
        let Meter { expected, table, partials } = meter;
        let Some(dtype) = outs.first().map(|x| x.dtype) else { return Ok(()) };
        let target = expected.target.unwrap_or(dtype);
        let launch = launch.buffer(&partials).buffer(&table.runs).value(Limits::of(target));
        // SAFETY: the caller's promise.
        unsafe { launch.run((table.count, 1), threads)? };
        for (i, out) in outs.iter().enumerate() {
            let Storage::Cuda(buffer) = &out.storage else { continue };
            buffer.set_stash(Some(Stash {
                expected: expected.clone(),
                columns: out.columns(),
                target,
                address: partials.address() + (i * table.count as usize * size_of::<Partial>()) as u64,
                _partials: partials.clone(),
                begins: table.begins.clone(),
            }));
        }
        Ok(())
    }
}
