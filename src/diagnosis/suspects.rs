//! Which rows a spike can be blamed on: micro-batches that stand out in its windows and in an earlier, sound state.

use super::height::{self, Point};
use super::investigate::{Bench, EARLY};
use super::laboratory::step_of;
use super::rows::{self, Suspect};
use super::{RowBlame, SpikeKind};
use crate::Result;
use crate::replay::{Intervention, StepRecord};

/// Halvings of a guilty row's tokens, …
const HALVINGS: usize = 4;
/// … down to so many, …
const FEWEST: usize = 4;
/// … as long as so many windows are left for the trials.
const RESERVED: u64 = 30;
/// Steps ahead of the spike's windows whose micro-batches show what is usual.
const SURROUNDINGS: u64 = 4;

impl Bench<'_, '_> {
    /// Micro-batches that stand out in the spike's windows and also in an earlier, sound state.
    pub(super) fn suspects(&mut self) -> Result<Vec<Suspect>> {
        // To the last step at which trials are measured: a bad row in any of these windows keeps the height up.
        let from = self.onset.saturating_sub(EARLY).max(1);
        let to = self.to.max(self.found.step);
        let ahead =
            if rows::high(&self.out.baseline, from, to).next().is_some() { self.ahead(from)? } else { Vec::new() };
        let steps: Vec<StepRecord> = ahead.iter().chain(&self.out.baseline).cloned().collect();
        let mut suspects = rows::suspects(&steps, from, to);
        suspects.truncate(6);
        let mut confirmed = Vec::new();
        for suspect in suspects {
            if self.budget.allows(1) && self.bad_in_another_state(&suspect, &ahead)? {
                let alone = self.without_bystanders(suspect)?;
                confirmed.push(self.token_range(alone)?);
            }
        }
        Ok(confirmed)
    }

    /// Windows from before the replayed steps, in the state of the start point, where too few steps lie between it and
    /// the spike to say what micro-batches usually differ by: bad rows of the spike's own windows would say it.
    fn ahead(&mut self, from: u64) -> Result<Vec<StepRecord>> {
        let first = step_of(&self.near) + 1;
        let missing = SURROUNDINGS.saturating_sub(from.saturating_sub(first)).min(first - 1);
        let mut all = Vec::new();
        for with in first - missing..first {
            if !self.budget.allows(1) {
                break;
            }
            let trace = self.lab.replay(&self.near, first, &[Intervention::SwapWindow { step: first, with }])?;
            self.budget.used += 1;
            all.extend(trace.steps.into_iter().map(|record| StepRecord { step: with, ..record }));
        }
        Ok(all)
    }

    /// The 2 × 2 of state and window: the suspect's window run in the state before an earlier step.
    fn bad_in_another_state(&mut self, suspect: &Suspect, ahead: &[StepRecord]) -> Result<bool> {
        let Some(earlier) = earlier_state(step_of(&self.near) + 1, self.found.step.min(suspect.step)) else {
            // Nothing before it to run it in: another epoch's appearance in the log cannot be separated from damage.
            return Ok(false);
        };
        let change = [Intervention::SwapWindow { step: earlier, with: suspect.step }];
        let trace = self.lab.replay(&self.near, earlier, &change)?;
        self.budget.used += 1;
        let swapped: Vec<StepRecord> = trace.steps.into_iter().filter(|r| r.step == earlier).collect();
        let others = self.out.baseline.iter().filter(|r| r.step < self.found.step && r.step != earlier).cloned();
        let mut steps: Vec<StepRecord> = ahead.iter().cloned().chain(others).chain(swapped).collect();
        steps.sort_by_key(|r| r.step);
        Ok(rows::suspects(&steps, earlier, earlier).iter().any(|s| s.micro_batch == suspect.micro_batch))
    }

    /// The suspect is the only row of its window and no worse than what the run started from: a row of a kind that has
    /// hardly been seen yet, not a bad one.
    pub(super) fn hard_window(&self, suspect: &Suspect) -> bool {
        let record = self.out.baseline.iter().find(|r| r.step == suspect.step);
        let alone = record.is_some_and(|r| r.micro_batches.len() == 1 && r.micro_batches[0].rows.len() == 1);
        alone && self.subject.points.first().is_some_and(|first| suspect.loss < first.loss)
    }

    /// Of a micro-batch with several rows, those that stand out alone.
    fn without_bystanders(&mut self, suspect: Suspect) -> Result<Suspect> {
        if suspect.rows.len() < 2 || !self.budget.allows(suspect.rows.len() as u64) {
            return Ok(suspect);
        }
        let mut guilty = Vec::new();
        for &row in &suspect.rows {
            let others: Vec<_> = suspect.rows.iter().copied().filter(|r| *r != row).collect();
            let trace = self.lab.replay(&self.near, suspect.step, &[Intervention::NeutraliseRows(others)])?;
            self.budget.used += 1;
            // Half of what both together are above the others: how much others differ was asked before.
            let guilty_alone = |s: &Suspect| s.micro_batch == suspect.micro_batch && 2.0 * s.excess >= suspect.excess;
            if rows::high(&trace.steps, suspect.step, suspect.step).any(|s| guilty_alone(&s)) {
                guilty.push(row);
            }
        }
        let rows = if guilty.is_empty() { suspect.rows.clone() } else { guilty };
        Ok(Suspect { rows, ..suspect })
    }

    /// Of a single row, the tokens that carry its loss: halves whose labels are masked in turn, until neither half
    /// alone explains it. Masking labels leaves the forward pass as it is, so what a half loses the other keeps.
    fn token_range(&mut self, suspect: Suspect) -> Result<Suspect> {
        let [row] = suspect.rows[..] else { return Ok(suspect) };
        let record = self.out.baseline.iter().find(|r| r.step == suspect.step);
        if record.is_none_or(|r| r.micro_batches[suspect.micro_batch].rows.len() != 1) {
            return Ok(suspect);
        }
        let labelled = self.subject.labelled(row);
        let usual = suspect.loss / suspect.excess.exp();
        let mut range = 0..labelled.len();
        let mut inside = suspect.loss * labelled.len() as f64;
        for _ in 0..HALVINGS {
            if range.len() < 2 * FEWEST || !self.budget.allows(RESERVED) {
                break;
            }
            let middle = range.start + range.len() / 2;
            // Everything masked but the first half of the range.
            let masked = |from: usize, to: usize| {
                let tokens = labelled[from]..labelled[to - 1] + 1;
                (from < to).then_some(Intervention::NeutraliseTokens { row, tokens })
            };
            let mut changes = vec![Intervention::NeutraliseTokens { row, tokens: labelled[middle]..usize::MAX }];
            if range.start > 0 {
                changes.extend(masked(0, range.start));
            }
            let trace = self.lab.replay(&self.near, suspect.step, &changes)?;
            self.budget.used += 1;
            let record = trace.steps.iter().find(|r| r.step == suspect.step);
            let micro = record.and_then(|r| r.micro_batches.get(suspect.micro_batch));
            let Some(first) = micro.map(|m| m.mean_loss * m.label_tokens as f64).filter(|l| l.is_finite()) else {
                break;
            };
            let second = inside - first;
            let count = |range: std::ops::Range<usize>| range.len() as f64;
            let high = |sum: f64, tokens: f64| sum / tokens > 2.0 * usual;
            let (first_high, second_high) =
                (high(first, count(range.start..middle)), high(second, count(middle..range.end)));
            match (first_high, second_high) {
                (true, false) => (range, inside) = (range.start..middle, first),
                (false, true) => (range, inside) = (middle..range.end, second),
                _ => break,
            }
        }
        let tokens = labelled.get(range.start).zip(labelled.get(range.end.saturating_sub(1))).map(|(a, b)| *a..*b + 1);
        Ok(Suspect { tokens, ..suspect })
    }

    /// The spike's own window in the state before an earlier step: as high there?
    pub(super) fn always_high(&mut self) -> Result<bool> {
        let rises = matches!(self.found.kind, SpikeKind::Jump | SpikeKind::Divergence);
        let earlier = self.found.step.saturating_sub(2);
        if !rises || earlier <= step_of(&self.near) || !self.budget.allows(1) {
            return Ok(false);
        }
        let change = [Intervention::SwapWindow { step: earlier, with: self.found.step }];
        let trace = self.lab.replay(&self.near, earlier, &change)?;
        self.budget.used += 1;
        let Some(record) = trace.steps.last().filter(|r| r.step == earlier) else { return Ok(false) };
        let history = self.history();
        let height = height::of(self.found.kind, &[Point::replayed(record)], &history, earlier..=earlier);
        Ok(height >= 0.7 * self.out.evidence.reference_height())
    }

    pub(super) fn blame(&mut self, suspects: &[Suspect]) {
        let subject = self.subject;
        let blame = |row, micro_batch, step, reason| RowBlame {
            dataset: subject.dataset_name(row),
            row: row.row,
            micro_batch,
            step,
            tokens: None,
            reason,
        };
        let mut all: Vec<RowBlame> = Vec::new();
        // A row that stands out in several windows is shown in that of the spike.
        let mut suspects: Vec<&Suspect> = suspects.iter().collect();
        suspects.sort_by_key(|s| s.step.abs_diff(self.found.step));
        for suspect in suspects {
            let reason = format!("its loss is {:.1} times that of the rows around it", suspect.excess.exp());
            all.extend(suspect.rows.iter().map(|&row| RowBlame {
                tokens: suspect.tokens.clone().map(|t| (t.start, t.end)),
                ..blame(row, suspect.micro_batch, suspect.step, reason.clone())
            }));
        }
        if self.out.evidence.window_without_labels
            && let Some(record) = self.out.baseline.iter().find(|r| r.step == self.found.step)
        {
            for (index, micro) in record.micro_batches.iter().enumerate() {
                let reason = || "all of its labels are masked".to_string();
                all.extend(micro.rows.iter().map(|&row| blame(row, index, record.step, reason())));
            }
        }
        let all = each_once(all);
        self.out.evidence.rows = all;
    }
}

/// The step before `step`, from `first` on, in whose state its rows are tried again: two before it, since the update
/// just ahead may be what damaged them; one where a checkpoint leaves no other, whose own window was still sound.
fn earlier_state(first: u64, step: u64) -> Option<u64> {
    [2, 1].into_iter().filter_map(|back| step.checked_sub(back)).find(|&earlier| earlier >= first)
}

/// Of the blames of a row the first.
pub(super) fn each_once(all: Vec<RowBlame>) -> Vec<RowBlame> {
    let mut kept: Vec<RowBlame> = Vec::new();
    for blame in all {
        if !kept.iter().any(|k| k.dataset == blame.dataset && k.row == blame.row) {
            kept.push(blame);
        }
    }
    kept.sort();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_tried_in_the_state_two_steps_before_or_in_the_only_one_there_is() {
        assert_eq!(earlier_state(17, 26), Some(24));
        assert_eq!(earlier_state(25, 27), Some(25));
        assert_eq!(earlier_state(25, 26), Some(25), "a checkpoint two steps ahead of the spike");
        assert_eq!(earlier_state(26, 26), None);
        assert_eq!(earlier_state(1, 1), None);
    }
}
