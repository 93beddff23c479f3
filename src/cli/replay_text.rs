//! A replay and its certificate as lines for people.

use std::fmt::Write as _;

use crate::batches::Corpus;
use crate::replay::{Certificate, Comparison, CrossCheck, Envelope, Reproduction, StepRecord, Trace};

/// What one cross-check means, for people.
pub(super) fn cross_check_lines(check: &CrossCheck) -> String {
    let [candle, wide, run] = check.losses;
    let mut sorted: Vec<f64> = check.tensors.iter().map(|t| t.relative_l2).collect();
    sorted.sort_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    let (worst, name) = check.worst().map_or((0.0, "-"), |t| (t.relative_l2, t.name.as_str()));
    let precision = check.tensors.iter().map(|t| t.precision_l2).fold(0.0, f64::max);
    let meaning = if check.agrees() {
        "the arithmetic of the replay is confirmed: what parts it from the log lies in the run"
    } else {
        "the two implementations disagree: do not trust this replay, and report the model"
    };
    format!(
        "\ncross-check of step {} (candle's autograd, f32, same state and rows): loss {candle:.7} and {wide:.7}; {} \
         gradients, relative L2 difference {:.1e} together (rounding: up to {:.1e}), {median:.1e} in the median, \
         {worst:.1e} at most ({name}): {meaning}\nthe run's precision gives loss {run:.7} and moves the \
         gradients by up to {precision:.1e}\n",
        check.step,
        check.tensors.len(),
        check.relative_l2,
        check.allowed,
    )
}

/// One line a step: replayed against logged.
pub(super) fn table(trace: &Trace, certificate: &Certificate, corpus: &Corpus) -> String {
    let mut text =
        String::from("  step        loss      logged   deviation   grad_norm      logged   deviation  learning rate\n");
    for step in &trace.steps {
        let comparison = certificate.comparisons.iter().find(|c| c.step == step.step);
        let logged = comparison.map(|c| &c.logged);
        let mark = match comparison {
            Some(c) if !c.agrees => "≠",
            Some(c) if c.after_bump => "~", // in the band, or with no band to compare
            Some(_) => "=",
            None => " ",
        };
        let _ = writeln!(
            text,
            "{mark} {:>4} {:>11} {:>11} {:>11} {:>11} {:>11} {:>11}  {:<9.3e} {}",
            step.step,
            value(Some(step.loss_logged.unwrap_or(step.loss))),
            value(logged.and_then(|l| l.loss)),
            deviation(comparison.and_then(|c| c.loss_rel)),
            value(Some(step.grad_norm)),
            value(logged.and_then(|l| l.grad_norm)),
            deviation(comparison.and_then(|c| c.grad_norm_rel)),
            step.learning_rate,
            remarks(step, comparison),
        );
    }
    text.push_str(&spike_lines(trace, certificate, corpus));
    text.push_str(&verdict(certificate));
    text
}

fn value(x: Option<f64>) -> String {
    match x {
        None => "-".to_owned(),
        Some(x) if x != 0.0 && (x.abs() < 1e-3 || x.abs() >= 1e5) => format!("{x:.4e}"),
        Some(x) => format!("{x:.6}"),
    }
}

fn deviation(x: Option<f64>) -> String {
    x.map_or_else(|| "-".to_owned(), |x| format!("{x:.1e}"))
}

fn remarks(step: &StepRecord, comparison: Option<&Comparison>) -> String {
    let mut all = Vec::new();
    if step.skipped {
        all.push("skipped".to_owned());
    }
    if step.nonfinite > 0 {
        all.push(format!("{} non-finite", step.nonfinite));
    }
    let leaked = step.micro_batches.iter().filter(|m| m.leaked).count();
    if leaked > 0 {
        all.push(format!("{leaked} leaked in"));
    }
    if comparison.is_some_and(|c| c.learning_rate_exact == Some(false)) {
        let logged = comparison.and_then(|c| c.logged.learning_rate);
        all.push(format!("learning rate logged {}", value(logged)));
    }
    if let Some(band) = comparison.filter(|c| c.after_bump).and_then(|c| c.band) {
        all.push(format!("replays {} to {}", value(Some(band.loss.0)), value(Some(band.loss.1))));
    }
    all.join(", ")
}

/// The micro-batches of the first bump.
fn spike_lines(trace: &Trace, certificate: &Certificate, corpus: &Corpus) -> String {
    let Some(step) = certificate.bump_at.and_then(|b| trace.steps.iter().find(|s| s.step == b)) else {
        return String::new();
    };
    let mut text = format!("\nmicro-batches of step {}, where the logged loss first jumps:\n", step.step);
    for micro in &step.micro_batches {
        let rows: Vec<String> = micro
            .rows
            .iter()
            .map(|r| format!("{}:{}", corpus.datasets.get(usize::from(r.dataset)).map_or("?", |d| &d.name), r.row))
            .collect();
        let _ = writeln!(
            text,
            "  mean loss {:>9}  grad_norm {:>10}  {:>5} labels  {}",
            value(Some(micro.mean_loss)),
            value(Some(micro.grad_norm)),
            micro.label_tokens,
            rows.join(" "),
        );
    }
    text
}

fn verdict(certificate: &Certificate) -> String {
    let Certificate { from, to, loss_max_rel, grad_norm_max_rel, .. } = certificate;
    let line = match (certificate.verdict, certificate.departs_at) {
        (Reproduction::NoLog, _) => format!("steps {from} to {to}: nothing logged to compare with"),
        (_, Some(step)) => format!("steps {from} to {to}: departs from the log at step {step}"),
        (_, None) => format!("steps {from} to {to}: the log is reproduced"),
    };
    let exact = match certificate.exact_to {
        Some(step) if step == *to => "; every logged number is the replay's to the last bit".to_owned(),
        Some(step) => format!("; up to step {step} every logged number is the replay's to the last bit"),
        None => String::new(),
    };
    let line_until = match certificate.bump_at {
        Some(bump) => format!(" before the jump at step {bump}"),
        None => String::new(),
    };
    let Envelope { loss, grad_norm } = certificate.envelope;
    match certificate.verdict {
        Reproduction::NoLog => format!("\n{line}\n"),
        _ => {
            // What differs from the first step on is no event of the run.
            let hint = match certificate.departs_at {
                Some(1) => {
                    "try: `spikeprobe inspect RUN --confirm` tells whether another trainer version's rules give the \
                     logged losses; also compare model, data and configuration with those of the run\n"
                }
                _ => "",
            };
            format!(
                "\n{line}{exact}; largest deviation{line_until}: loss {loss_max_rel:.1e} (allowed {loss:.1e}), \
                 grad_norm {grad_norm_max_rel:.1e} (allowed {grad_norm:.1e})\n{hint}"
            )
        }
    }
}
