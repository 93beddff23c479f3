//! Runs with lora_dropout, recorded on a CPU (fixtures/runs/record_dropout.py): their masks are torch's own (contract 10).

use spikeprobe::replay::{Intervention, Start};

use super::runs::{assert_reproduced, open, replay};

const RESUMED: &str = "runs/dropout-resumed";

/// Evaluations and epochs draw from the same generator, rows are padded, and a resume finds it in rng_state.pth or,
/// where that was lost, seeds it anew.
#[test]
fn a_run_with_dropout_is_reproduced_through_evaluations_epochs_and_a_resume() {
    for (run, last) in [(RESUMED, 8), ("runs/dropout-reseeded", 8), ("runs/dropout-two-ranks", 6)] {
        let replayer = open(run);
        assert_reproduced(&replayer, &replay(&replayer, Start::Initial, last, &[]), 0.0, 0.0);
        assert_reproduced(&replayer, &replay(&replayer, Start::Checkpoint(3), last, &[]), 0.0, 0.0);
    }
}

#[test]
fn other_masks_are_another_draw() {
    let replayer = open(RESUMED);
    let [theirs, other, again] = [vec![], vec![Intervention::Dropout { seed: 1 }], vec![]]
        .map(|with| replay(&replayer, Start::Initial, 3, &with));
    assert_eq!(theirs, again);
    // B is 0 at first: the masks show in the gradient of B, and in the loss from the second step on.
    assert_eq!(theirs[0].loss, other[0].loss);
    assert!(theirs.iter().zip(&other).all(|(a, b)| a.grad_norm != b.grad_norm));
    assert_ne!(theirs[1].loss, other[1].loss);
}

/// A remembered state holds the generator too.
#[test]
fn a_replay_that_goes_on_from_a_remembered_step_draws_the_same_masks() {
    let replayer = open(RESUMED);
    let whole = replay(&replayer, Start::Initial, 8, &[]);
    let short = open(RESUMED);
    let mut parts = replay(&short, Start::Initial, 4, &[]);
    parts.extend(replay(&short, Start::Initial, 8, &[]).split_off(4));
    assert_eq!(whole, parts);
}
