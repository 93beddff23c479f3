//! Which cells of a sweep are run together: those that differ only in what an update does.
//!
//! Their steps have the same rows and frozen weights, and the same adapter until their updates part, so that
//! [`Trainer::train`] can share passes between them.

use std::cmp::Reverse;

use super::{Cell, Trainer};
use crate::Result;

/// Axes that change updates only.
const OF_UPDATES: [&str; 11] = [
    "learning_rate",
    "max_grad_norm",
    "warmup_ratio",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "loraplus_lr_ratio",
];
/// Cells of a bunch: as many are lost when the program is killed.
const MOST: usize = 8;
/// Trained parameters of a bunch. Adapters of larger models leave no time to save between their products, and a cell
/// that takes long is better run, kept and continued by itself.
const PARAMETERS: u64 = 4 << 20;

/// The cells `missing`, in bunches for `workers` of which none should be idle; the longest first, so that the last to
/// finish is a short one.
pub fn bunches(cells: &[Cell], missing: &[usize], workers: usize, trainer: &dyn Trainer) -> Result<Vec<Vec<usize>>> {
    let share = missing.len().div_ceil(workers.max(1)).clamp(1, MOST);
    let mut bunches: Vec<Vec<usize>> = Vec::new();
    for &index in missing {
        let fits = (PARAMETERS / trainer.parameters(&cells[index])?.max(1)) as usize;
        let joins = |bunch: &&mut Vec<usize>| bunch.len() < share.min(fits) && alike(&cells[bunch[0]], &cells[index]);
        match bunches.iter_mut().find(joins) {
            Some(bunch) => bunch.push(index),
            None => bunches.push(vec![index]),
        }
    }
    // Of as many samples, more and smaller steps take longer.
    let length = |i: &usize| (cells[*i].steps * cells[*i].samples_per_step, cells[*i].steps);
    bunches.sort_by_key(|bunch| Reverse((bunch.iter().map(|i| length(i).0).sum::<u64>(), length(&bunch[0]).1)));
    Ok(bunches)
}

fn alike(one: &Cell, other: &Cell) -> bool {
    let of_passes = |cell: &Cell| {
        let axes = cell.axes.iter().filter(|(key, _)| !OF_UPDATES.contains(&key.as_str()));
        axes.map(|(key, value)| (key.clone(), value.clone())).collect::<Vec<_>>()
    };
    let rest = |cell: &Cell| Cell { axes: Default::default(), ..cell.clone() };
    of_passes(one) == of_passes(other) && rest(one) == rest(other)
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::replay::StepRecord;
    use crate::sweep::grid::{Axis, Base, Grid, Keep};

    struct Sized(u64);

    impl Trainer for Sized {
        fn train(&self, _: &[&Cell], _: &mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>) -> Result<()> {
            Ok(())
        }
        fn parameters(&self, _: &Cell) -> Result<u64> {
            Ok(self.0)
        }
        fn machine(&self) -> String {
            String::new()
        }
    }

    /// Sizes of the bunches of a grid, after checking that every cell is in one.
    fn sizes(typed: &[&str], workers: usize, parameters: u64) -> Vec<usize> {
        let base = Base { learning_rate: 1e-3, batch: 1, accumulation: 8, world_size: 1, max_steps: -1, steps: 48 };
        let axes = typed.iter().map(|axis| Axis::parse(axis, &base).expect("axis")).collect();
        let cells = Grid { axes, keep: Keep::MicroBatch, from: "initial".into() }.cells(&base).expect("cells");
        let all: Vec<usize> = (0..cells.len()).collect();
        let bunches = bunches(&cells, &all, workers, &Sized(parameters)).expect("bunches");
        assert!(bunches.iter().all(|bunch| bunch.iter().all(|i| alike(&cells[bunch[0]], &cells[*i]))));
        let mut held = bunches.concat();
        held.sort_unstable();
        assert_eq!(held, all);
        bunches.iter().map(Vec::len).collect()
    }

    #[test]
    fn cells_that_differ_in_their_updates_alone_run_together() {
        assert_eq!(sizes(&["lr=1,2,3,4", "accumulation=1,8", "precision=fp32,bf16"], 2, 100), [4; 4]);
        assert_eq!(sizes(&["lr=1,2,3,4", "clip=0,1", "precision=fp32,bf16"], 2, 100), [8; 2]);
        assert_eq!(sizes(&["seed=1,2,3", "alpha=8,16"], 1, 100), [1; 6]);
    }

    #[test]
    fn no_worker_is_idle_for_it_and_large_adapters_run_alone() {
        assert_eq!(sizes(&["lr=1,2,3,4,5,6,7,8"], 4, 100), [2; 4]);
        assert_eq!(sizes(&["lr=1,2,3,4,5,6,7,8"], 16, 100), [1; 8]);
        assert_eq!(sizes(&["lr=1,2,3,4"], 1, PARAMETERS / 2), [2, 2]);
        assert_eq!(sizes(&["lr=1,2"], 1, PARAMETERS + 1), [1, 1]);
    }
}
