//! The same step by other ways: chunked, padded as the trainer pads, and by candle's autograd.

use spikeprobe::replay::{Intervention, Replayer, Silent, Start, StepRecord, cross_check, relative};

use super::runs::{DEMO, HEALTHY, LOST_OPTIMIZER, open};

fn first_steps(replayer: &Replayer, with: &[Intervention]) -> Vec<StepRecord> {
    replayer.replay(&Start::Initial, 2, with, &mut Silent).expect("replay").steps
}

#[test]
fn the_trainers_own_shapes_give_the_same_numbers_within_rounding() {
    for (run, loss, grad_norm) in [(HEALTHY, 1e-6, 1e-5), (LOST_OPTIMIZER, 1e-6, 1e-4)] {
        let replayer = open(run);
        let (plain, exact) = (first_steps(&replayer, &[]), first_steps(&replayer, &[Intervention::ExactShapes]));
        for (a, b) in plain.iter().zip(&exact) {
            assert!(relative(a.loss, b.loss) <= loss, "{run}: {} {}", a.loss, b.loss);
            assert!(relative(a.grad_norm, b.grad_norm) <= grad_norm, "{run}: {} {}", a.grad_norm, b.grad_norm);
            for (a, b) in a.micro_batches.iter().zip(&b.micro_batches) {
                // Padding is computed, not counted.
                assert_eq!((&a.rows, a.tokens, a.label_tokens), (&b.rows, b.tokens, b.label_tokens));
            }
        }
    }
}

#[test]
fn candle_confirms_the_arithmetic_of_a_step() {
    let demo = open(DEMO);
    let check = cross_check(&demo, &Start::Initial, 2, &[]).expect("cross-check");
    let (found, allowed) = (check.relative_l2, check.allowed);
    assert!(check.agrees(), "{found:e} of {allowed:e}, {:?}, losses {:?}", check.worst(), check.losses);
    let logged = demo.run().log.rows[1].loss.expect("loss");
    assert!(relative(check.losses[0], logged) < 1e-5, "candle alone reproduces the log: {:?}", check.losses);
    // The run is f32: its precision adds nothing.
    assert!(check.tensors.iter().all(|t| t.precision_l2 == 0.0) && check.losses[1] == check.losses[2]);
    assert_eq!(check.json()["agrees"], true);

    let half = open(LOST_OPTIMIZER);
    let check = cross_check(&half, &Start::Checkpoint(24), 25, &[]).expect("cross-check");
    let (found, allowed) = (check.relative_l2, check.allowed);
    assert!(check.agrees(), "{found:e} of {allowed:e}, {:?}, losses {:?}", check.worst(), check.losses);
    let precision = check.tensors.iter().map(|t| t.precision_l2).fold(0.0, f64::max);
    assert!(precision > 1e-3 && precision < 1.0, "bf16 moves gradients by {precision:e}");
}

#[test]
fn a_cross_check_that_differs_says_so() {
    let mut check = cross_check(&open(DEMO), &Start::Initial, 1, &[]).expect("cross-check");
    check.tensors[3].relative_l2 = f64::NAN;
    assert!(!check.agrees());
    assert_eq!(check.worst().map(|t| &t.name), Some(&check.tensors[3].name));
}
