//! packing and neat_packing: which examples share a row of cutoff_len tokens, in which order
//! (llamafactory/data/processor/supervised.py, PackedSupervisedDatasetProcessor; contract 2.6).
//!
//! Owns the grouping; how a packed row attends and counts positions is in `model/ragged.rs`.

use std::collections::HashMap;
use std::ops::Range;

use super::Example;
use crate::run::{Packing, TrainConfig};
use crate::{Error, Result};

/// Place of an example inside a packed row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// Of its first token in the row.
    pub offset: usize,
    /// Of the row, padding included.
    pub length: usize,
    /// neat_packing: it does not attend to the examples before it.
    pub separate: bool,
    /// Its positions count from 0; before 0.9.3 they went on along the row.
    pub restarts: bool,
}

/// Distributes `lengths` over knapsacks of `capacity`: always the longest that still fits. A length above the capacity
/// ends the distribution of what is left (LLaMA-Factory drops such rows before).
pub fn greedy_knapsack(mut lengths: Vec<usize>, capacity: usize) -> Vec<Vec<usize>> {
    lengths.sort_unstable();
    let mut knapsacks = Vec::new();
    while !lengths.is_empty() {
        let (mut knapsack, mut left) = (Vec::new(), capacity);
        while let Some(index) = lengths.partition_point(|&length| length <= left).checked_sub(1) {
            left -= lengths[index];
            knapsack.push(lengths.remove(index));
        }
        if knapsack.is_empty() {
            break;
        }
        knapsacks.push(knapsack);
    }
    knapsacks
}

/// How a run packs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packer {
    /// Tokens of a row that examples may take.
    pub capacity: usize,
    neat: bool,
    restarts: bool,
    /// Rows handed to one call of the preprocessing, and the processes it is shared by (datasets' `map`).
    batch: usize,
    processes: usize,
}

impl Packer {
    /// `None` where the run does not pack. `modern`: LLaMA-Factory 0.9.3 or later, which keeps one token of cutoff_len
    /// for the padding it always adds, and restarts positions.
    pub fn new(config: &TrainConfig, modern: bool) -> Result<Option<Self>> {
        if config.packing == Packing::Off {
            return Ok(None);
        }
        let written = |key: &str, default: u64| {
            let value = config.written.get(key).and_then(serde_json::Value::as_u64).unwrap_or(default);
            usize::try_from(value.max(1)).unwrap_or(usize::MAX)
        };
        let capacity = config.cutoff_len - usize::from(modern);
        if capacity == 0 {
            return Err(Error::input("no token is left for the examples of a packed row").at("cutoff_len"));
        }
        Ok(Some(Self {
            capacity,
            neat: config.packing == Packing::Neat,
            restarts: modern,
            batch: written("preprocessing_batch_size", 1000),
            processes: written("preprocessing_num_workers", 1),
        }))
    }

    /// For each of `rows` rows, the call of the preprocessing that sees it: each process takes a contiguous share and
    /// cuts it into batches.
    pub fn calls(&self, rows: usize) -> Vec<usize> {
        let processes = self.processes.min(rows).max(1);
        let (share, longer) = (rows / processes, rows % processes);
        let mut calls = Vec::with_capacity(rows);
        let mut call = 0;
        for process in 0..processes {
            let mine = share + usize::from(process < longer);
            calls.extend((0..mine).map(|row| call + row / self.batch));
            call += mine.div_ceil(self.batch);
        }
        calls
    }

    /// Brings `examples` into the order of the packed rows and says where each lies; returns the rows' ranges.
    /// `calls`: the call that saw each example, ascending.
    pub fn pack(&self, examples: Vec<Example>, calls: &[usize]) -> (Vec<Example>, Vec<Range<usize>>) {
        let mut packed = Vec::with_capacity(examples.len());
        let mut rows = Vec::new();
        let mut rest = examples.into_iter().zip(calls).peekable();
        while let Some(&(_, &call)) = rest.peek() {
            let mut lengths = Vec::new();
            // Of examples with the same length the last one comes first.
            let mut by_length: HashMap<usize, Vec<Example>> = HashMap::new();
            while let Some((example, _)) = rest.next_if(|(_, of)| **of == call) {
                lengths.push(example.input_ids.len());
                by_length.entry(example.input_ids.len()).or_default().push(example);
            }
            for knapsack in greedy_knapsack(lengths, self.capacity) {
                let (first, mut offset) = (packed.len(), 0);
                for length in knapsack {
                    let Some(mut example) = by_length.get_mut(&length).and_then(Vec::pop) else { continue };
                    example.pack = Some(Packed {
                        offset,
                        length: self.capacity + 1,
                        separate: self.neat,
                        restarts: self.restarts,
                    });
                    offset += length;
                    packed.push(example);
                }
                rows.push(first..packed.len());
            }
        }
        (packed, rows)
    }
}
