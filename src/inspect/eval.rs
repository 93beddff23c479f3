//! Why there is no eval_loss (contract 9): what was asked, what happened, why, and the lines to change.

use serde_json::Value;

use super::{Code, Finding, Severity};
use crate::run::{Run, Version};

pub fn findings(run: &Run) -> Vec<Finding> {
    let mut found = asked(run);
    found.extend(happened(run));
    found
}

/// What the configuration asks for and cannot get.
fn asked(run: &Run) -> Vec<Finding> {
    let does = |key: &str| run.config.written.get(key).and_then(Value::as_bool) == Some(true);
    // do_predict and do_eval alone evaluate once, by themselves.
    if !does("do_train") && (does("do_predict") || does("do_eval")) {
        return Vec::new();
    }
    let mut found = refused(run);
    found.extend(never_asked(run));
    if run.config.eval_strategy != "no" && has_rows(run) {
        found.extend(too_late(run));
        if does("predict_with_generate") {
            let text = "predict_with_generate evaluates by generation: the labels are removed and there is no eval_loss; \
                        remove it";
            found.push(warning(run, Code::EvalGenerates, "predict_with_generate", text.into()));
        }
    }
    found
}

fn has_rows(run: &Run) -> bool {
    run.config.val_size > 0.0 || !run.config.eval_dataset.is_empty()
}

fn warning(run: &Run, code: Code, key: &str, text: String) -> Finding {
    Finding::new(code, Severity::Warning, run.place(key), text)
}

/// Keys that stop the trainer.
fn refused(run: &Run) -> Vec<Finding> {
    let c = &run.config;
    let error = |code, key: &str, text: &str| Finding::new(code, Severity::Error, run.place(key), text.to_owned());
    let mut found = Vec::new();
    let transformers = run.versions.transformers.as_ref().map(|(v, _)| *v);
    if c.written.contains_key("evaluation_strategy") && transformers.is_some_and(|v| v >= Version(4, 51, 0)) {
        found.push(error(
            Code::EvalKeyRemoved,
            "evaluation_strategy",
            "transformers ≥ 4.51 does not know evaluation_strategy any more and stops; write eval_strategy",
        ));
    }
    if c.val_size > 0.0 && !c.eval_dataset.is_empty() {
        found.push(error(
            Code::EvalSplitAndDataset,
            "val_size",
            "val_size and eval_dataset exclude each other: LLaMA-Factory stops; remove one of them",
        ));
    }
    found
}

/// Rows for evaluation, and no evaluation.
fn never_asked(run: &Run) -> Option<Finding> {
    let c = &run.config;
    if !has_rows(run) || c.eval_strategy != "no" {
        return None;
    }
    let (key, what) = if c.val_size > 0.0 {
        ("val_size", format!("val_size {} takes rows away from training", c.val_size))
    } else {
        ("eval_dataset", "eval_dataset is loaded".to_owned())
    };
    let text = format!(
        "{what}, but eval_strategy is `no` (its default), so nothing is ever evaluated; add\n    eval_strategy: steps\n    \
         eval_steps: {}",
        suggested_steps(run)
    );
    Some(warning(run, Code::EvalStrategyNo, key, text))
}

/// Evaluations that lie beyond the last step.
fn too_late(run: &Run) -> Vec<Finding> {
    let Some(total) = run.log.total_steps else { return Vec::new() };
    let mut found = Vec::new();
    let every = run.config.eval_steps.filter(|_| run.config.eval_strategy == "steps");
    if let Some(steps) = every.filter(|&steps| steps > total as f64) {
        let late = if run.versions.transformers_at_least(5, 0) {
            "it evaluates once, at the last step"
        } else {
            "the only evaluation is the one after training, whose row is not in trainer_log.jsonl"
        };
        let text = format!(
            "eval_steps {steps} lies beyond the last step ({total}): {late}; write eval_steps: {}",
            suggested_steps(run)
        );
        found.push(warning(run, Code::EvalStepsTooLarge, "eval_steps", text));
    }
    let delay = run.config.written.get("eval_delay").and_then(Value::as_f64);
    if let Some(delay) = delay.filter(|&delay| delay > total as f64) {
        let text = format!("eval_delay {delay} lies beyond the last step ({total}): nothing is evaluated; remove it");
        found.push(warning(run, Code::EvalDelayed, "eval_delay", text));
    }
    found
}

/// Four or more evaluations over the run.
fn suggested_steps(run: &Run) -> u64 {
    run.log.total_steps.map_or(50, |total| (total / 10).max(1))
}

/// What the log's eval rows show.
fn happened(run: &Run) -> Vec<Finding> {
    let mut found = Vec::new();
    let rows = &run.log.eval_rows;
    let output = run.path(&run.config.output_dir);
    let losses = |named: fn(&str) -> bool| {
        rows.iter()
            .flat_map(|r| &r.metrics)
            .filter(move |(key, _)| named(key))
            .map(|(key, value)| (key.clone(), *value))
    };
    let plain = losses(|key| key == "eval_loss").count();
    let renamed: Option<String> = losses(|key| key.ends_with("_loss") && key != "eval_loss").next().map(|(key, _)| key);
    if let (0, Some(name)) = (plain, &renamed) {
        found.push(Finding::new(
            Code::EvalMetricRenamed,
            Severity::Warning,
            output.join("trainer_state.json").display().to_string(),
            format!(
                "the evaluations ran ({} of them) and are logged as `{name}`: with eval_dataset, {} names the metric after \
                 the data set, and trainer_log.jsonl and the loss plot look for exactly `eval_loss`{}; read trainer_state.json, \
                 or {}",
                rows.len(),
                if factory_names_sets(run) { "LLaMA-Factory ≤ 0.9.2" } else { "eval_on_each_dataset: true" },
                if run.log.eval_rows_of_trainer_log == 0 { ", which is why they show none" } else { "" },
                if factory_names_sets(run) { "use val_size, or LLaMA-Factory ≥ 0.9.3" } else { "set it to false" }
            ),
        ));
    }
    if let (0, None, Some(row)) = (plain, &renamed, rows.first()) {
        found.push(Finding::new(
            Code::EvalLabelsHidden,
            Severity::Warning,
            output.join("trainer_state.json").display().to_string(),
            format!(
                "{} evaluation(s) ran (first at step {}) without a loss: the trainer did not see the labels (transformers \
                 ≤ 4.53 looks at the PEFT wrapper's signature; LLaMA-Factory ≥ 0.9.3 names them), or it generated",
                rows.len(),
                row.step
            ),
        ));
    }
    if let Some((key, value)) = losses(|key| key.ends_with("_loss")).find(|(_, value)| !value.is_finite()) {
        found.push(Finding::new(
            Code::EvalNotFinite,
            Severity::Error,
            output.display().to_string(),
            format!("{key} is {value}: one evaluation batch without any label makes the mean NaN; see the masked rows of the evaluation data"),
        ));
    }
    found
}

/// LLaMA-Factory ≤ 0.9.2 loads eval_dataset as a dictionary.
fn factory_names_sets(run: &Run) -> bool {
    run.versions.llamafactory.as_ref().is_some_and(|(v, _)| *v < Version(0, 9, 3))
}
