//! Experiments, certificate, rows and findings.

use std::fmt::Write as _;

use super::words::{certificate_line, changes_line, plain};
use super::{RowText, View, ranges};
use crate::diagnosis::{Experiment, Finding, RowBlame};
use crate::report::html::escape;
use crate::report::html::table::{Content, Table};
use crate::report::{number, percent};
use crate::run::LogRow;

/// Every replay that was run, and what became of the spike.
pub fn experiments(view: &View) -> String {
    let highest = view.diagnosis.experiments.iter().map(|e| e.height).filter(|h| h.is_finite()).fold(0.0, f64::max);
    let row = |e: &Experiment| {
        let (class, word) = match (e.changes.is_empty(), e.removed) {
            (true, _) => ("plain", "unchanged"),
            (false, true) => ("good", "gone"),
            (false, false) => ("bad", "stays"),
        };
        vec![
            Content::Text(e.name.clone()),
            Content::Code(changes_line(&e.changes)),
            Content::Bar(if highest > 0.0 { e.height / highest } else { 0.0 }, number(e.height)),
            Content::Badge(class, word.into()),
            Content::Text(e.cause.map_or(String::new(), |c| plain(c.word()))),
            Content::Number(e.windows.to_string()),
        ]
    };
    let header = vec!["experiment", "change", "height of the spike", "spike", "speaks of", "steps"];
    Table { header, rows: view.diagnosis.experiments.iter().map(row).collect() }.render()
}

/// Log against replay, digit by digit, around the spike.
pub fn certificate(view: &View) -> String {
    let Some(summary) = &view.diagnosis.certificate else { return String::new() };
    let centre = view.spike().map_or(summary.to, |s| s.step);
    let row = |step: &crate::replay::StepRecord| {
        let logged = view.log.iter().find(|r| r.step == step.step && r.window == 1)?;
        let pair = |logged: Option<f64>, replayed: f64| {
            [Content::Number(logged.map_or("–".into(), digits)), Content::Number(digits(replayed))]
        };
        let mut cells = vec![Content::Number(step.step.to_string())];
        cells.extend(pair(logged.loss, step.loss));
        cells.push(Content::Number(difference(logged.loss, step.loss)));
        cells.extend(pair(logged.grad_norm, step.grad_norm));
        cells.push(Content::Number(difference(logged.grad_norm, step.grad_norm)));
        Some(cells)
    };
    let near = view.baseline.iter().filter(|s| s.step + 8 >= centre && s.step <= centre + 3);
    let header = vec!["step", "loss logged", "replayed", "difference", "grad_norm logged", "replayed", "difference"];
    let table = Table { header, rows: near.filter_map(row).collect() };
    format!("<p>{}.</p>{}", escape(&certificate_line(summary)), table.render())
}

fn digits(value: f64) -> String {
    if value.is_finite() && (1e-3..1e5).contains(&value.abs()) { format!("{value:.6}") } else { number(value) }
}

fn difference(logged: Option<f64>, replayed: f64) -> String {
    match logged {
        None => "–".into(),
        Some(l) if l.is_nan() && replayed.is_nan() => "both NaN".into(),
        Some(l) if l == replayed => "0".into(),
        Some(l) if l == 0.0 || !l.is_finite() || !replayed.is_finite() => "differs".into(),
        Some(l) => number((replayed - l).abs() / l.abs()),
    }
}

/// Most characters of one row's text: enough to recognise it, little enough for the page.
const ROW_TEXT: usize = 3000;

/// The blamed rows with their text.
pub fn rows(view: &View) -> String {
    view.diagnosis.rows.iter().take(20).map(|blame| row(blame, view.rows)).collect()
}

fn row(blame: &RowBlame, texts: &[RowText]) -> String {
    let tokens = blame.tokens.map_or(String::new(), |(from, to)| format!(", tokens {from}–{to}"));
    let mut out = format!(
        "<div class=\"row\"><h3>{}, row {} — step {}, micro-batch {}{tokens}</h3><p>{}</p>",
        escape(&blame.dataset),
        blame.row,
        blame.step,
        blame.micro_batch,
        escape(&blame.reason)
    );
    let text = texts.iter().find(|t| t.row == blame.row && t.dataset == blame.dataset);
    let mut left = ROW_TEXT;
    let mut field = "";
    for piece in text.iter().flat_map(|t| &t.pieces) {
        if piece.field != field {
            out.push_str(if field.is_empty() { "" } else { "</pre>" });
            let _ = write!(out, "<h3>{}</h3><pre>", escape(&piece.field));
            field = &piece.field;
        }
        let shown: String = piece.text.chars().take(left).collect();
        let cut = shown.len() < piece.text.len();
        left -= shown.chars().count();
        let (open, close) = if piece.blamed { ("<mark>", "</mark>") } else { ("", "") };
        let _ = write!(out, "{open}{}{}{close}", escape(&shown), if cut { " …" } else { "" });
    }
    out.push_str(if field.is_empty() { "</div>\n" } else { "</pre></div>\n" });
    out
}

/// Remarks of log forensics, lint and evaluation; errors first.
pub fn findings(view: &View) -> String {
    let mut findings: Vec<&Finding> = view.diagnosis.findings.iter().collect();
    let rank = |f: &&Finding| ["error", "warning", "note"].iter().position(|s| *s == f.severity).unwrap_or(3);
    findings.sort_by_key(rank);
    let mut out = String::new();
    for finding in findings.iter().take(60) {
        let class = ["bad", "warn", "plain", "plain"][rank(finding)];
        let _ = write!(
            out,
            "<li><span class=\"badge {class}\">{}</span>{} <small><code>{}</code> {}</small></li>",
            escape(&finding.severity),
            escape(&finding.message),
            escape(&finding.code),
            escape(&finding.place)
        );
    }
    if out.is_empty() { out } else { format!("<ul class=\"findings\">{out}</ul>") }
}

/// Sites the diagnosis names, then those with the least room.
pub fn sites(view: &View) -> String {
    let mut out = String::new();
    for site in view.diagnosis.sites.iter().take(12) {
        let _ =
            write!(out, "<p><code>{}</code> at step {}: {}</p>", escape(&site.site), site.step, escape(&site.message));
    }
    for pass in [ranges::Pass::Forward, ranges::Pass::Backward] {
        out.push_str(&ranges::map(view.ranges, pass).map_or(String::new(), |map| map.render()));
    }
    let worst = ranges::worst(view.ranges, 8);
    let row = |range: &&ranges::SiteRange| {
        let [name, pass, rest @ ..] = ranges::row(range);
        let mut cells = vec![Content::Code(name), Content::Text(pass)];
        cells.extend(rest.map(Content::Number));
        cells
    };
    let header = vec!["site", "pass", "largest value", "headroom (binades)", "beyond", "underflow"];
    out + &Table { header, rows: worst.iter().map(row).collect() }.render()
}

/// Every spike of the log when there are several.
pub fn spikes(view: &View) -> String {
    if view.diagnosis.spikes.len() < 2 {
        return String::new();
    }
    let row = |s: &crate::diagnosis::Spike| {
        vec![
            Content::Number(s.step.to_string()),
            Content::Text(super::words::spike_line(s)),
            Content::Number(number(s.height)),
            Content::Text(plain(s.verdict.cause.word())),
            Content::Text(s.verdict.summary.clone()),
        ]
    };
    let rows = view.diagnosis.spikes.iter().take(40).map(row).collect();
    Table { header: vec!["step", "what", "height", "cause", "why"], rows }.render()
}

/// Evaluation-free span of the log in words.
pub fn log_span(log: &[LogRow]) -> String {
    match (log.first(), log.last()) {
        (Some(first), Some(last)) => format!("steps {}–{}, {} rows", first.step, last.step, log.len()),
        _ => "no log".into(),
    }
}

/// Parts of the height by cause.
pub fn shares(view: &View) -> String {
    let mut shares: Vec<(&String, f64)> =
        view.diagnosis.shares.iter().map(|(k, v)| (k, *v)).filter(|s| s.1.is_finite() && s.1 > 0.0).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    if shares.is_empty() {
        return String::new();
    }
    let (mut bar, mut keys) = (String::new(), String::new());
    for (i, (cause, share)) in shares.iter().enumerate() {
        let colour = i % 6;
        let _ = write!(bar, "<i class=\"k{colour}\" style=\"flex:{share:.4}\"></i>");
        let _ = write!(
            keys,
            "<span><i class=\"k{colour}\"></i>{} <b>{}</b></span>",
            escape(&plain(cause)),
            percent(*share)
        );
    }
    format!("<div class=\"sharebar\">{bar}</div><div class=\"shares\">{keys}</div>")
}
