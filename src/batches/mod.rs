//! Dataset rows → tokens → sample order → windows of micro-batches, exactly as the trainer cut them.

mod align;
mod corpus;
mod encode;
mod pack;
mod plan;
mod random;
mod rows;
mod shard;
mod source;
mod split;
mod template;
mod tokenizer;
mod windows;
mod words;

use std::ops::Range;
use std::path::PathBuf;

pub use align::{Aligned, Conversation, align};
pub(crate) use corpus::llamafactory_version;
pub use encode::{Element, Encoding, Turn, infer_seqlen};
pub use pack::{Packed, greedy_knapsack};
pub use plan::Plan;
pub use random::{Mt19937, numpy_permutation, randperm};
pub use rows::{Row, Seen, parse as parse_rows};
pub use shard::Shards;
pub use source::{Columns, Formatting};
pub use split::split;
pub use template::{NAMES, Slot, Template, template};
pub use tokenizer::Tokenizer;

/// Label of a position that carries no loss (PyTorch's ignore_index).
pub const IGNORE: i32 = -100;

/// One row of a dataset file: `dataset` indexes [`Corpus::datasets`], `row` counts from 0 in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowId {
    pub dataset: u16,
    pub row: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// Name in dataset_info.json.
    pub name: String,
    pub files: Vec<PathBuf>,
}

/// What a span of tokens was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Template,
    System,
    /// Text of user turn `t`.
    User(u16),
    /// Text of assistant turn `t`.
    Assistant(u16),
}

/// One tokenized row. `input_ids.len() == labels.len()`; labels are unshifted, [`IGNORE`] where masked.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    pub row: RowId,
    pub input_ids: Vec<u32>,
    pub labels: Vec<i32>,
    /// Token ranges and what they came from, ascending, covering all tokens.
    pub spans: Vec<(Range<usize>, Field)>,
    /// Where it lies in a packed row; `None`: it is a row of its own.
    pub pack: Option<Packed>,
}

impl Example {
    /// Labels that are predicted: those with a token before them (c_i of the contract, summed over rows).
    pub fn label_tokens(&self) -> usize {
        let begins_row = self.pack.is_none_or(|pack| pack.offset == 0);
        self.labels.iter().skip(usize::from(begins_row)).filter(|&&l| l != IGNORE).count()
    }
    /// Labels over all positions, position 0 included (what N counts, contract 5.1).
    pub fn unshifted_label_tokens(&self) -> usize {
        self.labels.iter().filter(|&&l| l != IGNORE).count()
    }
}

/// Every training and evaluation row, tokenized, in the order the sampler's permutation indexes.
#[derive(Debug, Clone)]
pub struct Corpus {
    pub datasets: Vec<Dataset>,
    pub train: Vec<Example>,
    /// The ranges of `train` that share a packed row, which is then what the sampler permutes; empty: nothing is packed.
    pub packs: Vec<Range<usize>>,
    /// Evaluation rows by set name (`""` for a split or a merged set).
    pub eval: Vec<(String, Vec<Example>)>,
    /// Rows dropped at tokenization, with the reason.
    pub dropped: Vec<(RowId, String)>,
    pub vocab_size: usize,
    pub pad_token_id: u32,
    /// Where the rows lie, for [`Corpus::row_text`]; index as in `datasets`.
    sources: Vec<source::Source>,
}

/// One forward/backward of the trainer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    /// Indices into [`Corpus::train`], in batch order; those of a packed row side by side.
    pub examples: Vec<usize>,
    /// Data-parallel rank that ran it.
    pub rank: u16,
    /// The data loader of its process begins an epoch with it.
    pub opens_epoch: bool,
    /// Window in which the trainer fetched it: its N and micro-batch count normalise this micro-batch's loss.
    pub fetched: Fetched,
}

/// Normaliser of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// N: labels ≠ −100 of the window it was fetched with (per rank or over all ranks, by semantics).
    pub num_items: u64,
    /// Micro-batches fetched together (k).
    pub micro_batches: u32,
    /// True when it was left over from the previous window and leaked into this one (contract 3.4, 15.1).
    pub leaked: bool,
}

/// Everything between two optimizer steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// Global optimizer step this window produces, from 1.
    pub step: u64,
    /// 0-based epoch the window belongs to.
    pub epoch_index: u64,
    /// Epoch value the trainer logs after it.
    pub epoch: f64,
    /// In the order they ran (leaked ones first; ranks of one accumulation index side by side).
    pub micro_batches: Vec<MicroBatch>,
}
