//! Bookkeeping of the trainer that looks like instability: leaked windows, undivided losses, an early end
//! (contract 3.4, 5.1, 15).

use super::{Code, Finding, Severity, ranges};
use crate::run::{LogRow, LossRule, Run, WindowRule};

/// A step whose window held micro-batches that were left over from the epoch before.
#[derive(Debug, Clone, PartialEq)]
pub struct Leak {
    pub step: u64,
    /// Micro-batches by which the epoch value advanced too far: the epoch's unclosed rest.
    pub left: u64,
    /// Loss over the mean of its two neighbours.
    pub ratio: Option<f64>,
    pub source: String,
}

/// Leaked windows, read off the log's own epoch column: where a step crosses an epoch boundary and advances by more
/// than one window, the epoch's last window never closed, and its loss and gradient are in that step.
///
/// `rows` of one attempt, one row per step (`window` 1); `accumulation`: gradient_accumulation_steps.
pub fn leaks(rows: &[LogRow], accumulation: usize) -> Vec<Leak> {
    let Some(batches) = batches_per_epoch(rows, accumulation) else { return Vec::new() };
    let mut found = Vec::new();
    for (i, pair) in rows.windows(2).enumerate() {
        let (Some(before), Some(at)) = (pair[0].epoch, pair[1].epoch) else { continue };
        let one_process = pair[0].attempt == pair[1].attempt && pair[1].window == 1;
        let extra = (at - before) * batches - accumulation as f64;
        // A boundary that was itself logged (epoch 1.0) closed its window.
        if !one_process || at.floor() <= before.floor() || before.fract() == 0.0 || extra < 0.5 {
            continue;
        }
        let next = rows.get(i + 2).and_then(|r| r.loss);
        let neighbours = [pair[0].loss, next].into_iter().flatten().filter(|l| l.is_finite() && *l > 0.0);
        let (sum, count) = neighbours.fold((0.0, 0), |(s, c), l| (s + l, c + 1));
        let ratio = (count > 0).then(|| pair[1].loss.map(|l| l / (sum / f64::from(count)))).flatten();
        found.push(Leak { step: pair[1].step, left: extra.round() as u64, ratio, source: pair[1].source.clone() });
    }
    found
}

/// Batches of an epoch from the first epoch value below 1: epoch = micro-batches done / batches.
pub fn batches_per_epoch(rows: &[LogRow], accumulation: usize) -> Option<f64> {
    let first = rows.iter().find(|r| r.epoch.is_some_and(|e| e > 0.0 && e < 1.0))?;
    let batches = (first.step as f64 * accumulation as f64 / first.epoch?).round();
    (batches.is_finite() && batches >= 1.0).then_some(batches)
}

pub fn findings(run: &Run) -> Vec<Finding> {
    let mut found = Vec::new();
    found.extend(leak(run));
    found.extend(undivided(run));
    found.extend(early_end(run));
    found
}

fn leak(run: &Run) -> Option<Finding> {
    let leaks = leaks(&run.log.rows, run.config.gradient_accumulation_steps);
    let first = leaks.first()?;
    let steps: Vec<u64> = leaks.iter().map(|l| l.step).collect();
    let worst = leaks.iter().filter_map(|l| l.ratio).fold(0.0, f64::max);
    let odd = if run.semantics.windows == WindowRule::FloorLeak {
        ""
    } else {
        " (only transformers 4.47–4.51 leak: the version assumed for this run is wrong)"
    };
    Some(Finding::new(
        Code::EpochBoundaryLeak,
        Severity::Error,
        first.source.clone(),
        format!(
            "the epoch's last {} micro-batch(es) never closed their window and leaked into the first step of the next \
             epoch (step {}): its loss and gradient are the sum of two windows, up to ×{worst:.2} of its neighbours here, \
             and no sign of instability{odd}; transformers ≥ 4.52 repairs it, or make the number of batches a multiple \
             of gradient_accumulation_steps",
            first.left,
            ranges(&steps)
        ),
    ))
}

/// Losses that were not divided by the accumulation: known by version and model, or too high to be a cross-entropy.
fn undivided(run: &Run) -> Option<Finding> {
    let accumulation = run.config.gradient_accumulation_steps;
    if accumulation < 2 {
        return None;
    }
    let first = run.log.rows.first()?;
    let loss = first.loss.filter(|l| l.is_finite())?;
    if run.semantics.loss == LossRule::MeanUndivided {
        let model = run.model_type.as_deref().unwrap_or("this model");
        return Some(Finding::new(
            Code::LossTimesAccumulation,
            Severity::Error,
            first.source.clone(),
            format!(
                "transformers 4.46.2–4.47 does not divide the loss of {model} by gradient_accumulation_steps \
                 ({accumulation}): the loss {loss} means {:.4}, and the gradient is {accumulation} times too big, so \
                 that clipping does all the scaling; transformers ≥ 4.48 repairs it",
                loss / accumulation as f64
            ),
        ));
    }
    // A fresh adapter starts at the base model's loss: even uniform guessing costs no more than ln(vocabulary).
    let guess = (run.vocab_size? as f64).ln();
    let fresh = run.attempts.first().is_some_and(|a| a.resumed_from.is_none()) && first.step == first.window;
    (fresh && loss > 1.5 * guess && loss / accumulation as f64 <= guess).then(|| {
        Finding::new(
            Code::LossTimesAccumulation,
            Severity::Error,
            first.source.clone(),
            format!(
                "the first loss, {loss}, is above what uniform guessing costs ({guess:.2}); divided by \
                 gradient_accumulation_steps ({accumulation}) it is {:.3}: the trainer summed micro-batch means instead \
                 of averaging them, which happens where a model's forward takes **kwargs but ignores \
                 num_items_in_batch (vision-language models on transformers 4.48–4.54 among them)",
                loss / accumulation as f64
            ),
        )
    })
}

/// On 4.47–4.51 epochs are counted with floor and performed with ceil: training stops early.
fn early_end(run: &Run) -> Option<Finding> {
    let last = run.log.rows.last()?;
    let asked = run.config.num_train_epochs;
    let reached = last.epoch?;
    let done = run.log.total_steps == Some(last.step) && run.config.max_steps <= 0;
    let batches = batches_per_epoch(&run.log.rows, run.config.gradient_accumulation_steps)?;
    // Less than one micro-batch short is rounding.
    let missing = ((asked - reached) * batches).round();
    if !done || missing < 1.0 || run.semantics.windows == WindowRule::Ceil {
        return None;
    }
    Some(Finding::new(
        Code::EarlyEnd,
        Severity::Warning,
        last.source.clone(),
        format!(
            "training ended at epoch {reached:.3} of {asked}: this transformers version counts an epoch's steps with \
             floor(batches / accumulation) but performs one more, so the last {missing} micro-batches were never seen \
             while the learning rate had already reached its end; transformers ≥ 4.52 repairs it"
        ),
    ))
}
