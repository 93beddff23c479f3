//! One or two sentences on a verdict: what it was, what shows it, what to change.

use super::evidence::{Evidence, Match};
use super::{Cause, Confidence, RowBlame, SpikeKind};
use crate::numerics::State;

pub fn of(evidence: &Evidence, cause: Cause, confidence: Confidence) -> String {
    let step = evidence.step;
    let change = best_change(evidence, cause);
    match cause {
        Cause::Hardware => hardware(evidence),
        Cause::TrainerBookkeeping if evidence.kind == SpikeKind::Level => {
            "The trainer adds up the losses of the accumulation window without dividing: the logged loss and gradient \
             norm are a multiple, the training itself is sound. Divide the log, or use a version that divides."
                .to_string()
        }
        Cause::TrainerBookkeeping => format!(
            "Step {step} is bookkeeping of this trainer version, not instability: {change} and the spike is gone. \
             Upgrade transformers, or make the batches per epoch a multiple of the accumulation."
        ),
        Cause::MaskedLabels => format!(
            "Every label in the window of step {step} is masked ({}): nothing was predicted, so the loss logs as 0.0. \
             Remove the rows or raise cutoff_len.",
            rows(&evidence.rows)
        ),
        Cause::Fp16Overflow => format!(
            "Values left the range of fp16 (65504) at step {step}; in bf16 the same steps are finite. Train with bf16."
        ),
        Cause::Bf16Rounding => format!(
            "Updates are lost when they are rounded to bf16: {change} and the loss keeps falling. Keep the adapter in fp32."
        ),
        Cause::Data => format!(
            "{} made step {step} spike: with the labels masked the same step is quiet. Check and fix {}.",
            rows(&evidence.rows),
            if evidence.rows.len() == 1 { "it" } else { "them" }
        ),
        Cause::OptimizerState => format!(
            "The run was resumed without its optimizer state: with the moments kept, step {step} is quiet. Resume from \
             a checkpoint that has optimizer.pt (save_only_model: false)."
        ),
        Cause::Schedule => format!("The learning rate jumped before step {step}: {change} and the spike is gone."),
        Cause::GradientClipping => {
            format!("Without clipping one large gradient threw the weights off: {change} and step {step} is quiet.")
        }
        Cause::GradientAccumulation => {
            format!("Too few samples per update at this learning rate: {change} and step {step} is quiet.")
        }
        Cause::LearningRate => {
            format!("The learning rate is above what this model and data bear: {change} and step {step} is quiet.")
        }
        Cause::Nondeterminism => {
            format!("The same steps give different numbers when repeated; step {step} cannot be replayed.")
        }
        Cause::None if evidence.kind == SpikeKind::GradientExplosion => {
            format!("The gradient norm of step {step} is large before clipping; the clipped update did no harm.")
        }
        Cause::None => format!("Step {step} lies within what these rows do anyway; nothing is wrong."),
        Cause::Undetermined => undetermined(evidence, confidence),
    }
}

fn hardware(evidence: &Evidence) -> String {
    let here = match evidence.baseline.arithmetic {
        Some(State::Correct) => {
            " The device of this replay repeats the step bit for bit and agrees with its checksums."
        }
        Some(State::Transient | State::Persistent) => {
            " The device of this replay computes the step wrongly as well: see spikeprobe numerics --triage."
        }
        Some(State::OrderDependent | State::Undetermined) | None => "",
    };
    format!("{}{here}", fault(evidence))
}

fn fault(evidence: &Evidence) -> String {
    let step = evidence.step;
    match &evidence.fault {
        Some(fault) if fault.proved => format!(
            "A bit flipped: {}. Injected into the replay, it gives the logged numbers. Check the \
             device's memory (ECC) and resume from the checkpoint before it.",
            fault.message
        ),
        Some(fault) => format!(
            "The replay matches the log up to step {} and is quiet at step {step}, where the log is not; {}. A transient \
             hardware fault is what is left: check the device (ECC, Xid) and resume from the checkpoint before it.",
            step.saturating_sub(1),
            fault.message
        ),
        None => format!(
            "The replay matches the log up to step {} and is quiet at step {step}, where the log is not: a transient \
             hardware fault. Check the device (ECC, Xid) and resume from the checkpoint before it.",
            step.saturating_sub(1)
        ),
    }
}

fn undetermined(evidence: &Evidence, _confidence: Confidence) -> String {
    let step = evidence.step;
    if evidence.baseline.height.is_none() {
        return format!(
            "Step {step} could not be replayed, so no cause can be named; see the findings for what is missing."
        );
    }
    if let Some(change) = &evidence.unaffordable {
        return format!(
            "The spike of step {step} lies so far from the nearest start point that `{change}` could not be tried within \
             the windows allowed. Allow more with --windows, or save checkpoints closer to it."
        );
    }
    match evidence.baseline.before {
        Match::Off => format!(
            "The replay differs from the log before step {step}: some input is not what the run used. Check model, \
             dataset and library versions (--versions), then diagnose again."
        ),
        _ if !evidence.reproduced() => format!(
            "The replay does not show the spike of step {step}, and small perturbations decide whether it comes. Save \
             checkpoints closer to it, or replay on the device that trained."
        ),
        _ if evidence.only.is_some() => format!(
            "What explains the largest spike does not explain the one of step {step}, and nothing else was tried: \
             `--spike {step}` does."
        ),
        _ => format!(
            "The spike of step {step} is reproduced and no single change removes it. Try a lower learning rate from the \
             start, or two changes together with `spikeprobe replay --set`."
        ),
    }
}

/// The smallest change that removes the spike for this cause, in words.
fn best_change(evidence: &Evidence, cause: Cause) -> String {
    evidence.smallest_change(cause).map_or_else(|| "change it".to_string(), |(_, t)| t.name.clone())
}

/// "row 37 of train", "rows 10, 11, 50 of train".
fn rows(rows: &[RowBlame]) -> String {
    let mut numbers: Vec<u32> = rows.iter().map(|r| r.row).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let listed: Vec<String> = numbers.iter().take(8).map(u32::to_string).collect();
    let name = rows.first().map_or("the dataset", |r| r.dataset.as_str());
    match numbers.len() {
        0 => "Some rows".to_string(),
        1 => format!("Row {} of {name}", listed[0]),
        n if n > listed.len() => format!("Rows {} … ({n} rows) of {name}", listed.join(", ")),
        _ => format!("Rows {} of {name}", listed.join(", ")),
    }
}
