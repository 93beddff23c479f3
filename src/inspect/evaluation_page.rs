//! The evaluations of a run for people: a table for the terminal, and a page with the curve beside the training loss.
//!
//! What is evaluated, and how, is [`super::evaluate`]'s.

use std::fmt::Write as _;

use super::evaluate::{Evaluation, metric};
use crate::replay::Scene;
use crate::report::html::line::{Line, LineChart, Stroke};
use crate::report::html::table::{Content, Table};
use crate::report::html::{Document, escape};

/// One line an evaluation, set by set.
pub fn table(scene: &Scene, points: &[Evaluation]) -> String {
    let mut text = String::new();
    let batch = scene.run.config.per_device_eval_batch_size;
    for (set, rows) in &scene.corpus.eval {
        let own: Vec<&Evaluation> = points.iter().filter(|point| point.set == *set).collect();
        let _ = writeln!(text, "{} over {} rows in batches of {batch}", metric(set), rows.len());
        let _ = writeln!(text, "{:>6} {:>11} {:>11} {:>11}  adapter", "step", "computed", "logged", "deviation");
        for point in &own {
            let logged = point.logged.map_or_else(|| "-".into(), |value| format!("{value:.6}"));
            let deviation = point.deviation().map_or_else(|| "-".into(), |value| format!("{value:.1e}"));
            let _ =
                write!(text, "{:>6} {:>11.6} {logged:>11} {deviation:>11}  {}", point.step, point.loss, origin(point));
            if point.unlabelled_rows > 0 {
                let _ = write!(text, "  ({} rows in batches without a label)", point.unlabelled_rows);
            }
            text.push('\n');
        }
        if let (Some(best), true) = (lowest(&own), own.len() > 1) {
            let _ = writeln!(text, "lowest at step {}: {:.6}", best.step, best.loss);
        }
        text.push('\n');
    }
    text
}

fn origin(point: &Evaluation) -> &'static str {
    if point.from_checkpoint { "checkpoint" } else { "replayed" }
}

fn lowest<'a>(points: &[&'a Evaluation]) -> Option<&'a Evaluation> {
    let finite = points.iter().filter(|point| point.loss.is_finite());
    finite.min_by(|a, b| a.loss.total_cmp(&b.loss)).copied()
}

/// The curve of every set over the training loss of the log, and the numbers.
pub fn html(scene: &Scene, points: &[Evaluation]) -> String {
    let run = scene.run.config_path.display().to_string();
    let mut page = Document::new(&format!("{run} · eval · spikeprobe"));
    page.push(&format!(
        "<header class=\"top\"><span><b>{}</b></span><span>spikeprobe {} · {} evaluations</span></header>",
        escape(&run),
        env!("CARGO_PKG_VERSION"),
        points.len()
    ));
    page.push(&headline(scene, points));
    let lead = "The mean over evaluation batches of their token means, as the trainer computes it. A training loss that \
                goes on falling while this one rises is memorising.";
    page.section("The curve", lead, &chart(scene, points).render());
    page.section("Every evaluation", "", &numbers(points).render());
    page.push("<footer>This file makes no network requests.</footer>");
    page.finish()
}

fn headline(scene: &Scene, points: &[Evaluation]) -> String {
    let mut said = String::new();
    for (set, rows) in scene.corpus.eval.iter().filter(|(_, rows)| !rows.is_empty()) {
        let own: Vec<&Evaluation> = points.iter().filter(|point| point.set == *set).collect();
        let Some(best) = lowest(&own) else { continue };
        let last = own[own.len() - 1];
        let at = match best.step == last.step {
            true => format!("lowest at the last, step {}: {:.4}", best.step, best.loss),
            false => format!("lowest at step {}: {:.4}; {:.4} at step {}", best.step, best.loss, last.loss, last.step),
        };
        let _ = write!(said, "<li><code>{}</code> over {} rows: {at}</li>", escape(&metric(set)), rows.len());
    }
    let logged = points.iter().filter(|point| point.logged.is_some()).count();
    let worst = points.iter().filter_map(Evaluation::deviation).fold(0.0, f64::max);
    let word = match logged {
        0 => "None of it is in the log.".to_owned(),
        _ => format!("{logged} of {} are in the log; the largest deviation is {worst:.1e}.", points.len()),
    };
    format!(
        "<section class=\"headline plain\"><h1>The evaluation of this run</h1><p class=\"summary\">{}</p><ul>{said}</ul></section>",
        escape(&word)
    )
}

fn chart(scene: &Scene, points: &[Evaluation]) -> LineChart {
    let trained = scene.run.log.rows.iter().filter_map(|row| Some((row.step as f64, row.loss?))).collect();
    let mut lines = vec![Line { name: "training loss, logged".into(), stroke: Stroke::Logged, points: trained }];
    for (index, (set, _)) in scene.corpus.eval.iter().enumerate() {
        let own = || points.iter().filter(|point| point.set == *set);
        let colour = |offset| Stroke::Colour(u8::try_from((2 * index + offset) % 6).unwrap_or(0));
        let computed = own().map(|point| (point.step as f64, point.loss)).collect();
        let logged = own().filter_map(|point| Some((point.step as f64, point.logged?))).collect();
        lines.push(Line { name: format!("{}, logged", metric(set)), stroke: colour(1), points: logged });
        lines.push(Line { name: format!("{}, computed", metric(set)), stroke: colour(0), points: computed });
    }
    lines.retain(|line| !line.points.is_empty());
    LineChart { title: "Loss".into(), log: true, lines, ..LineChart::default() }
}

fn numbers(points: &[Evaluation]) -> Table {
    let row = |point: &Evaluation| {
        let logged = point.logged.map_or_else(String::new, |value| format!("{value:.6}"));
        let deviation = point.deviation().map_or_else(String::new, |value| format!("{value:.1e}"));
        vec![
            Content::Number(point.step.to_string()),
            Content::Code(metric(&point.set)),
            Content::Number(format!("{:.6}", point.loss)),
            Content::Number(logged),
            Content::Number(deviation),
            Content::Text(origin(point).into()),
        ]
    };
    Table {
        header: vec!["step", "metric", "computed", "logged", "deviation", "adapter"],
        rows: points.iter().map(row).collect(),
    }
}
