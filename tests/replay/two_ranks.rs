//! Two data-parallel processes, recorded with gloo on a CPU (fixtures/runs/record_two_ranks.py), replayed as one
//! longer window (contract 3.5, 5.2).

use spikeprobe::replay::Start;

use super::runs::{assert_reproduced, open, replay};

/// N over both ranks, and each rank's own.
const RUNS: [&str; 2] = ["runs/two-ranks-shared", "runs/two-ranks-own"];

#[test]
fn a_data_parallel_run_is_reproduced_from_its_seed_and_from_its_checkpoint() {
    for run in RUNS {
        let replayer = open(run);
        assert_eq!(replayer.run().config.world_size, 2, "{run}: rng_state_0 and rng_state_1 tell");
        assert_reproduced(&replayer, &replay(&replayer, Start::Initial, 6, &[]), 0.0, 0.0);
        assert_reproduced(&replayer, &replay(&replayer, Start::Checkpoint(3), 4, &[]), 0.0, 0.0);
    }
}

#[test]
fn ranks_take_batches_in_turn_and_the_last_is_filled_from_the_beginning() {
    let replayer = open(RUNS[0]);
    let window = replayer.window(1).expect("window");
    let ranks: Vec<u16> = window.micro_batches.iter().map(|m| m.rank).collect();
    assert_eq!(ranks, [0, 1, 0, 1], "two micro-batches on each rank");
    let last = replayer.window(3).expect("window");
    let rows: usize = last.micro_batches.iter().map(|m| m.examples.len()).sum();
    assert_eq!(rows, 8, "21 rows are filled up to 24");
    let first = &window.micro_batches[0].examples;
    assert!(last.micro_batches.iter().any(|m| m.examples.contains(&first[0])), "with the epoch's first rows");
}
