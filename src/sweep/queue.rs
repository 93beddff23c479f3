//! Runs the cells a folder lacks: bunches of cells that share their steps, several bunches at once, each written as
//! soon as it is done.
//!
//! A cell's numbers do not depend on what runs beside it, so bunches are spread over threads: small models leave most
//! of a processor idle when their products are spread instead.

use std::ops::ControlFlow;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::folder::{CellResult, Folder, Manifest};
use super::outcome::Tracker;
use super::{CELL_SCHEMA, Cell, Outcome, Trainer, bunch};
use crate::diagnosis::detect;
use crate::{Error, Result, interrupt};

/// A share of the cells: those whose index leaves `index` when divided by `count`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub count: usize,
}

impl Shard {
    pub const ALL: Self = Self { index: 0, count: 1 };

    /// `I/N`, I from 0 to N − 1, as Slurm arrays and Kubernetes indexed jobs count.
    ///
    /// # Errors
    /// Anything else, as a sentence for the command line.
    pub fn parse(typed: &str) -> std::result::Result<Self, String> {
        let parts = typed.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match parts {
            Some((index, count)) if index < count => Ok(Self { index, count }),
            _ => Err(format!("`{typed}` is not I/N with I from 0 to N-1")),
        }
    }
    pub fn holds(&self, cell: usize) -> bool {
        cell % self.count == self.index
    }
}

/// What a call of [`run`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Found in the folder.
    pub kept: usize,
    pub computed: usize,
}

/// Runs what is missing of `shard`. `told` hears of every finished cell (index in the manifest).
///
/// # Errors
/// The first error of any cell; cells in flight are finished first and results so far are kept.
pub fn run(
    folder: &Folder,
    manifest: &Manifest,
    shard: Shard,
    workers: usize,
    trainer: &dyn Trainer,
    context: detect::Context,
    told: &(dyn Fn(usize, &CellResult) + Sync),
) -> Result<Done> {
    let mine: Vec<usize> = (0..manifest.cells.len()).filter(|i| shard.holds(*i)).collect();
    let mut missing = Vec::new();
    for index in &mine {
        if folder.load(&manifest.cells[*index], &manifest.fingerprint)?.is_none() {
            missing.push(*index);
        }
    }
    let bunches = bunch::bunches(&manifest.cells, &missing, workers, trainer)?;
    let (next, stop, failure) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::new(None::<Error>));
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let Some(bunch) = bunches.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
            let cells: Vec<&Cell> = bunch.iter().map(|i| &manifest.cells[*i]).collect();
            let results = several(&cells, &manifest.fingerprint, trainer, context).and_then(|results| {
                for (index, result) in bunch.iter().zip(&results) {
                    folder.store(result)?;
                    told(*index, result);
                }
                Ok(())
            });
            if let Err(error) = results {
                stop.store(true, Ordering::Relaxed);
                let named = error.kind != crate::error::Kind::Interrupted && !cells.is_empty();
                let error = if named { error.at(name(cells[0])) } else { error };
                failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers.min(bunches.len()) {
            scope.spawn(work);
        }
        work();
    });
    match failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        Some(error) => Err(error),
        None => Ok(Done { kept: mine.len() - missing.len(), computed: missing.len() }),
    }
}

/// Cells from start to outcome, each result with its share of the time.
///
/// # Errors
/// As [`Trainer::train`]; Ctrl-C.
pub fn several(
    cells: &[&Cell],
    fingerprint: &str,
    trainer: &dyn Trainer,
    context: detect::Context,
) -> Result<Vec<CellResult>> {
    let start = std::time::Instant::now();
    let tracker =
        |cell: &&Cell| Ok(Tracker::new(cell.steps, cell.samples_per_step, trainer.parameters(cell)?, context));
    let mut trackers = cells.iter().map(tracker).collect::<Result<Vec<_>>>()?;
    trainer.train(cells, &mut |index, record| {
        let diverged = trackers[index].push(record);
        if diverged || interrupt::interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    interrupt::check()?;
    let outcomes: Vec<Outcome> = trackers.into_iter().map(Tracker::finish).collect();
    let second = start.elapsed().as_secs_f64() / outcomes.iter().map(|o| o.samples).sum::<u64>().max(1) as f64;
    let result = |(cell, outcome): (&&Cell, Outcome)| CellResult {
        schema: CELL_SCHEMA.into(),
        fingerprint: fingerprint.into(),
        cell: (*cell).clone(),
        seconds: second * outcome.samples as f64,
        outcome,
        machine: trainer.machine(),
    };
    Ok(cells.iter().zip(outcomes).map(result).collect())
}

/// `learning_rate: 0.001, gradient_accumulation_steps: 8`.
pub fn name(cell: &Cell) -> String {
    crate::report::page::changes_line(&cell.axes)
}
