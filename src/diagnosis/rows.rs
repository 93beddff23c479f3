//! Which micro-batches of a window stand out, and which rows of them.
//!
//! A bad row is one whose loss is far above that of the rows beside it, in the same state of the model; in a
//! damaged state all of them are high.

use crate::batches::RowId;
use crate::replay::StepRecord;

/// A micro-batch that stands out of its surroundings.
#[derive(Debug, Clone, PartialEq)]
pub struct Suspect {
    pub step: u64,
    pub micro_batch: usize,
    pub rows: Vec<RowId>,
    /// ln of its mean loss over the median of the micro-batches around it.
    pub excess: f64,
    /// Its mean loss.
    pub loss: f64,
    /// Positions in a single row's tokens that carry its loss, once they are known.
    pub tokens: Option<std::ops::Range<usize>>,
}

/// A suspect's mean loss is at least this factor above its surroundings …
const MIN_EXCESS: f64 = 2.0;
/// … and in ln this factor above what micro-batches usually differ by.
const BEYOND: f64 = 1.5;
/// Steps on either side whose micro-batches are the surroundings, when a window alone has too few.
const AROUND: u64 = 3;
/// Micro-batches that make a median.
const ENOUGH: usize = 4;

/// Micro-batches of steps `from..=to` of `steps` whose mean loss stands out, highest excess first.
pub fn suspects(steps: &[StepRecord], from: u64, to: u64) -> Vec<Suspect> {
    let usual = usual(steps, from, to);
    let mut found = Vec::new();
    for (index, record) in steps.iter().enumerate().filter(|(_, r)| (from..=to).contains(&r.step)) {
        for (micro_batch, micro) in record.micro_batches.iter().enumerate() {
            let Some(excess) = excess(steps, index, micro_batch) else { continue };
            if excess >= MIN_EXCESS.ln().max(BEYOND * usual) {
                let (rows, loss) = (micro.rows.clone(), micro.mean_loss);
                found.push(Suspect { step: record.step, micro_batch, rows, excess, loss, tokens: None });
            }
        }
    }
    found.sort_by(|a, b| b.excess.total_cmp(&a.excess));
    found
}

/// Rows of `suspects`, each once, in the order of the dataset.
pub fn rows_of(suspects: &[Suspect]) -> Vec<RowId> {
    let mut rows: Vec<RowId> = suspects.iter().flat_map(|s| s.rows.iter().copied()).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// ln(mean loss / median of the others): of the same window when it has enough, else also of the steps around.
/// `None` for a micro-batch without labels or with nothing to compare.
fn excess(steps: &[StepRecord], index: usize, micro_batch: usize) -> Option<f64> {
    let record = &steps[index];
    let own = record.micro_batches[micro_batch].mean_loss;
    if !own.is_finite() || own <= 0.0 {
        return None;
    }
    let usable = |loss: f64| loss.is_finite() && loss > 0.0;
    let beside = record.micro_batches.iter().enumerate().filter(|(i, _)| *i != micro_batch);
    let mut others: Vec<f64> = beside.map(|(_, m)| m.mean_loss).filter(|l| usable(*l)).collect();
    if others.len() < ENOUGH {
        let near = steps.iter().filter(|r| r.step != record.step && r.step.abs_diff(record.step) <= AROUND);
        others.extend(near.flat_map(|r| &r.micro_batches).map(|m| m.mean_loss).filter(|l| usable(*l)));
    }
    others.sort_by(f64::total_cmp);
    let median = *others.get(others.len() / 2)?;
    Some((own / median).ln())
}

/// What micro-batches outside `from..=to` differ from their surroundings by, at the 95th percentile: templates and
/// sources of different difficulty. Of all micro-batches when those outside are too few.
fn usual(steps: &[StepRecord], from: u64, to: u64) -> f64 {
    let excesses = |outside: bool| -> Vec<f64> {
        (0..steps.len())
            .filter(|&i| !outside || !(from..=to).contains(&steps[i].step))
            .flat_map(|i| (0..steps[i].micro_batches.len()).map(move |m| (i, m)))
            .filter_map(|(i, m)| excess(steps, i, m))
            .map(f64::abs)
            .collect()
    };
    let mut all = excesses(true);
    if all.len() < ENOUGH {
        all = excesses(false);
    }
    all.sort_by(f64::total_cmp);
    // One outlier of twenty is not yet usual.
    all.get((all.len() * 19 / 20).saturating_sub(1)).copied().unwrap_or(0.0)
}
