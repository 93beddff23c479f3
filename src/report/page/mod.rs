//! A diagnosis as people read it: the same content for the terminal ([`View::terminal`]) and for the HTML page
//! ([`View::html`]).
//!
//! Owns words, order and selection. Charts are in `charts`, tables in `tables`; markup in [`super::html`].

mod charts;
mod html;
mod ranges;
mod tables;
mod terminal;
mod words;

use crate::diagnosis::{Diagnosis, Spike};
use crate::replay::StepRecord;
use crate::run::LogRow;

pub use ranges::{Pass, SiteRange, map as range_map};
pub use words::{cause_title, changes_line, value_text};

/// Everything a report shows. Borrowed from the stages that made it; `ranges` and `rows` may be empty.
#[derive(Debug, Clone)]
pub struct View<'a> {
    /// The run as the user named it.
    pub name: String,
    /// Short facts under the headline, name → value (model, precision, versions, device).
    pub facts: Vec<(String, String)>,
    pub diagnosis: &'a Diagnosis,
    /// What the trainer logged, ascending steps.
    pub log: &'a [LogRow],
    /// The unchanged replay, ascending steps; empty when nothing could be replayed.
    pub baseline: &'a [StepRecord],
    pub ranges: &'a [SiteRange],
    pub rows: &'a [RowText],
}

/// The text of a blamed row, in pieces.
#[derive(Debug, Clone)]
pub struct RowText {
    /// Name in dataset_info.json.
    pub dataset: String,
    /// Counted from 0 in the file.
    pub row: u32,
    pub pieces: Vec<Piece>,
}

/// A stretch of a row's text.
#[derive(Debug, Clone)]
pub struct Piece {
    /// `user`, `assistant`, `system`; repeated pieces of one field are joined.
    pub field: String,
    pub text: String,
    /// Part of the token range that carries the spike.
    pub blamed: bool,
}

impl View<'_> {
    /// The spike the report is about: the one whose verdict is on top, else the largest.
    pub fn spike(&self) -> Option<&Spike> {
        let spikes = &self.diagnosis.spikes;
        let matching = spikes.iter().filter(|s| s.verdict == self.diagnosis.verdict);
        matching.max_by(|a, b| a.height.total_cmp(&b.height)).or(spikes.first())
    }
}
