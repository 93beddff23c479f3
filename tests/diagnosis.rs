//! Spike detection on made-up logs and verdicts on scripted evidence: every rule, contradictory evidence included.

use std::collections::BTreeMap;

use spikeprobe::diagnosis::detect::{self, Context, Found, spikes};
use spikeprobe::diagnosis::evidence::{Baseline, Evidence, Match, Trial};
use spikeprobe::diagnosis::verdict::judge;
use spikeprobe::diagnosis::{Cause, Confidence, Fault, RowBlame, SpikeKind};
use spikeprobe::run::LogRow;

fn row(step: u64, loss: f64, grad_norm: f64) -> LogRow {
    LogRow {
        attempt: 0,
        step,
        window: 1,
        epoch: None,
        loss: Some(loss),
        grad_norm: Some(grad_norm),
        learning_rate: None,
        total_steps: None,
        source: String::new(),
    }
}

fn log(losses: &[f64]) -> Vec<LogRow> {
    losses.iter().enumerate().map(|(i, &l)| row(i as u64 + 1, l, 1.0)).collect()
}

fn found(losses: &[f64]) -> Vec<Found> {
    spikes(&log(losses), &Context::default())
}

/// A memorising run: fast descent, then a plateau with one per mille of noise.
fn descent(steps: usize) -> Vec<f64> {
    let noise = |i: usize| 1.0 + 1e-3 * ((i * 7919 % 13) as f64 - 6.0);
    (0..steps).map(|i| (0.05 + 3.2 * (-(i as f64) / 4.0).exp()) * noise(i)).collect()
}

#[test]
fn a_jump_out_of_a_quiet_plateau_is_found_with_its_step_and_height() {
    let mut losses = descent(40);
    losses[30] *= 10.0;
    let found = found(&losses);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].until, found[0].kind), (31, 31, SpikeKind::Jump));
    assert!((found[0].height - 10f64.ln()).abs() < 0.05, "{}", found[0].height);
}

#[test]
fn a_rise_that_stays_is_a_divergence_to_the_end_of_the_log() {
    let mut losses = descent(24);
    losses.extend([0.4, 1.5, 3.0, 4.0, 4.2, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5]);
    let found = found(&losses);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].kind, found[0].until), (SpikeKind::Divergence, 35));
    assert!(found[0].step >= 25 && found[0].step <= 26, "{}", found[0].step);
}

#[test]
fn a_doubling_at_each_epoch_boundary_is_found_each_time() {
    let mut losses = vec![0.049; 60];
    (losses[20], losses[40]) = (0.097, 0.098);
    assert_eq!(found(&losses).iter().map(|f| f.step).collect::<Vec<_>>(), [21, 41]);
}

#[test]
fn a_rise_at_every_epoch_boundary_is_found_within_a_descent_and_one_at_some_is_not() {
    let mut rows = log(&(0..27).map(|i| 0.07 + 3.3 * (-f64::from(i) / 5.0).exp()).collect::<Vec<_>>());
    for row in &mut rows {
        row.epoch = Some(row.step as f64 * 5.0 / 48.0);
    }
    for step in [10, 20] {
        rows[step - 1].loss = rows[step - 1].loss.map(|l| 1.6 * l);
    }
    let steps = |rows: &[LogRow]| spikes(rows, &Context::default()).iter().map(|f| f.step).collect::<Vec<_>>();
    assert_eq!(steps(&rows), [10, 20]);
    rows[9].loss = rows[8].loss;
    assert!(!steps(&rows).contains(&10));
}

#[test]
fn a_rise_that_stays_is_found_although_the_log_has_hardly_begun() {
    let found = found(&[3.19, 3.16, 2.84, 5.7, 11.1, 6.2, 6.7, 6.8, 4.6, 4.4]);
    assert_eq!((found.len(), found[0].kind), (1, SpikeKind::Divergence));
}

#[test]
fn a_spike_at_the_third_step_of_a_short_log_is_found() {
    assert_eq!(found(&[0.0567, 0.0567, 4.85, 5.9, 5.4])[0].step, 3);
}

#[test]
fn nan_zero_and_their_neighbours_are_told_apart() {
    let found = found(&[3.0, 2.0, f64::NAN, f64::NAN, 1.5, 0.0, 1.2]);
    let kinds: Vec<_> = found.iter().map(|f| (f.step, f.until, f.kind)).collect();
    assert_eq!(kinds, [(3, 4, SpikeKind::Nan), (6, 6, SpikeKind::MaskedNan)]);
}

#[test]
fn a_tiny_loss_that_the_log_rounds_to_zero_is_no_nan() {
    let context = Context { rounds_loss: true, ..Context::default() };
    assert!(spikes(&log(&[0.01, 0.003, 0.0008, 0.0001, 0.0, 0.0001]), &context).is_empty());
}

#[test]
fn skipped_steps_count_once_the_loss_scale_is_calibrated() {
    let mut rows = log(&descent(30));
    for step in [0, 1, 2, 15] {
        rows[step].grad_norm = Some(f64::NAN);
    }
    let context = Context { loss_scaling: true, ..Context::default() };
    let found = spikes(&rows, &context);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].kind, found[0].height), (16, SpikeKind::SkippedStep, 1.0));
}

#[test]
fn a_gradient_that_explodes_alone_is_its_own_kind() {
    let mut rows = log(&descent(30));
    rows[20].grad_norm = Some(500.0);
    let found = spikes(&rows, &Context::default());
    assert_eq!((found.len(), found[0].step, found[0].kind), (1, 21, SpikeKind::GradientExplosion));
}

#[test]
fn a_first_loss_far_above_a_uniform_guess_is_a_multiple() {
    let losses: Vec<f64> = descent(30).iter().map(|l| 8.0 * l).collect();
    let context = Context { vocab_size: Some(2048), accumulation: 8, ..Context::default() };
    assert_eq!(spikes(&log(&losses), &context)[0].kind, SpikeKind::Level);
    assert!(spikes(&log(&descent(30)), &context).is_empty());
}

#[test]
fn benign_shapes_are_no_spikes() {
    let staircase: Vec<f64> = (0..200).map(|i| 3.0 * 0.7f64.powi(i / 50) * (1.0 + 0.05 * f64::from(i % 3))).collect();
    let alternating: Vec<f64> = (0..100).map(|i| if i % 2 == 0 { 1.0 } else { 2.0 }).collect();
    let grouped: Vec<f64> = (0..100).map(|i| if i % 8 < 4 { 1.0 } else { 1.4 }).collect();
    let bouncing_descent = [3.1, 3.2, 2.3, 1.6, 0.9, 0.54, 1.3, 0.52, 0.99, 0.28, 0.17, 0.17, 0.18, 0.12, 0.08];
    let high_start = [8.0, 5.0, 3.0, 2.5, 2.4, 2.3, 2.35, 2.3];
    for shape in [&staircase[..], &alternating, &grouped, &bouncing_descent, &high_start, &[2.0], &[]] {
        assert!(found(shape).is_empty(), "{:?} in {:?}", found(shape), &shape[..shape.len().min(20)]);
    }
}

#[test]
fn of_two_attempts_that_logged_the_same_steps_the_later_counts() {
    let mut rows = log(&[3.0, 2.0, 1.0, 9.0]);
    rows.extend([LogRow { attempt: 1, ..row(3, 1.1, 1.0) }, LogRow { attempt: 1, ..row(4, 0.9, 1.0) }]);
    let kept: Vec<_> = detect::effective(&rows).iter().map(|r| (r.step, r.loss)).collect();
    assert_eq!(kept, [(1, Some(3.0)), (2, Some(2.0)), (3, Some(1.1)), (4, Some(0.9))]);
}

#[test]
fn fifty_thousand_rows_take_less_than_a_second() {
    let losses: Vec<f64> = (0..50_000u64).map(|i| 2.0 + 0.3 * ((i * 2_654_435_761 % 1000) as f64 / 1000.0)).collect();
    let start = std::time::Instant::now();
    assert!(found(&losses).is_empty());
    assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
}

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
            perturbed: 0,
            perturbed_with_spike: 0,
            matches_after: true,
        },
        trials: trials.iter().map(trial).collect(),
        window_without_labels: false,
        window_always_high: false,
        rows: Vec::new(),
        fault: None,
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
