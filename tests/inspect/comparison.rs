//! Two runs side by side.

use spikeprobe::inspect::compare;

use super::support::*;

#[test]
fn two_runs_are_compared_by_what_can_explain_their_difference() {
    let a = five("seed: 1\n", &healthy(20)).open().unwrap();
    let b = five("seed: 2\nweight_decay: 0.1\nmax_grad_norm: 0.5\n", &with(20, row(5, json!(3.0), json!(1.0))))
        .open()
        .unwrap();
    let comparison = compare::compare(&a, &b);
    assert_eq!((comparison.parts_at, comparison.common_steps), (Some(5), 20));
    assert_eq!(comparison.differences[0].what, "max_grad_norm", "{:?}", comparison.differences);
    assert!(comparison.differences.iter().any(|d| d.what == "seed"));
    assert_eq!(compare::compare(&a, &a).parts_at, None);
    assert_eq!(compare::compare(&a, &a).differences, []);
}
