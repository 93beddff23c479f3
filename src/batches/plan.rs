//! [`Plan`]: which rows each optimizer step of one process of the trainer saw, with every epoch's order
//! (contract 3, 7.3, 7.4). Random access by step; an epoch's order is drawn when first asked for.

use std::ops::{Range, RangeInclusive};
use std::sync::OnceLock;

use super::random::randperm;
use super::shard::Shards;
use super::windows::{Geometry, Part, Position, Step, cut};
use super::{Corpus, Example, Fetched, MicroBatch, Window};
use crate::run::{ResumeOrder, TrainConfig, TrainerSemantics, WindowRule};
use crate::{Error, Result};

/// Beyond this row count torch.randperm draws 64-bit numbers (contract 3.2).
const MOST_ROWS: usize = (1 << 32) / 20;

/// The windows of one process: a fresh start, or a resume.
#[derive(Debug)]
pub struct Plan {
    /// Optimizer steps the trainer believes an epoch to have (floor or ceil, by version).
    pub steps_per_epoch: u64,
    /// T: where training stops; the length of the learning-rate schedule.
    pub total_steps: u64,
    /// Batches of an epoch, per rank.
    pub batches_per_epoch: u64,
    /// Labels that count towards N, per training row.
    label_counts: Vec<u32>,
    /// The examples of each row, where rows are packed.
    packs: Vec<Range<usize>>,
    shards: Shards,
    parts: Vec<Part>,
    steps: Vec<Step>,
    done: u64,
    /// First epoch of the process and its orders from there on.
    first_epoch: u32,
    orders: Vec<OnceLock<Vec<u32>>>,
    order: OrderRule,
    rule: WindowRule,
    sums_ranks: bool,
}

/// Where the order of an epoch comes from.
#[derive(Debug, Clone, Copy)]
struct OrderRule {
    shuffled: bool,
    seed: u64,
    /// This epoch wrongly runs in epoch 0's order.
    wrong_epoch: Option<u32>,
}

impl Plan {
    /// The process that starts at the initial adapter (`resumed_from` `None`) or at checkpoint-K.
    ///
    /// # Errors
    /// No rows, or a case that is not covered: 4.46 with windows that straddle epochs, too many rows.
    pub fn new(
        corpus: &Corpus,
        config: &TrainConfig,
        semantics: &TrainerSemantics,
        resumed_from: Option<u64>,
    ) -> Result<Plan> {
        let counted = |example: &Example| {
            if semantics.count_shifted { example.label_tokens() } else { example.unshifted_label_tokens() }
        };
        let narrow = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let label_counts = if corpus.packs.is_empty() {
            corpus.train.iter().map(|example| narrow(counted(example))).collect()
        } else {
            corpus.packs.iter().map(|pack| narrow(corpus.train[pack.clone()].iter().map(counted).sum())).collect()
        };
        let plan = Self::of_counts(label_counts, config, semantics, resumed_from)?;
        Ok(Plan { packs: corpus.packs.clone(), ..plan })
    }

    /// The same from label counts alone (one per training row, in the order the permutation indexes).
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn of_counts(
        label_counts: Vec<u32>,
        config: &TrainConfig,
        semantics: &TrainerSemantics,
        resumed_from: Option<u64>,
    ) -> Result<Plan> {
        if label_counts.len() >= MOST_ROWS {
            return Err(Error::refused(format!("{} training rows are more than {MOST_ROWS}", label_counts.len())));
        }
        let size = |key: &str, value: usize| {
            u32::try_from(value).ok().filter(|&value| value > 0).ok_or_else(|| {
                Error::input(format!("must be between 1 and {}, found {value}", u32::MAX)).at(key.to_string())
            })
        };
        let rows = label_counts.len() as u32;
        let batch = size("per_device_train_batch_size", config.per_device_train_batch_size)?;
        let world = size("world_size", config.world_size)?;
        let shards = Shards::new(rows, batch, world, config.dataloader_drop_last);
        if shards.per_rank() == 0 {
            return Err(
                Error::input(format!("{rows} training rows make no batch of {batch} on {world} rank(s)")).at("dataset")
            );
        }
        let geometry = Geometry {
            rows,
            batches: shards.per_rank(),
            accumulation: size("gradient_accumulation_steps", config.gradient_accumulation_steps)?,
            num_train_epochs: config.num_train_epochs,
            max_steps: config.max_steps,
        };
        refuse_straddling(&geometry, semantics.windows)?;
        let done = resumed_from.unwrap_or(0);
        let mut start = Position::after(done, &geometry, semantics.windows);
        if config.written.get("ignore_data_skip").and_then(serde_json::Value::as_bool) == Some(true) {
            start.skipped = 0;
        }
        let (parts, steps) = cut(&geometry, semantics, done, start);
        let epochs = steps.last().map_or(0, |last| last.epoch + 1 - start.epoch.min(last.epoch));
        let wrong = semantics.resume_order == ResumeOrder::EpochZero && start.skipped > 0;
        Ok(Plan {
            steps_per_epoch: geometry.steps_per_epoch(semantics.windows),
            total_steps: geometry.total_steps(semantics.windows),
            batches_per_epoch: u64::from(geometry.batches),
            label_counts,
            packs: Vec::new(),
            shards,
            parts,
            steps,
            done,
            first_epoch: start.epoch,
            orders: (0..epochs).map(|_| OnceLock::new()).collect(),
            order: OrderRule {
                shuffled: !config.disable_shuffling,
                seed: order_seed(config, semantics),
                wrong_epoch: wrong.then_some(start.epoch),
            },
            rule: semantics.windows,
            sums_ranks: config.average_tokens_across_devices,
        })
    }

    /// Steps this process performs, first to last. Empty for a resume at the end.
    pub fn steps(&self) -> RangeInclusive<u64> {
        self.done + 1..=self.done + self.steps.len() as u64
    }

    /// Everything between the optimizer steps `step - 1` and `step`.
    ///
    /// # Errors
    /// This process does not perform that step.
    pub fn window(&self, step: u64) -> Result<Window> {
        let index = step.checked_sub(self.done + 1).and_then(|index| usize::try_from(index).ok());
        let Some(planned) = index.and_then(|index| self.steps.get(index)) else {
            let (first, last) = (self.steps().start().to_owned(), self.steps().end().to_owned());
            return Err(Error::input(format!("there is no such step: this attempt runs steps {first} to {last}"))
                .at(format!("step {step}")));
        };
        let parts = &self.parts[planned.parts_begin as usize..planned.parts_end as usize];
        let mut micro_batches = Vec::new();
        for part in parts {
            self.micro_batches(part, parts, &mut micro_batches);
        }
        Ok(Window { step, epoch_index: u64::from(planned.epoch), epoch: planned.logged_epoch, micro_batches })
    }

    /// The epoch's permutation of the training rows.
    pub fn order(&self, epoch: u32) -> &[u32] {
        let draw = || {
            let rows = self.label_counts.len() as u32;
            let drawn = if self.order.wrong_epoch == Some(epoch) { 0 } else { epoch };
            if self.order.shuffled {
                randperm(self.order.seed.wrapping_add(u64::from(drawn)), rows)
            } else {
                (0..rows).collect()
            }
        };
        match epoch.checked_sub(self.first_epoch).and_then(|epoch| self.orders.get(epoch as usize)) {
            Some(order) => order.get_or_init(draw),
            None => &[],
        }
    }

    /// The examples of a training row.
    fn examples(&self, row: usize) -> Range<usize> {
        self.packs.get(row).cloned().unwrap_or(row..row + 1)
    }

    fn micro_batches(&self, part: &Part, window: &[Part], into: &mut Vec<MicroBatch>) {
        let order = self.order(part.epoch);
        let examples = |batch: u32, rank: u32| {
            self.shards.positions(batch, rank).into_iter().map(|position| order[position as usize] as usize)
        };
        let labels =
            |batch: u32, rank: u32| examples(batch, rank).map(|i| u64::from(self.label_counts[i])).sum::<u64>();
        let ranks = 0..self.shards.world();
        let per_rank: Vec<u64> = ranks
            .clone()
            .map(|rank| (part.fetch_begin..part.fetch_end).map(|batch| labels(batch, rank)).sum())
            .collect();
        let all: u64 = per_rank.iter().sum();
        // Windows across epochs belong together however they were fetched; otherwise what is not of the last
        // fetch is left over from an earlier one.
        let leaked = self.rule != WindowRule::AcrossEpochs
            && window.last().is_some_and(|last| (last.epoch, last.fetch_begin) != (part.epoch, part.fetch_begin));
        for batch in part.begin..part.end {
            for rank in ranks.clone() {
                let num_items = if self.sums_ranks { all } else { per_rank[rank as usize] };
                into.push(MicroBatch {
                    examples: examples(batch, rank).flat_map(|row| self.examples(row)).collect(),
                    rank: rank as u16,
                    opens_epoch: batch == 0,
                    fetched: Fetched { num_items, micro_batches: part.fetch_end - part.fetch_begin, leaked },
                });
            }
        }
    }
}

/// accelerate's SeedableRandomSampler: data_seed if the trainer passes it on (4.46.1 and later), else seed.
fn order_seed(config: &TrainConfig, semantics: &TrainerSemantics) -> u64 {
    match config.data_seed {
        Some(seed) if semantics.windows != WindowRule::AcrossEpochs => seed,
        _ => config.seed,
    }
}

/// 4.46 normalises by windows cut per epoch but steps every GA micro-batches across epochs (contract 3.4).
fn refuse_straddling(geometry: &Geometry, rule: WindowRule) -> Result<()> {
    let straddles = !geometry.batches.is_multiple_of(geometry.accumulation);
    if rule == WindowRule::FloorAcross && straddles && geometry.epochs(rule) > 1 {
        return Err(Error::refused(format!(
            "transformers 4.46 with {} batches per epoch and accumulation {}: its windows and its normalisers \
             disagree after the first epoch, which is not covered",
            geometry.batches, geometry.accumulation
        ))
        .at("gradient_accumulation_steps")
        .next("if the run used another version, say so with --versions transformers=…"));
    }
    Ok(())
}
