//! Verdicts of certificates on scripted logs.

use spikeprobe::replay::{Envelope, Reproduction, Start, StepRecord, Trace, certify, first_bump};
use spikeprobe::run::LogRow;

const FLOOR: Envelope = Envelope { loss: 1e-5, grad_norm: 1e-4 };

fn row(step: u64, loss: f64) -> LogRow {
    LogRow {
        attempt: 0,
        step,
        window: 1,
        epoch: None,
        loss: Some(loss),
        grad_norm: Some(1.0),
        learning_rate: Some(1e-4),
        total_steps: None,
        source: String::new(),
    }
}

fn trace(losses: &[f64]) -> Trace {
    let steps = losses.iter().zip(1..).map(|(&loss, step)| StepRecord {
        step,
        attempt: 0,
        epoch: 0.0,
        learning_rate: 1e-4,
        learning_rate_logged: 1e-4,
        loss,
        loss_raw: loss,
        loss_logged: Some(loss),
        grad_norm: 1.0,
        clip_coefficient: 1.0,
        update_norm: 0.0,
        loss_scale: None,
        skipped: false,
        nonfinite: 0,
        micro_batches: Vec::new(),
    });
    Trace { start: Start::Initial, steps: steps.collect() }
}

fn rows(losses: &[f64]) -> Vec<LogRow> {
    losses.iter().zip(1..).map(|(&loss, step)| row(step, loss)).collect()
}

#[test]
fn equal_values_are_reproduced_and_another_loss_departs_where_it_appears() {
    let logged = rows(&[3.0, 2.0, 1.5, 1.2]);
    let same = certify(&logged, false, FLOOR, &trace(&[3.0, 2.0, 1.5, 1.2]), &[]);
    assert_eq!((same.verdict, same.departs_at, same.loss_max_rel), (Reproduction::Reproduced, None, 0.0));
    let other = certify(&logged, false, FLOOR, &trace(&[3.0, 2.0, 1.5001, 1.2]), &[]);
    assert_eq!((other.verdict, other.departs_at), (Reproduction::Departs, Some(3)));
}

#[test]
fn nan_never_agrees_with_a_number_and_agrees_with_nan() {
    let departs = |ours: f64, theirs: f64| certify(&rows(&[theirs]), false, FLOOR, &trace(&[ours]), &[]).departs_at;
    assert_eq!(departs(f64::NAN, 1.0), Some(1));
    assert_eq!(departs(f64::INFINITY, 1.0), Some(1));
    assert_eq!(departs(f64::NAN, f64::NAN), None);
}

#[test]
fn a_loss_rounded_to_four_decimals_agrees_within_half_of_the_last() {
    let logged = rows(&[0.0512]);
    assert_eq!(certify(&logged, true, FLOOR, &trace(&[0.051249]), &[]).departs_at, None);
    assert_eq!(certify(&logged, true, FLOOR, &trace(&[0.05127]), &[]).departs_at, Some(1));
    assert_eq!(certify(&logged, false, FLOOR, &trace(&[0.051249]), &[]).departs_at, Some(1));
}

#[test]
fn a_learning_rate_one_bit_off_departs() {
    let mut ours = trace(&[1.0]);
    ours.steps[0].learning_rate_logged = f64::from_bits(1e-4f64.to_bits() + 1);
    assert_eq!(certify(&rows(&[1.0]), false, FLOOR, &ours, &[]).departs_at, Some(1));
}

#[test]
fn perturbed_replays_widen_what_is_allowed() {
    let logged = rows(&[1.0, 0.9]);
    let ours = trace(&[1.0, 0.9009]);
    assert_eq!(certify(&logged, false, FLOOR, &ours, &[]).departs_at, Some(2));
    let noisy = [trace(&[1.0, 0.9020])];
    let widened = certify(&logged, false, FLOOR, &ours, &noisy);
    assert_eq!(widened.departs_at, None);
    assert!(widened.envelope.loss > 1e-3, "{:?}", widened.envelope);
}

#[test]
fn after_the_bump_the_band_counts_and_a_single_replay_is_none() {
    let logged = rows(&[1.0, 1.000_001, 1.0, 5.0, 3.0]);
    let ours = trace(&[1.0, 1.0, 1.0, 5.2, 4.0]);
    let alone = certify(&logged, false, FLOOR, &ours, &[]);
    assert_eq!((alone.bump_at, alone.departs_at), (Some(4), None));
    let banded = certify(&logged, false, FLOOR, &ours, &[trace(&[1.0, 1.0, 1.0, 4.8, 2.5])]);
    assert_eq!(banded.departs_at, None);
    let far = certify(&logged, false, FLOOR, &ours, &[trace(&[1.0, 1.0, 1.0, 1.0, 1.0]), ours.clone()]);
    assert!(far.departs_at.is_none(), "4 within a band from 1 to 5.2");
    let flat = trace(&[1.0, 1.0, 1.0, 1.0, 1.0]);
    let missed = certify(&logged, false, FLOOR, &flat, std::slice::from_ref(&flat));
    assert_eq!(missed.departs_at, Some(4), "a replay that does not jump is no reproduction");
}

#[test]
fn where_every_bit_was_equal_the_line_counts_after_the_bump_too() {
    let logged = rows(&[1.0, 0.9, 0.8, 5.0, 3.0]);
    let exact = certify(&logged, false, FLOOR, &trace(&[1.0, 0.9, 0.8, 5.0, 3.0]), &[]);
    assert_eq!((exact.verdict, exact.exact_to, exact.bump_at), (Reproduction::Reproduced, Some(5), Some(4)));
    let parted = certify(&logged, false, FLOOR, &trace(&[1.0, 0.9, 0.8, 0.7, 0.6]), &[]);
    assert_eq!((parted.departs_at, parted.exact_to), (Some(4), Some(3)));
    let near = certify(&logged, false, FLOOR, &trace(&[1.0, 0.9000001, 0.8, 0.7, 0.6]), &[]);
    assert_eq!((near.departs_at, near.exact_to), (None, Some(1)), "one replay that is not exact is no band");
}

#[test]
fn nothing_logged_is_its_own_verdict() {
    assert_eq!(certify(&[], false, FLOOR, &trace(&[1.0]), &[]).verdict, Reproduction::NoLog);
}

#[test]
fn a_logging_window_that_began_before_the_replay_is_not_compared() {
    let mut logged = vec![row(3, 2.0)];
    logged[0].window = 5;
    let ours = Trace { steps: trace(&[9.0, 9.0, 9.0]).steps, start: Start::Initial };
    assert_eq!(certify(&logged, false, FLOOR, &ours, &[]).departs_at, None);
    logged[0].window = 3;
    assert_eq!(certify(&logged, false, FLOOR, &ours, &[]).departs_at, Some(3));
}

#[test]
fn a_bump_is_measured_against_the_three_steps_before() {
    let steps = |losses: &[f64]| losses.iter().zip(1..).map(|(&l, s)| (s, Some(l))).collect::<Vec<_>>();
    assert_eq!(first_bump(&steps(&[1.0, 0.5, 0.6, 0.66])), Some(4));
    assert_eq!(first_bump(&steps(&[1.0, 0.5, 0.6, 0.64])), None);
    assert_eq!(first_bump(&steps(&[1.0, f64::NAN])), Some(2));
    assert_eq!(first_bump(&steps(&[1.0, 0.0])), Some(2), "0.0 stands for NaN");
}
