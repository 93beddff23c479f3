//! Evidence → verdict. A pure function; each rule has a test on scripted evidence.
//!
//! The order of the rules is the order of certainty: what the data says by itself (no labels), what only the log
//! shows (hardware), what the replay shows and one change removes (the most specific sufficient one), and last the
//! honest answers.

use super::evidence::{Evidence, Match, Trial};
use super::{Cause, Confidence, SpikeKind, Verdict};
use crate::numerics::State;

/// The verdict on one spike.
pub fn judge(evidence: &Evidence) -> Verdict {
    let sufficient = sufficient(evidence);
    let (cause, confidence) = decide(evidence, &sufficient);
    let mut also: Vec<Cause> = sufficient.iter().map(|t| t.cause).filter(|&c| c != cause).collect();
    also.dedup();
    if matches!(cause, Cause::Hardware | Cause::None) {
        also.clear();
    }
    // Bad rows are learned and a flipped bit stays, even where the loss comes back at once; and what a loss that comes
    // back late had to learn again is lost.
    let stays = matches!(cause, Cause::Data | Cause::Hardware) || evidence.kind == SpikeKind::Divergence;
    let harmful = cause != Cause::None && (evidence.harmful || stays);
    let summary = super::summary::of(evidence, cause, confidence);
    Verdict { cause, also_sufficient: also, confidence, harmful, summary }
}

/// Trials that alone remove at least half of the height, most specific first.
pub fn sufficient(evidence: &Evidence) -> Vec<&Trial> {
    let mut trials: Vec<&Trial> = evidence.trials.iter().filter(|t| evidence.removes(t)).collect();
    trials.sort_by_key(|t| t.cause);
    trials
}

fn decide(evidence: &Evidence, sufficient: &[&Trial]) -> (Cause, Confidence) {
    // A window in which nothing is predicted logs 0.0 whatever else happens.
    if evidence.window_without_labels && matches!(evidence.kind, SpikeKind::MaskedNan | SpikeKind::Nan) {
        let confidence = if evidence.reproduced() { Confidence::Strong } else { Confidence::Moderate };
        return (Cause::MaskedLabels, confidence);
    }
    if evidence.baseline.height.is_none() || evidence.baseline.before == Match::Off {
        return (Cause::Undetermined, Confidence::Weak);
    }
    if !evidence.reproduced() {
        return absent(evidence, sufficient);
    }
    // Clipping made the step harmless and the loss never moved: nothing to explain, nothing to fix.
    if evidence.kind == SpikeKind::GradientExplosion && !evidence.harmful {
        return (Cause::None, Confidence::Strong);
    }
    // Hard rows are not a fault: they were as hard before, and training went on undisturbed.
    let in_the_window = |t: &&Trial| t.cause < Cause::OptimizerState;
    if evidence.window_always_high && !evidence.harmful && !sufficient.first().is_some_and(in_the_window) {
        return (Cause::None, Confidence::Moderate);
    }
    match sufficient.first() {
        Some(first) => (first.cause, confidence(evidence, first)),
        None => (Cause::Undetermined, Confidence::Weak),
    }
}

/// The log spikes and the replay does not.
fn absent(evidence: &Evidence, sufficient: &[&Trial]) -> (Cause, Confidence) {
    let baseline = &evidence.baseline;
    // Another bookkeeping that gives the logged spike: the log knows what the replay did not.
    if let Some(trial) = sufficient.iter().find(|t| t.cause == Cause::TrainerBookkeeping) {
        return (trial.cause, Confidence::Moderate);
    }
    let chaotic = baseline.is_chaotic();
    if baseline.departs_at_spike && baseline.before == Match::Close && !chaotic {
        let proved = evidence.fault.as_ref().is_some_and(|f| f.proved);
        // Another order of additions moves the step as far as the log lies from the replay.
        if !proved && baseline.arithmetic == Some(State::OrderDependent) {
            return (Cause::Nondeterminism, Confidence::Moderate);
        }
        let confidence = match (proved, baseline.matches_after) {
            (true, _) => Confidence::Strong,
            (false, true) => Confidence::Moderate,
            (false, false) if baseline.perturbed > 0 => Confidence::Moderate,
            (false, false) => Confidence::Weak,
        };
        return (Cause::Hardware, confidence);
    }
    // Rounding noise alone decides whether it is there: the run sits on the edge of stability.
    if let (true, Some(trial)) = (chaotic, sufficient.first()) {
        return (trial.cause, Confidence::Weak);
    }
    (Cause::Undetermined, Confidence::Weak)
}

fn confidence(evidence: &Evidence, trial: &Trial) -> Confidence {
    let matched = matches!(evidence.baseline.before, Match::Close | Match::Nothing);
    let clean = trial.height <= 0.25 * evidence.reference_height();
    let stable = evidence.baseline.perturbed_with_spike == evidence.baseline.perturbed;
    if matched && clean && stable { Confidence::Strong } else { Confidence::Moderate }
}
