//! Verdicts on scripted evidence: every rule, contradictory evidence included.

use std::collections::BTreeMap;

use spikeprobe::diagnosis::evidence::{Baseline, Evidence, Match, Trial};
use spikeprobe::diagnosis::verdict::judge;
use spikeprobe::diagnosis::{Cause, Confidence, Fault, RowBlame, SpikeKind};
use spikeprobe::numerics::State;

fn reproduced(trials: &[(Cause, f64)]) -> Evidence {
    let trial = |&(cause, height): &(Cause, f64)| Trial {
        cause,
        name: cause.word().to_string(),
        changes: BTreeMap::new(),
        height,
        windows: 4,
    };
    Evidence {
        step: 27,
        kind: SpikeKind::Jump,
        logged_height: 2.0,
        baseline: Baseline {
            height: Some(2.0),
            before: Match::Close,
            departs_at_spike: false,
            parts_exactly: false,
            perturbed: 0,
            perturbed_with_spike: 0,
            matches_after: true,
            arithmetic: None,
        },
        trials: trials.iter().map(trial).collect(),
        window_without_labels: false,
        window_always_high: false,
        rows: Vec::new(),
        fault: None,
        unaffordable: None,
        only: None,
        harmful: true,
    }
}

/// Matches before, quiet at the spike, where the log is not.
fn absent() -> Evidence {
    let mut evidence = reproduced(&[]);
    evidence.baseline.height = Some(0.0);
    evidence.baseline.departs_at_spike = true;
    evidence.baseline.perturbed = 2;
    evidence
}

#[test]
fn the_most_specific_sufficient_change_is_the_cause_and_the_others_are_listed() {
    let verdict = judge(&reproduced(&[(Cause::LearningRate, 0.0), (Cause::Data, 0.1), (Cause::Schedule, 1.9)]));
    assert_eq!(verdict.cause, Cause::Data);
    assert_eq!(verdict.also_sufficient, [Cause::LearningRate]);
    assert_eq!(verdict.confidence, Confidence::Strong);
}

#[test]
fn every_cause_is_chosen_when_its_change_alone_is_sufficient() {
    use Cause::*;
    for cause in [TrainerBookkeeping, Fp16Overflow, Bf16Rounding, Data, OptimizerState, Schedule, GradientClipping] {
        assert_eq!(judge(&reproduced(&[(cause, 0.0), (LearningRate, 2.0)])).cause, cause);
    }
    for cause in [GradientAccumulation, LearningRate] {
        assert_eq!(judge(&reproduced(&[(cause, 0.0)])).cause, cause);
    }
}

#[test]
fn half_of_the_height_is_the_limit_of_sufficient() {
    assert_eq!(judge(&reproduced(&[(Cause::LearningRate, 1.0)])).cause, Cause::LearningRate);
    assert_eq!(judge(&reproduced(&[(Cause::LearningRate, 1.01)])).cause, Cause::Undetermined);
}

#[test]
fn a_trial_that_was_not_measured_is_not_sufficient() {
    assert_eq!(judge(&reproduced(&[(Cause::Data, f64::NAN)])).cause, Cause::Undetermined);
}

#[test]
fn a_partial_removal_or_a_band_instead_of_a_match_is_moderate() {
    assert_eq!(judge(&reproduced(&[(Cause::LearningRate, 0.9)])).confidence, Confidence::Moderate);
    let mut evidence = reproduced(&[(Cause::LearningRate, 0.0)]);
    evidence.baseline.before = Match::Band;
    assert_eq!(judge(&evidence).confidence, Confidence::Moderate);
}

#[test]
fn a_departure_at_the_spike_after_a_match_is_hardware_and_a_proved_bit_makes_it_strong() {
    let mut evidence = absent();
    assert_eq!((judge(&evidence).cause, judge(&evidence).confidence), (Cause::Hardware, Confidence::Moderate));
    evidence.fault = Some(Fault {
        step: 27,
        target: "lora_B".into(),
        tensor: Some("layers.1.self_attn.o_proj".into()),
        element: Some(966),
        bit: Some(26),
        proved: true,
        message: "bit 26 of layers.1.self_attn.o_proj lora_B[966]".into(),
    });
    assert_eq!(judge(&evidence).confidence, Confidence::Strong);
}

#[test]
fn a_step_that_another_order_of_additions_moves_as_far_is_nondeterminism_unless_a_bit_is_proved() {
    let mut evidence = absent();
    evidence.baseline.arithmetic = Some(State::OrderDependent);
    assert_eq!(judge(&evidence).cause, Cause::Nondeterminism);
    for state in [State::Correct, State::Undetermined, State::Transient, State::Persistent] {
        evidence.baseline.arithmetic = Some(state);
        assert_eq!(judge(&evidence).cause, Cause::Hardware, "{state:?}");
    }
}

#[test]
fn a_spike_that_rounding_noise_also_makes_is_never_hardware() {
    let mut evidence = absent();
    evidence.baseline.perturbed_with_spike = 1;
    assert_eq!(judge(&evidence).cause, Cause::Undetermined);
    evidence.trials = reproduced(&[(Cause::LearningRate, 0.0)]).trials;
    assert_eq!((judge(&evidence).cause, judge(&evidence).confidence), (Cause::LearningRate, Confidence::Weak));
}

#[test]
fn hardware_needs_a_match_before_the_spike() {
    for before in [Match::Band, Match::Off, Match::Nothing] {
        let mut evidence = absent();
        evidence.baseline.before = before;
        assert_eq!(judge(&evidence).cause, Cause::Undetermined, "{before:?}");
    }
}

#[test]
fn no_match_before_the_spike_gives_no_cause_whatever_the_trials_say() {
    let mut evidence = reproduced(&[(Cause::Data, 0.0), (Cause::LearningRate, 0.0)]);
    evidence.baseline.before = Match::Off;
    assert_eq!(judge(&evidence).cause, Cause::Undetermined);
}

#[test]
fn a_window_without_labels_explains_its_zero_even_against_other_evidence() {
    let mut evidence = reproduced(&[(Cause::LearningRate, 0.0), (Cause::Data, 0.0)]);
    evidence.kind = SpikeKind::MaskedNan;
    evidence.window_without_labels = true;
    evidence.rows = vec![RowBlame {
        dataset: "train".into(),
        row: 5,
        micro_batch: 0,
        step: 27,
        tokens: None,
        reason: String::new(),
    }];
    let verdict = judge(&evidence);
    assert_eq!(verdict.cause, Cause::MaskedLabels);
    assert!(verdict.summary.contains("Row 5 of train") || verdict.summary.contains("row 5"), "{}", verdict.summary);
}

#[test]
fn another_bookkeeping_that_gives_the_logged_spike_beats_hardware() {
    let mut evidence = absent();
    evidence.trials = reproduced(&[(Cause::TrainerBookkeeping, 0.0)]).trials;
    assert_eq!(judge(&evidence).cause, Cause::TrainerBookkeeping);
}

#[test]
fn a_clipped_explosion_without_damage_is_nothing_to_fix() {
    let mut evidence = reproduced(&[(Cause::LearningRate, 0.0)]);
    evidence.kind = SpikeKind::GradientExplosion;
    evidence.harmful = false;
    let verdict = judge(&evidence);
    assert_eq!((verdict.cause, verdict.harmful), (Cause::None, false));
    evidence.harmful = true;
    assert_eq!(judge(&evidence).cause, Cause::LearningRate);
}

#[test]
fn a_batch_that_is_always_hard_and_did_no_harm_is_none_but_not_where_it_did_harm() {
    let mut evidence = reproduced(&[(Cause::LearningRate, 0.0)]);
    evidence.window_always_high = true;
    assert_eq!(judge(&evidence).cause, Cause::LearningRate);
    evidence.harmful = false;
    assert_eq!(judge(&evidence).cause, Cause::None);
}

#[test]
fn a_window_that_is_always_high_because_another_leaked_into_it_is_bookkeeping() {
    let mut evidence = reproduced(&[(Cause::TrainerBookkeeping, 0.0)]);
    evidence.window_always_high = true;
    evidence.harmful = false;
    let verdict = judge(&evidence);
    assert_eq!((verdict.cause, verdict.harmful), (Cause::TrainerBookkeeping, false));
}

#[test]
fn what_cannot_be_replayed_is_undetermined_and_says_so() {
    let mut evidence = reproduced(&[]);
    evidence.baseline.height = None;
    let verdict = judge(&evidence);
    assert_eq!((verdict.cause, verdict.confidence), (Cause::Undetermined, Confidence::Weak));
    assert!(verdict.summary.contains("could not be replayed"), "{}", verdict.summary);
}

#[test]
fn a_reproduced_spike_that_nothing_removes_says_what_to_try_next() {
    let verdict = judge(&reproduced(&[(Cause::LearningRate, 1.9)]));
    assert_eq!(verdict.cause, Cause::Undetermined);
    assert!(verdict.summary.contains("Try"), "{}", verdict.summary);
}

/// Halves of a bisection in the order of their replay: the learning rate that is named is the largest that leaves
/// nothing, not the largest that just halves the height.
#[test]
fn the_change_that_is_named_is_the_smallest_that_leaves_nothing() {
    let heights = [0.0, 0.05, 0.9, 0.1];
    let mut evidence = reproduced(&heights.map(|height| (Cause::LearningRate, height)));
    assert_eq!(evidence.smallest_change(Cause::LearningRate).map(|(i, _)| i), Some(3));
    evidence.trials.truncate(3);
    assert_eq!(evidence.smallest_change(Cause::LearningRate).map(|(i, _)| i), Some(1));
    evidence.trials = reproduced(&[(Cause::LearningRate, 0.9), (Cause::LearningRate, 0.6), (Cause::Data, 0.0)]).trials;
    assert_eq!(evidence.smallest_change(Cause::LearningRate).map(|(i, _)| i), Some(1));
    assert_eq!(evidence.smallest_change(Cause::Schedule), None);
}

#[test]
fn what_the_windows_did_not_suffice_for_leaves_the_verdict_open_and_says_how_to_go_on() {
    let mut evidence = reproduced(&[]);
    evidence.unaffordable = Some("keep the optimizer state".into());
    let verdict = judge(&evidence);
    assert_eq!(verdict.cause, Cause::Undetermined);
    assert!(
        verdict.summary.contains("--windows") && verdict.summary.contains("keep the optimizer"),
        "{}",
        verdict.summary
    );
}

#[test]
fn where_every_bit_was_equal_before_noise_that_makes_the_spike_excuses_nothing() {
    let mut evidence = absent();
    evidence.baseline.perturbed_with_spike = 1;
    assert_ne!(judge(&evidence).cause, Cause::Hardware, "rounding may have decided");
    evidence.baseline.parts_exactly = true;
    assert_eq!(judge(&evidence).cause, Cause::Hardware);
}

/// Chaos after an honest beginning is a band, in which a change that removes the spike still counts, less surely.
#[test]
fn a_band_gives_a_cause_and_never_hardware() {
    let mut evidence = reproduced(&[(Cause::Fp16Overflow, 0.0), (Cause::LearningRate, 0.0)]);
    evidence.baseline.before = Match::Band;
    evidence.baseline.departs_at_spike = true;
    assert_eq!((judge(&evidence).cause, judge(&evidence).confidence), (Cause::Fp16Overflow, Confidence::Moderate));
    evidence.baseline.height = Some(0.0);
    evidence.trials.clear();
    assert_eq!(judge(&evidence).cause, Cause::Undetermined);
}
