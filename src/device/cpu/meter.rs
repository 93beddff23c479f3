//! Measuring a result where it is written, while the core that wrote it still has it in its cache: reading it again
//! later costs more than the arithmetic.
//!
//! A pass that is measured says so beforehand (`expect_statistics`). Operations that make a tensor with as many rows then
//! measure each piece as they finish it, and the buffer keeps the sums over units ([`Measured`]) until it is changed.
//! Pieces lie on a grid that depends on the tensor alone, and are added up in order: neither the number of threads nor
//! their timing can change a bit.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};

use super::gemm::{TILE_COLUMNS, Tile};
use super::threads::Shared;
use super::{Buffer, CpuDevice, measure};
use crate::device::{DType, Offsets, Statistics, Tensor};

/// Elements a piece: what a core writes and reads again without leaving its smallest cache.
const PIECE: usize = 1 << 13;

/// What a pass asks for: see [`crate::device::Device::expect_statistics`].
#[derive(Debug)]
struct Expected {
    units: Vec<usize>,
    target: Option<DType>,
    paused: AtomicBool,
}

/// By the thread that runs the pass: passes on one device do not disturb each other.
#[derive(Default)]
pub(super) struct Expectations(Mutex<HashMap<ThreadId, Arc<Expected>>>);

impl Expectations {
    fn lock(&self) -> MutexGuard<'_, HashMap<ThreadId, Arc<Expected>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set(&self, of: Option<(Offsets<'_>, Option<DType>)>) {
        let thread = thread::current().id();
        match of {
            Some((units, target)) => {
                _ = self
                    .lock()
                    .insert(thread, Arc::new(Expected { units: units.to_vec(), target, paused: AtomicBool::default() }))
            }
            None => _ = self.lock().remove(&thread),
        }
    }

    pub fn pause(&self, pause: bool) {
        if let Some(expected) = self.of_this_thread() {
            expected.paused.store(pause, Ordering::Relaxed);
        }
    }

    fn of_this_thread(&self) -> Option<Arc<Expected>> {
        self.lock().get(&thread::current().id()).cloned()
    }
}

/// Statistics of a buffer's elements, as rows of `columns`.
#[derive(Debug)]
pub struct Measured {
    by: Meter,
    statistics: Vec<Statistics>,
}

impl Measured {
    /// The statistics of x, whose buffer this belongs to, if they are of these units and against this dtype.
    pub fn of(&self, x: &Tensor, units: &[usize], target: DType) -> Option<&[Statistics]> {
        let Meter { expected, columns, target: against, .. } = &self.by;
        let same = expected.units == units && *columns == x.columns() && *against == target;
        same.then_some(&self.statistics)
    }
}

/// What is to be measured of a tensor in the making.
#[derive(Debug, Clone)]
pub(super) struct Meter {
    expected: Arc<Expected>,
    columns: usize,
    dtype: DType,
    target: DType,
}

impl Meter {
    /// Whole rows, at most `rows` of them from a multiple of `rows` on, none of two units: (unit, rows), in order.
    fn cut(&self, rows: usize) -> Vec<(usize, Range<usize>)> {
        let mut pieces = Vec::new();
        for (unit, edges) in self.expected.units.windows(2).enumerate() {
            let mut first = edges[0];
            while first < edges[1] {
                let end = ((first / rows + 1) * rows).min(edges[1]);
                pieces.push((unit, first..end));
                first = end;
            }
        }
        pieces
    }

    fn measured<'a>(&self, parts: impl Iterator<Item = (usize, &'a Statistics)>) -> Measured {
        let units = self.expected.units.len() - 1;
        Measured { by: self.clone(), statistics: measure::merged(units, parts) }
    }
}

impl CpuDevice {
    /// How to measure a tensor of this shape and dtype that is about to be made, if such are expected.
    pub(super) fn meter(&self, shape: &[usize], dtype: DType) -> Option<Meter> {
        let expected = self.expected.of_this_thread().filter(|expected| !expected.paused.load(Ordering::Relaxed))?;
        let (&columns, rows) = shape.split_last()?;
        let units = &expected.units;
        let ordered = units.first() == Some(&0) && units.is_sorted();
        let fits = columns > 0 && ordered && units.last() == Some(&rows.iter().product());
        fits.then(|| Meter { target: expected.target.unwrap_or(dtype), expected, columns, dtype })
    }

    /// As `Workers::rows`, for a tensor of this shape and dtype, which is measured if that is expected. `columns` may
    /// divide the tensor's own.
    pub(super) fn fill(
        &self,
        out: &mut Buffer,
        (shape, dtype): (&[usize], DType),
        columns: usize,
        cost: usize,
        f: impl Fn(usize, &mut [f32]) + Sync + Send,
    ) {
        let Some(meter) = self.meter(shape, dtype) else { return self.workers.rows(out, columns, cost, f) };
        let pieces = meter.cut((PIECE / meter.columns).max(1));
        let work = out.len() * cost;
        let shared = Shared::new(out);
        let parts = self.workers.map(pieces.len(), work, |i| {
            let (first, n) = (pieces[i].1.start * meter.columns, pieces[i].1.len() * meter.columns);
            // SAFETY: pieces do not overlap.
            let run = unsafe { shared.slice(first, n) };
            f(first / columns, run);
            measure::of_run(run, meter.dtype, meter.target)
        });
        out.keep(meter.measured(pieces.iter().zip(&parts).map(|((unit, _), part)| (*unit, part))));
    }

    /// The same for two tensors of one shape and dtype.
    pub(super) fn fill2(
        &self,
        (a, b): (&mut Buffer, &mut Buffer),
        (shape, dtype): (&[usize], DType),
        columns: usize,
        cost: usize,
        f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync + Send,
    ) {
        let Some(meter) = self.meter(shape, dtype) else {
            return self.workers.rows2((a, b), columns, cost, f);
        };
        let pieces = meter.cut((PIECE / 2 / meter.columns).max(1));
        let work = a.len() * cost;
        let shared = (Shared::new(a), Shared::new(b));
        let parts = self.workers.map(pieces.len(), work, |i| {
            let (first, n) = (pieces[i].1.start * meter.columns, pieces[i].1.len() * meter.columns);
            // SAFETY: pieces do not overlap.
            let (a, b) = unsafe { (shared.0.slice(first, n), shared.1.slice(first, n)) };
            f(first / columns, a, b);
            [a, b].map(|run| measure::of_run(run, meter.dtype, meter.target))
        });
        for (which, out) in [a, b].into_iter().enumerate() {
            out.keep(meter.measured(pieces.iter().zip(&parts).map(|((unit, _), parts)| (*unit, &parts[which]))));
        }
    }
}

/// Statistics of a product in the making, by runs of rows and tiles of columns.
pub struct Cells {
    meter: Meter,
    /// Rows of a block; runs do not straddle blocks.
    block: usize,
    width: usize,
    runs: Vec<(usize, Range<usize>)>,
    /// Of each run's tiles.
    cells: Vec<OnceLock<Statistics>>,
}

impl Cells {
    pub(super) fn new(meter: Meter, block: usize, width: usize) -> Self {
        let runs = meter.cut(block);
        let cells = (0..runs.len() * meter.columns.div_ceil(width)).map(|_| OnceLock::new()).collect();
        Self { meter, block, width, runs, cells }
    }

    /// Measures what is written whole of the tiles in `columns`: the block of rows that ends with row `end` − 1.
    pub fn measure<'t>(
        &self,
        end: usize,
        columns: Range<usize>,
        tile: impl Fn(Range<usize>, Range<usize>) -> Tile<'t>,
    ) {
        let start = (end - 1) / self.block * self.block;
        let (tiles, from) =
            (self.meter.columns.div_ceil(self.width), self.runs.partition_point(|(_, run)| run.end <= start));
        for (i, (_, rows)) in self.runs.iter().enumerate().skip(from).take_while(|(_, (_, run))| run.end <= end) {
            for first in columns.clone().step_by(self.width) {
                let tile = tile(rows.clone(), first..(first + self.width).min(columns.end));
                let found = measure::of_rows::<TILE_COLUMNS>(&tile, self.meter.dtype, self.meter.target);
                // Each cell is measured once.
                _ = self.cells[i * tiles + first / self.width].set(found);
            }
        }
    }

    /// `None` if a cell was left out: the tensor is then measured as any other.
    pub(super) fn finish(self) -> Option<Measured> {
        let tiles = self.cells.len() / self.runs.len().max(1);
        let cells = self.cells.iter().map(OnceLock::get).collect::<Option<Vec<&Statistics>>>()?;
        let cells = cells.into_iter().enumerate();
        Some(self.meter.measured(cells.map(|(i, cell)| (self.runs[i / tiles].0, cell))))
    }
}
