//! Why there is no eval_loss.

use super::support::*;

#[test]
fn every_cause_of_a_missing_eval_loss_is_named() {
    let total = healthy(20);
    let run = |yaml: &str| five(yaml, &total).open().unwrap();
    assert!(finding(&run("val_size: 0.1\n"), Code::EvalStrategyNo).message.contains("eval_strategy: steps"));
    assert!(finding(&run("eval_dataset: b\n"), Code::EvalStrategyNo).message.contains("eval_dataset is loaded"));
    let removed = finding(&run("val_size: 0.1\nevaluation_strategy: steps\n"), Code::EvalKeyRemoved);
    assert_eq!(removed.severity, Severity::Error);
    let on = "eval_strategy: steps\n";
    assert!(
        finding(&run(&format!("{on}val_size: 0.1\neval_steps: 500\n")), Code::EvalStepsTooLarge)
            .message
            .contains("(20)")
    );
    assert!(codes(&run(&format!("{on}val_size: 0.1\neval_dataset: b\n"))).contains(&"eval_split_and_dataset"));
    assert!(codes(&run(&format!("{on}val_size: 0.1\npredict_with_generate: true\n"))).contains(&"eval_generates"));
    assert!(codes(&run(&format!("{on}val_size: 0.1\neval_delay: 99\n"))).contains(&"eval_delayed"));
    // What the log's eval rows show.
    let with_eval = |metrics: Value| [total.clone(), vec![metrics]].concat();
    let renamed = with_eval(json!({"step": 10, "eval_holdout_loss": 1.25, "eval_runtime": 1.0}));
    let run = with_state(&format!("{on}eval_dataset: holdout\n"), FOUR, &renamed).open().unwrap();
    assert!(finding(&run, Code::EvalMetricRenamed).message.contains("eval_holdout_loss"));
    let hidden = with_eval(json!({"step": 10, "eval_runtime": 1.0}));
    assert!(codes(&five(&format!("{on}val_size: 0.1\n"), &hidden).open().unwrap()).contains(&"eval_labels_hidden"));
    let nan = with_eval(json!({"step": 10, "eval_loss": "NaN"}));
    assert!(codes(&five(&format!("{on}val_size: 0.1\n"), &nan).open().unwrap()).contains(&"eval_not_finite"));
    let good = with_eval(json!({"step": 10, "eval_loss": 1.5}));
    let quiet = codes(&five(&format!("{on}val_size: 0.1\neval_steps: 10\n"), &good).open().unwrap());
    assert!(!quiet.iter().any(|c| c.starts_with("eval_")), "{quiet:?}");
}
