//! The curves and maps of a diagnosis: log against replay, counterfactuals, micro-batches.

use super::View;
use super::words::changes_line;
use crate::diagnosis::Experiment;
use crate::replay::{MicroRecord, StepRecord};
use crate::report::html::heat::{Cell, HeatMap};
use crate::report::html::line::{Line, LineChart, Stroke};
use crate::report::{number, percent};
use crate::run::LogRow;

/// Logs longer than this get an overview and a close-up of the replayed steps.
const CLOSE_UP: usize = 400;

type Points = Vec<(f64, f64)>;

/// Everything of the log: loss only where a close-up follows, else loss, grad_norm and learning rate.
pub fn curves(view: &View) -> String {
    if view.log.len() <= CLOSE_UP {
        return trio(view, 0, u64::MAX, "");
    }
    let mut overview = chart(view, "Loss, whole log", true, view.log, &[], |r| r.loss, |s| s.loss);
    overview.band = None;
    let (from, to) = focus(view);
    overview.render() + &trio(view, from, to, ", close-up")
}

/// Steps worth a close-up: what was replayed, or around the spike.
fn focus(view: &View) -> (u64, u64) {
    if let (Some(first), Some(last)) = (view.baseline.first(), view.baseline.last()) {
        return (first.step.saturating_sub(10), last.step + 10);
    }
    let centre = view.spike().map_or(0, |s| s.step);
    (centre.saturating_sub(100), centre + 50)
}

fn trio(view: &View, from: u64, to: u64, suffix: &str) -> String {
    let log: Vec<LogRow> = view.log.iter().filter(|r| r.step >= from && r.step <= to).cloned().collect();
    let title = |name: &str| format!("{name}{suffix}");
    let steps = view.baseline;
    let loss = chart(view, &title("Loss"), true, &log, steps, |r| r.loss, |s| s.loss);
    let norm =
        chart(view, &title("Gradient norm before clipping"), true, &log, steps, |r| r.grad_norm, |s| s.grad_norm);
    let mut rate =
        chart(view, &title("Learning rate"), false, &log, steps, |r| r.learning_rate, |s| s.learning_rate_logged);
    rate.band = None;
    [loss, norm, rate].iter().map(LineChart::render).collect()
}

fn chart(
    view: &View,
    title: &str,
    log_scale: bool,
    log: &[LogRow],
    steps: &[StepRecord],
    logged: impl Fn(&LogRow) -> Option<f64>,
    replayed: impl Fn(&StepRecord) -> f64,
) -> LineChart {
    let points: Points = log.iter().filter_map(|r| logged(r).map(|v| (r.step as f64, v))).collect();
    let replay: Points = steps.iter().map(|s| (s.step as f64, replayed(s))).collect();
    let is_norm = title.starts_with("Gradient");
    let envelope =
        view.diagnosis.certificate.as_ref().map(|c| if is_norm { c.envelope.grad_norm } else { c.envelope.loss });
    let band = envelope.filter(|e| e.is_finite() && !replay.is_empty()).map(|e| {
        let spread = replay.iter().map(|p| (p.0, p.1 * (1.0 - e).max(0.0), p.1 * (1.0 + e))).collect();
        (format!("honest arithmetic, ±{}", percent(e)), spread)
    });
    let mut lines = vec![Line { name: "logged".into(), stroke: Stroke::Logged, points }];
    if !replay.is_empty() {
        lines.push(Line { name: "replayed".into(), stroke: Stroke::Replayed, points: replay });
    }
    lines.retain(|l| !l.points.is_empty());
    LineChart {
        title: title.into(),
        log: log_scale,
        band,
        lines,
        mark: view.spike().map(|s| (s.step as f64, format!("spike, step {}", s.step))),
        ..LineChart::default()
    }
}

/// One small chart an experiment, the unchanged run in grey behind it; those that removed the spike first.
pub fn counterfactuals(view: &View) -> String {
    let unchanged: Points = if view.baseline.is_empty() {
        view.log.iter().filter_map(|r| r.loss.map(|v| (r.step as f64, v))).collect()
    } else {
        view.baseline.iter().map(|s| (s.step as f64, s.loss)).collect()
    };
    let mut experiments: Vec<&Experiment> =
        view.diagnosis.experiments.iter().filter(|e| !e.changes.is_empty() && !e.curve.is_empty()).collect();
    experiments.sort_by_key(|e| !e.removed);
    let panels: String = experiments.iter().take(12).map(|e| panel(view, e, &unchanged)).collect();
    if panels.is_empty() { panels } else { format!("<div class=\"multiples\">{panels}</div>") }
}

fn panel(view: &View, experiment: &Experiment, unchanged: &Points) -> String {
    let changed: Points = experiment.curve.iter().map(|p| (p.step as f64, p.loss)).collect();
    let (first, last) = (changed.first().map_or(0.0, |p| p.0), changed.last().map_or(0.0, |p| p.0));
    let behind = unchanged.iter().filter(|p| p.0 >= first && p.0 <= last).copied().collect();
    let colour = if experiment.removed { Stroke::Colour(2) } else { Stroke::Colour(1) };
    let chart = LineChart {
        title: experiment.name.clone(),
        log: true,
        small: true,
        lines: vec![
            Line { name: "unchanged".into(), stroke: Stroke::Logged, points: behind },
            Line { name: experiment.name.clone(), stroke: colour, points: changed },
        ],
        mark: view.spike().map(|s| (s.step as f64, String::new())),
        ..LineChart::default()
    };
    let (class, word) = if experiment.removed { ("good", "spike gone") } else { ("bad", "spike stays") };
    format!(
        "<div>{}<p class=\"note\"><span class=\"badge {class}\">{word}</span> <code>{}</code></p></div>",
        chart.render(),
        crate::report::html::escape(&changes_line(&experiment.changes))
    )
}

/// Widest window of steps a micro-batch map shows, and most rows before micro-batches are grouped.
const MAP_STEPS: usize = 60;
const MAP_ROWS: usize = 48;

/// Micro-batch × step around the spike: mean loss, and the norm of each one's own gradient.
pub fn micro_maps(view: &View) -> String {
    let centre = view.spike().map_or(0, |s| s.step);
    let nearest = view.baseline.iter().position(|s| s.step >= centre).unwrap_or(view.baseline.len());
    let last = (nearest + MAP_STEPS / 3).min(view.baseline.len());
    let steps = &view.baseline[last.saturating_sub(MAP_STEPS)..last];
    if steps.iter().all(|s| s.micro_batches.is_empty()) {
        return String::new();
    }
    let loss = micro_map(view, steps, "Loss of each micro-batch", "mean over its label tokens", |m| m.mean_loss);
    let norm = micro_map(view, steps, "Gradient of each micro-batch", "norm of its own contribution", |m| m.grad_norm);
    loss.render() + &norm.render()
}

fn micro_map(
    view: &View,
    steps: &[StepRecord],
    title: &str,
    unit: &str,
    value: impl Fn(&MicroRecord) -> f64,
) -> HeatMap {
    let count = steps.iter().map(|s| s.micro_batches.len()).max().unwrap_or(0);
    let group = count.div_ceil(MAP_ROWS).max(1);
    let rows: Vec<usize> = (0..count).step_by(group).collect();
    let name = |first: &usize| {
        if group == 1 { first.to_string() } else { format!("{first}–{}", (first + group - 1).min(count - 1)) }
    };
    let cells = rows.iter().map(|first| {
        steps.iter().map(|step| micro_cell(view, step, *first..(first + group), &value)).collect::<Vec<_>>()
    });
    HeatMap {
        title: title.into(),
        unit: format!("{unit}, log scale"),
        row_name: "micro-batch".into(),
        column_name: "step".into(),
        columns: steps.iter().map(|s| s.step.to_string()).collect(),
        cells: cells.collect(),
        rows: rows.iter().map(name).collect(),
        log: true,
        ..HeatMap::default()
    }
}

/// The worst micro-batch of a group: not finite before large.
fn micro_cell(
    view: &View,
    step: &StepRecord,
    range: std::ops::Range<usize>,
    value: impl Fn(&MicroRecord) -> f64,
) -> Cell {
    let rank = |m: &MicroRecord| if value(m).is_finite() { value(m) } else { f64::INFINITY };
    let group = step.micro_batches.iter().enumerate().filter(|(i, _)| range.contains(i));
    let Some((index, micro)) = group.max_by(|a, b| rank(a.1).total_cmp(&rank(b.1))) else {
        return Cell::default();
    };
    let rows: Vec<String> = micro.rows.iter().map(|r| format!("{}:{}", r.dataset, r.row)).collect();
    Cell {
        value: Some(value(micro)),
        title: format!(
            "step {}, micro-batch {index}\n{}, {} label tokens\nrows {}",
            step.step,
            number(value(micro)),
            micro.label_tokens,
            rows.join(", ")
        ),
        marked: view.diagnosis.rows.iter().any(|r| r.step == step.step && range.contains(&r.micro_batch)),
        ..Cell::default()
    }
}
