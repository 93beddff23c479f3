//! How a trainer cuts the batches of its epochs into accumulation windows: the loops of transformers'
//! `_inner_training_loop`, version by version, run on counts instead of data (contract 3.4, 7.3, 15.1, 15.3).
//! Which rows a batch holds is in `shard.rs` and `plan.rs`.

use crate::run::{TrainerSemantics, WindowRule};

/// Consecutive batches of one epoch inside one window, and the fetch that gave them their normaliser.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub epoch: u32,
    /// Batches `begin..end` of the epoch (per rank).
    pub begin: u32,
    pub end: u32,
    /// The batches fetched together with them.
    pub fetch_begin: u32,
    pub fetch_end: u32,
}

/// One optimizer step: a range of parts and where it closes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    pub parts_begin: u32,
    pub parts_end: u32,
    pub epoch: u32,
    /// What the trainer logs as epoch.
    pub logged_epoch: f64,
}

/// What the loops depend on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Geometry {
    /// Rows of the training set (the trainer's num_examples).
    pub rows: u32,
    /// Batches of an epoch, per rank (`len(dataloader)`).
    pub batches: u32,
    /// gradient_accumulation_steps, at least 1.
    pub accumulation: u32,
    pub num_train_epochs: f64,
    /// Negative or 0: not set.
    pub max_steps: i64,
}

impl Geometry {
    /// Optimizer steps the trainer believes an epoch to have.
    pub fn steps_per_epoch(&self, rule: WindowRule) -> u64 {
        let steps = match rule {
            WindowRule::Ceil => self.batches.div_ceil(self.accumulation),
            WindowRule::AcrossEpochs | WindowRule::FloorAcross | WindowRule::FloorLeak => {
                self.batches / self.accumulation
            }
        };
        u64::from(steps.max(1))
    }

    /// T: the step at which training stops, which is also the length of the learning-rate schedule.
    pub fn total_steps(&self, rule: WindowRule) -> u64 {
        match u64::try_from(self.max_steps) {
            Ok(steps) if steps > 0 => steps,
            _ => (self.num_train_epochs * self.steps_per_epoch(rule) as f64).ceil() as u64,
        }
    }

    /// Epochs the trainer loops over.
    pub fn epochs(&self, rule: WindowRule) -> u64 {
        match u64::try_from(self.max_steps) {
            Ok(steps) if steps > 0 => steps.div_ceil(self.steps_per_epoch(rule)),
            _ => self.num_train_epochs.ceil() as u64,
        }
    }
}

/// Where a resumed process starts: the epoch, and the batches of it that it skips (contract 7.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub epoch: u32,
    pub skipped: u32,
}

impl Position {
    pub fn after(step: u64, geometry: &Geometry, rule: WindowRule) -> Self {
        let per_epoch = geometry.steps_per_epoch(rule);
        let skipped = (step % per_epoch) * u64::from(geometry.accumulation);
        Self {
            epoch: u32::try_from(step / per_epoch).unwrap_or(u32::MAX),
            skipped: u32::try_from(skipped).unwrap_or(u32::MAX).min(geometry.batches),
        }
    }
}

/// Every step that one process performs from `start` (after `done` steps) until it stops.
pub fn cut(geometry: &Geometry, semantics: &TrainerSemantics, done: u64, start: Position) -> (Vec<Part>, Vec<Step>) {
    let rule = semantics.windows;
    let mut cutter = Cutter {
        geometry: *geometry,
        rule,
        total: geometry.total_steps(rule),
        done,
        counted: 0,
        parts: Vec::new(),
        open: 0,
        steps: Vec::new(),
    };
    let last = u32::try_from(geometry.epochs(rule)).unwrap_or(u32::MAX);
    let mut skipped = start.skipped;
    for epoch in start.epoch..last {
        if cutter.done >= cutter.total {
            break;
        }
        cutter.epoch(epoch, skipped, semantics.resume_restarts_count);
        // The trainer stops at an epoch in which it finds no batch.
        if skipped >= geometry.batches {
            break;
        }
        skipped = 0;
    }
    (cutter.parts, cutter.steps)
}

struct Cutter {
    geometry: Geometry,
    rule: WindowRule,
    total: u64,
    done: u64,
    /// Micro-batches since the process started (total_batched_samples).
    counted: u64,
    parts: Vec<Part>,
    /// First part that belongs to no step yet: the gradient being accumulated, whatever epoch it began in.
    open: u32,
    steps: Vec<Step>,
}

impl Cutter {
    fn epoch(&mut self, epoch: u32, skipped: u32, restarts: bool) {
        let Geometry { batches, accumulation, rows, .. } = self.geometry;
        let (updates, last) = match self.rule {
            WindowRule::AcrossEpochs => (batches.div_ceil(accumulation), accumulation),
            WindowRule::FloorAcross | WindowRule::FloorLeak => {
                // The remainder is taken of the rows, not of the batches: the mistake behind the leak.
                (batches / accumulation + 1, remainder(rows, accumulation))
            }
            WindowRule::Ceil => (batches.div_ceil(accumulation), remainder(batches, accumulation)),
        };
        // Counting on, the loop starts at the update the checkpoint stands for; recounting, at update 0.
        let first = if restarts { 0 } else { skipped / accumulation };
        let recounted = if restarts { 0 } else { skipped };
        let mut next = skipped;
        for update in first..updates {
            let wanted = if update + 1 == updates { last } else { accumulation };
            let fetch_begin = next;
            let fetch_end = next.saturating_add(wanted).min(batches);
            for batch in fetch_begin..fetch_end {
                self.counted += 1;
                self.accumulate(epoch, batch, fetch_begin, fetch_end);
                if self.closes(batch - skipped + recounted) {
                    self.close(epoch, batch);
                    if self.done >= self.total {
                        return;
                    }
                }
            }
            next = fetch_end;
        }
    }

    /// Does the optimizer step after the `step`-th micro-batch (from 0) of the epoch, as the loop counts it?
    fn closes(&self, step: u32) -> bool {
        let Geometry { batches, accumulation, .. } = self.geometry;
        let ends_epoch = step + 1 == batches;
        match self.rule {
            WindowRule::AcrossEpochs | WindowRule::FloorAcross => {
                self.counted.is_multiple_of(u64::from(accumulation)) || (batches <= accumulation && ends_epoch)
            }
            WindowRule::FloorLeak | WindowRule::Ceil => (step + 1).is_multiple_of(accumulation) || ends_epoch,
        }
    }

    fn accumulate(&mut self, epoch: u32, batch: u32, fetch_begin: u32, fetch_end: u32) {
        let open = self.open as usize;
        match self.parts[open..].last_mut() {
            Some(part) if part.epoch == epoch && part.end == batch && part.fetch_begin == fetch_begin => {
                part.end += 1;
            }
            _ => self.parts.push(Part { epoch, begin: batch, end: batch + 1, fetch_begin, fetch_end }),
        }
    }

    fn close(&mut self, epoch: u32, batch: u32) {
        let end = self.parts.len() as u32;
        let logged_epoch = f64::from(epoch) + f64::from(batch + 1) / f64::from(self.geometry.batches);
        self.steps.push(Step { parts_begin: self.open, parts_end: end, epoch, logged_epoch });
        self.open = end;
        self.done += 1;
    }
}

/// x % y, or y where that is 0.
fn remainder(x: u32, y: u32) -> u32 {
    match x % y {
        0 => y,
        rest => rest,
    }
}
