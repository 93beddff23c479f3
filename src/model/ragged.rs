//! The rows of a window, concatenated without padding: what one pass of the model consumes.
//!
//! Owns the shift of labels, and where each micro-batch's rows and labels lie. Which rows belong to a window is
//! `batches`'.

use std::ops::Range;

use crate::batches::{Corpus, Example, IGNORE, MicroBatch, Packed};
use crate::{Error, Result};

/// Token ids and labels of one row; `labels` unshifted, [`IGNORE`] where masked, as long as `ids`.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    pub ids: &'a [u32],
    pub labels: &'a [i32],
    /// Its place in a packed row, whose parts follow each other.
    pub pack: Option<Packed>,
}

impl<'a> From<&'a Example> for Row<'a> {
    fn from(example: &'a Example) -> Self {
        Self { ids: &example.input_ids, labels: &example.labels, pack: example.pack }
    }
}

/// Positions that even MKL sums in one chain.
const SHORT: usize = 192;

/// The tokens of a [`Ragged`] among the positions of the trainer's padded micro-batches.
pub(super) struct Padding {
    /// Per token.
    pub index: Vec<u32>,
    /// Offsets of units in positions.
    pub units: Vec<usize>,
}

/// Rows of micro-batches ("units"), concatenated. n: all tokens, padding included where there is any.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ragged {
    /// [n].
    pub ids: Vec<u32>,
    /// [n], from 0 in each row (in a packed row from 0 in each part, or on and on, by version).
    pub positions: Vec<u32>,
    /// [n], place of each token in its unit's padded batch, flattened: the order in which PyTorch sums losses and draws
    /// masks.
    pub places: Vec<u32>,
    /// Offsets of rows in tokens; first 0, last n. A token attends to the earlier ones of its row: the parts of a
    /// packed row are one row, with neat_packing a row each.
    pub rows: Vec<usize>,
    /// Per row, its tokens without padding.
    pub filled: Vec<usize>,
    /// Per row, the length that the trainer pads it to; the parts of a neatly packed row keep their own.
    pub padded_rows: Vec<usize>,
    /// Offsets of units in rows.
    pub unit_rows: Vec<usize>,
    /// Tokens whose successor carries a label, ascending.
    pub labelled: Vec<u32>,
    /// The successor's label, per entry of `labelled`.
    pub targets: Vec<u32>,
    /// Offsets of units in `labelled`.
    pub unit_labels: Vec<usize>,
    /// Positions of each unit's padded batch.
    pub unit_padded: Vec<usize>,
}

impl Ragged {
    /// Concatenates the rows of micro-batches. A micro-batch may be empty.
    ///
    /// # Errors
    /// A row without tokens, with as many labels as not tokens, or with an id or label outside the vocabulary.
    pub fn build<'a>(units: impl IntoIterator<Item = impl AsRef<[Row<'a>]>>, vocab: usize) -> Result<Self> {
        let mut all = Self { rows: vec![0], unit_rows: vec![0], unit_labels: vec![0], ..Self::default() };
        for (unit, rows) in units.into_iter().enumerate() {
            all.push_unit(rows.as_ref(), vocab).map_err(|e| e.at(format!("micro-batch {unit}")))?;
        }
        Ok(all)
    }

    /// The rows of `micro_batches`, labels as in the corpus.
    ///
    /// # Errors
    /// As [`Ragged::build`].
    pub fn of(corpus: &Corpus, micro_batches: &[MicroBatch]) -> Result<Self> {
        let units =
            micro_batches.iter().map(|m| m.examples.iter().map(|&e| Row::from(&corpus.train[e])).collect::<Vec<_>>());
        // A tokenizer may know more tokens than the model; the model's own check follows in the pass.
        Self::build(units, corpus.vocab_size)
    }

    fn push_unit(&mut self, rows: &[Row<'_>], vocab: usize) -> Result<()> {
        // DataCollatorForSeq2Seq pads to the longest row, rounded up to a multiple of 8 (contract 2.6).
        let length = |r: &Row<'_>| r.pack.map_or(r.ids.len(), |pack| pack.length);
        let padded = rows.iter().map(length).max().unwrap_or(0).next_multiple_of(8);
        let mut lines = 0;
        for (index, row) in rows.iter().enumerate() {
            check(row, vocab).map_err(|e| e.at(format!("row {index}")))?;
            let start = self.ids.len();
            let offset = row.pack.map_or(0, |pack| pack.offset);
            lines += usize::from(offset == 0);
            // The first token of a line is predicted by nothing; that of a later part by the part before it.
            for (position, &label) in row.labels.iter().enumerate().skip(usize::from(offset == 0)) {
                if label != IGNORE {
                    self.labelled.push((start + position - 1) as u32);
                    self.targets.push(label as u32);
                }
            }
            self.ids.extend_from_slice(row.ids);
            let place = (lines - 1) * padded + offset;
            self.places.extend((place..place + row.ids.len()).map(|place| place as u32));
            let first = if row.pack.is_some_and(|pack| !pack.restarts) { offset } else { 0 };
            self.positions.extend((first..first + row.ids.len()).map(|position| position as u32));
            if offset > 0 && row.pack.is_some_and(|pack| !pack.separate) {
                self.rows.pop();
                self.padded_rows.pop();
                self.filled.pop();
            }
            self.filled.push(self.ids.len() - self.rows.last().copied().unwrap_or(0));
            let alone = row.pack.is_some_and(|pack| pack.separate);
            self.padded_rows.push(if alone { row.ids.len() } else { padded });
            self.rows.push(self.ids.len());
        }
        self.unit_padded.push(lines * padded);
        self.unit_rows.push(self.rows.len() - 1);
        self.unit_labels.push(self.labelled.len());
        Ok(())
    }

    /// The same rows, each extended with `pad` to the length that the trainer pads it to. No token sees the pads
    /// behind it, and they carry no label.
    pub fn with_padding(&self, pad: u32) -> Self {
        let mut all = Self {
            rows: vec![0],
            ids: Vec::new(),
            positions: Vec::new(),
            places: Vec::new(),
            labelled: Vec::new(),
            ..self.clone()
        };
        let mut labelled = self.labelled.iter().peekable();
        for (row, &length) in self.rows.windows(2).zip(&self.padded_rows) {
            let start = all.ids.len();
            while let Some(&token) = labelled.next_if(|&&token| (token as usize) < row[1]) {
                all.labelled.push((token as usize - row[0] + start) as u32);
            }
            all.ids.extend_from_slice(&self.ids[row[0]..row[1]]);
            all.ids.resize(all.ids.len().max(start + length), pad);
            all.positions.extend_from_slice(&self.positions[row[0]..row[1]]);
            all.places.extend_from_slice(&self.places[row[0]..row[1]]);
            for counted in [&mut all.positions, &mut all.places] {
                let next = counted.last().map_or(0, |&last| last + 1);
                counted.extend((next..).take(all.ids.len() - counted.len()));
            }
            all.rows.push(all.ids.len());
        }
        all
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
    /// Tokens of a micro-batch without padding.
    pub fn filled_tokens(&self, unit: usize) -> usize {
        self.filled[self.unit_rows[unit]..self.unit_rows[unit + 1]].iter().sum()
    }
    /// Number of micro-batches.
    pub fn units(&self) -> usize {
        self.unit_rows.len().saturating_sub(1)
    }
    /// One more than the highest position.
    pub fn positions_end(&self) -> usize {
        self.positions.iter().max().map_or(0, |&last| last as usize + 1)
    }
    /// Offsets of units in tokens.
    pub fn unit_tokens(&self) -> Vec<usize> {
        self.unit_rows.iter().map(|&row| self.rows[row]).collect()
    }

    /// Per row, whether the trainer pads no row of its micro-batch nor masks a part of it (transformers then gives
    /// attention no mask: masking_utils.py `_ignore_causal_mask_sdpa`).
    pub(super) fn unpadded_rows(&self) -> Vec<bool> {
        let of_unit = |unit: usize| {
            let rows = self.unit_rows[unit]..self.unit_rows[unit + 1];
            let line = self.unit_padded[unit] / rows.len().max(1);
            std::iter::repeat_n(self.filled[rows.clone()].iter().all(|&filled| filled == line), rows.len())
        };
        (0..self.units()).flat_map(of_unit).collect()
    }

    /// Where the tokens lie in the trainer's padded batches, if the order of a sum over them shows it.
    pub(super) fn padding(&self) -> Option<Padding> {
        let tokens = self.unit_tokens();
        let matters = (0..self.units()).any(|unit| {
            let several = self.unit_rows[unit + 1] - self.unit_rows[unit] > 1;
            self.unit_padded[unit] != tokens[unit + 1] - tokens[unit] && (several || self.unit_padded[unit] > SHORT)
        });
        let mut padding = Padding { index: Vec::with_capacity(self.tokens()), units: vec![0] };
        for (unit, tokens) in tokens.windows(2).enumerate() {
            let first = padding.units[unit];
            padding.index.extend(self.places[tokens[0]..tokens[1]].iter().map(|place| first as u32 + place));
            padding.units.push(first + self.unit_padded[unit]);
        }
        matters.then_some(padding)
    }

    /// The units `range` alone.
    pub(super) fn slice(&self, range: Range<usize>) -> Self {
        let rows = self.unit_rows[range.start]..self.unit_rows[range.end];
        let tokens = self.rows[rows.start]..self.rows[rows.end];
        let labels = self.unit_labels[range.start]..self.unit_labels[range.end];
        let from = |values: &[usize], first: usize| values.iter().map(|v| v - first).collect();
        Self {
            ids: self.ids[tokens.clone()].to_vec(),
            positions: self.positions[tokens.clone()].to_vec(),
            places: self.places[tokens.clone()].to_vec(),
            rows: from(&self.rows[rows.start..=rows.end], tokens.start),
            filled: self.filled[rows.clone()].to_vec(),
            padded_rows: self.padded_rows[rows.clone()].to_vec(),
            unit_rows: from(&self.unit_rows[range.start..=range.end], rows.start),
            labelled: self.labelled[labels.clone()].iter().map(|&t| t - tokens.start as u32).collect(),
            targets: self.targets[labels.clone()].to_vec(),
            unit_labels: from(&self.unit_labels[range.start..=range.end], labels.start),
            unit_padded: self.unit_padded[range].to_vec(),
        }
    }

    /// Consecutive ranges of units of at most `tokens` tokens each, a larger unit alone in its range.
    pub(super) fn chunks(&self, tokens: usize) -> Vec<Range<usize>> {
        let offsets = self.unit_tokens();
        let mut chunks = Vec::new();
        let mut start = 0;
        for unit in 1..=self.units() {
            if unit == self.units() || offsets[unit + 1] - offsets[start] > tokens {
                chunks.push(start..unit);
                start = unit;
            }
        }
        chunks
    }
}

fn check(row: &Row<'_>, vocab: usize) -> Result<()> {
    if row.ids.is_empty() {
        return Err(Error::input("no tokens"));
    }
    if row.ids.len() != row.labels.len() {
        return Err(Error::internal(format!("{} tokens but {} labels", row.ids.len(), row.labels.len())));
    }
    let outside = |id: i64| !(0..vocab as i64).contains(&id);
    let labels = row.labels.iter().filter(|&&l| l != IGNORE).map(|&l| i64::from(l));
    match row.ids.iter().map(|&id| i64::from(id)).chain(labels).find(|&id| outside(id)) {
        None => Ok(()),
        Some(id) => Err(Error::input(format!("token id {id} is outside the model's vocabulary of {vocab}"))
            .next("use the tokenizer that belongs to the base model")),
    }
}

/// Σ of the losses of one unit as torch's nll_loss sums them on a CPU (LossNLL.cpp: eight cascaded f32 partial
/// sums over the padded, flattened batch). Each of `losses` comes with its place among the `batch` positions.
pub(super) fn cascade_sum(losses: impl Iterator<Item = (f32, u32)>, batch: usize) -> f32 {
    const LEVELS: usize = 8;
    let ceil_log2 = usize::BITS - batch.max(1).saturating_sub(1).leading_zeros();
    let power = (ceil_log2 as usize / LEVELS).max(4);
    let mask = (1usize << power) - 1;
    let mut partial = [0f32; LEVELS];
    for (loss, place) in losses {
        partial[0] += loss;
        for level in 0..LEVELS - 1 {
            if place as usize & (mask << (level * power)) != 0 {
                break;
            }
            partial[level + 1] += std::mem::take(&mut partial[level]);
        }
    }
    partial.iter().sum()
}
