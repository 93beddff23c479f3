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
/// … and in ln this factor above what micro-batches usually differ by, …
const BEYOND: f64 = 2.0;
/// … which all but this share of them do: three wrong rows in a hundred are twelve micro-batches of four.
const UNUSUAL: f64 = 0.15;
/// Steps on either side whose micro-batches are the surroundings, when a window alone has too few.
const AROUND: u64 = 3;
/// Micro-batches that make a median.
const ENOUGH: usize = 4;

/// Micro-batches of steps `from..=to` of `steps` whose mean loss stands out, highest excess first.
pub fn suspects(steps: &[StepRecord], from: u64, to: u64) -> Vec<Suspect> {
    let least = BEYOND * usual(steps, from, to);
    let mut found: Vec<Suspect> = high(steps, from, to).filter(|s| s.excess >= least).collect();
    found.sort_by(|a, b| b.excess.total_cmp(&a.excess));
    found
}

/// Those that are far above their surroundings, usual or not.
pub fn high(steps: &[StepRecord], from: u64, to: u64) -> impl Iterator<Item = Suspect> {
    let within = steps.iter().enumerate().filter(move |(_, r)| (from..=to).contains(&r.step));
    within.flat_map(move |(index, record)| {
        record.micro_batches.iter().enumerate().filter_map(move |(micro_batch, micro)| {
            let excess = excess(steps, index, micro_batch).filter(|e| *e >= MIN_EXCESS.ln())?;
            let (rows, loss) = (micro.rows.clone(), micro.mean_loss);
            Some(Suspect { step: record.step, micro_batch, rows, excess, loss, tokens: None })
        })
    })
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

/// What micro-batches outside `from..=to` differ from their surroundings by, but for the [`UNUSUAL`]: templates and
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
    let usual = (all.len() as f64 * (1.0 - UNUSUAL)) as usize;
    all.get(usual.saturating_sub(1)).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::MicroRecord;

    /// Steps of four micro-batches whose losses are one per cent apart, but for the `bad` (step, micro-batch).
    fn steps(first: u64, last: u64, bad: &[(u64, usize)]) -> Vec<StepRecord> {
        let micro = |step: u64, index: usize| MicroRecord {
            rows: vec![RowId { dataset: 0, row: 4 * step as u32 + index as u32 }],
            tokens: 12,
            label_tokens: 5,
            loss: 0.0,
            mean_loss: if bad.contains(&(step, index)) { 2.0 } else { 0.06 + 6e-4 * index as f64 },
            grad_norm: 1.0,
            nonfinite: 0,
            leaked: false,
        };
        let step = |step: u64| StepRecord {
            step,
            attempt: 0,
            epoch: 0.5,
            learning_rate: 1e-3,
            learning_rate_logged: 1e-3,
            loss: 0.06,
            loss_raw: 0.06,
            loss_logged: None,
            grad_norm: 1.0,
            clip_coefficient: 1.0,
            update_norm: 1.0,
            loss_scale: None,
            skipped: false,
            nonfinite: 0,
            micro_batches: (0..4).map(|index| micro(step, index)).collect(),
        };
        (first..=last).map(step).collect()
    }

    fn places(found: &[Suspect]) -> Vec<(u64, usize)> {
        found.iter().map(|s| (s.step, s.micro_batch)).collect()
    }

    #[test]
    fn bad_rows_that_come_again_do_not_make_each_other_usual() {
        let eighth = [(1, 0), (3, 2), (6, 1), (8, 3), (9, 0)];
        assert_eq!(places(&suspects(&steps(1, 9, &eighth), 9, 9)), [(9, 0)]);
        let quarter = [(1, 0), (2, 1), (3, 2), (4, 0), (5, 1), (6, 1), (7, 2), (8, 3), (9, 0)];
        assert!(suspects(&steps(1, 9, &quarter), 9, 9).is_empty(), "rows of two kinds");
    }

    #[test]
    fn two_bad_micro_batches_of_four_need_windows_around_to_stand_out() {
        let bad = [(26, 0), (26, 3)];
        let near = steps(26, 26, &bad);
        assert!(suspects(&near, 26, 26).is_empty() && high(&near, 26, 26).next().is_some());
        assert_eq!(places(&suspects(&steps(22, 26, &bad), 26, 26)), [(26, 0), (26, 3)]);
    }
}
