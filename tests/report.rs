//! The HTML page and the terminal text on a made-up diagnosis: complete, safe, small, one file.
//!
//! The pages are left in the build's temporary folder (`target/tmp/report-*.html`) to be looked at.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use spikeprobe::batches::RowId;
use spikeprobe::diagnosis::*;
use spikeprobe::replay::{MicroRecord, StepRecord};
use spikeprobe::report::page::{Pass, Piece, RowText, SiteRange, View};
use spikeprobe::report::terminal::Style;
use spikeprobe::run::LogRow;

const SPIKE: u64 = 22;
const HOSTILE: &str = "<script>alert(1)</script> & \"quoted\" <img src=x onerror=y> https://example.org \u{1b}[31m";

/// Loss of a run that learns, jumps at the spike and recovers in part; deterministic wiggle.
fn loss(step: u64, spike: u64) -> f64 {
    let healthy = 0.05 + 3.0 * (-(step as f64) / 4.0).exp() + 0.004 * ((step * 7919 % 13) as f64 / 13.0);
    if step < spike { healthy } else { healthy + 7.6 * (-((step - spike) as f64) / 5.0).exp() }
}

fn log_row(step: u64, spike: u64) -> LogRow {
    LogRow {
        attempt: 0,
        step,
        window: 1,
        epoch: Some(step as f64 / 15.0),
        loss: Some(loss(step, spike)),
        grad_norm: Some(if step == spike + 3 { f64::NAN } else { 0.2 + loss(step, spike) * 3.0 }),
        learning_rate: Some(1e-3 * (1.0 - step as f64 / 60.0).max(0.0)),
        total_steps: Some(48),
        source: format!("trainer_log.jsonl:{step}"),
    }
}

fn record(step: u64) -> StepRecord {
    let micro = |i: u64| MicroRecord {
        rows: vec![RowId { dataset: 0, row: (step * 8 + i) as u32 }],
        tokens: 60,
        label_tokens: 20,
        loss: 0.01,
        mean_loss: if step == SPIKE && i == 3 { 9.1 } else { loss(step, SPIKE) * (0.8 + 0.05 * i as f64) },
        grad_norm: if step == SPIKE + 3 && i == 1 { f64::NAN } else { 0.1 + 0.02 * i as f64 },
        nonfinite: 0,
        leaked: false,
    };
    StepRecord {
        step,
        attempt: 0,
        epoch: step as f64 / 15.0,
        learning_rate: 1e-3 * (1.0 - step as f64 / 60.0),
        learning_rate_logged: 1e-3 * (1.0 - step as f64 / 60.0),
        loss: loss(step, SPIKE) * 1.000_02,
        loss_raw: loss(step, SPIKE),
        loss_logged: None,
        grad_norm: 0.2 + loss(step, SPIKE) * 3.0,
        clip_coefficient: 1.0,
        update_norm: 0.01,
        loss_scale: None,
        skipped: false,
        nonfinite: 0,
        micro_batches: (0..8).map(micro).collect(),
    }
}

fn experiment(name: &str, change: (&str, Value), height: f64, cause: Option<Cause>) -> Experiment {
    let removed = height < 2.4;
    let curve = |step: u64| CurvePoint { step, loss: loss(step, if removed { 999 } else { SPIKE }), grad_norm: 1.0 };
    Experiment {
        name: name.into(),
        changes: if change.0.is_empty() { BTreeMap::new() } else { [(change.0.to_owned(), change.1)].into() },
        height,
        removed: removed && !change.0.is_empty(),
        cause,
        windows: 12,
        curve: (13..=27).map(curve).collect(),
    }
}

fn diagnosis() -> Diagnosis {
    let verdict = Verdict {
        cause: Cause::Data,
        also_sufficient: vec![Cause::LearningRate],
        confidence: Confidence::Strong,
        harmful: true,
        summary:
            "Row 37 of train is garbage text. Without its labels the loss stays at 0.06 where the log jumps to 7.67; \
                  remove the row and train on."
                .into(),
    };
    let spike = Spike {
        step: SPIKE,
        until: 30,
        kind: SpikeKind::Jump,
        before: Some(0.0628),
        at: 7.67,
        height: 4.8,
        verdict: verdict.clone(),
    };
    Diagnosis {
        schema: SCHEMA.into(),
        spikes: vec![spike],
        verdict,
        shares: [("data".into(), 0.93), ("learning_rate".into(), 0.06), ("gradient_clipping".into(), 0.01)].into(),
        rows: vec![RowBlame {
            dataset: "train".into(),
            row: 37,
            micro_batch: 3,
            step: SPIKE,
            tokens: Some((14, 160)),
            reason: "98 % of the window's gradient; its loss is 9.1 where its neighbours have 0.06".into(),
        }],
        sites: vec![],
        experiments: vec![
            experiment("as trained", ("", Value::Null), 4.8, None),
            experiment("without row 37", ("neutralise_rows", json!("train:37")), 0.02, Some(Cause::Data)),
            experiment("learning rate ÷ 10", ("learning_rate", json!(1e-4)), 1.9, Some(Cause::LearningRate)),
            experiment("in fp32", ("precision", json!("fp32")), 4.79, Some(Cause::Bf16Rounding)),
            experiment("clipped at 0.1", ("max_grad_norm", json!(0.1)), 4.5, Some(Cause::GradientClipping)),
        ],
        fix: Some(Fix {
            changes: [("dataset".to_owned(), json!("train_without_37"))].into(),
            height: 0.02,
            checked_steps: 16,
            note: Some("Dropping a row changes n and with it the order of all rows.".into()),
        }),
        fault: None,
        certificate: Some(CertificateSummary {
            verdict: "reproduced".into(),
            from: 13,
            to: 27,
            departs_at: None,
            loss_max_rel: 2e-5,
            grad_norm_max_rel: 3e-4,
            envelope: Envelope { loss: 1e-3, grad_norm: 1e-2 },
        }),
        findings: vec![
            Finding {
                code: "eval_strategy_no".into(),
                severity: "warning".into(),
                message: "val_size splits rows off, but eval_strategy is `no`: eval_loss is never computed".into(),
                place: "train.yaml: val_size".into(),
            },
            Finding { code: "x".into(), severity: "note".into(), message: HOSTILE.into(), place: HOSTILE.into() },
        ],
        windows_replayed: 36,
        cost: spikeprobe::diagnosis::Cost { limit: 40, baseline: 33, experiments: 36, proof: 12, cached: 0 },
    }
}

fn ranges(layers: usize) -> Vec<SiteRange> {
    let kinds = [
        "input_layernorm output",
        "self_attn.q_proj output",
        "self_attn scores",
        "mlp.gate_proj output",
        "mlp.down_proj input",
    ];
    let mut out = Vec::new();
    for layer in 0..layers {
        for (k, kind) in kinds.iter().enumerate() {
            for pass in [Pass::Forward, Pass::Backward] {
                let hot = layer == 1 && k == 4 && pass == Pass::Forward;
                out.push(SiteRange {
                    layer: Some(layer),
                    kind: (*kind).into(),
                    pass,
                    max_abs: if hot { 9e4 } else { 2f64.powi((k * 3 + layer % 4) as i32) },
                    limit: 65504.0,
                    overflow: if hot { 12 } else { 0 },
                    inherited: if layer > 1 && k == 4 && pass == Pass::Forward { 12 } else { 0 },
                    underflow_share: 1e-4,
                });
            }
        }
    }
    out
}

fn row_text() -> RowText {
    let piece = |field: &str, text: &str, blamed| Piece { field: field.into(), text: text.into(), blamed };
    RowText {
        dataset: "train".into(),
        row: 37,
        pieces: vec![
            piece("user", "What is the capital of France?", false),
            piece("assistant", HOSTILE, true),
            piece("assistant", &"\u{7fff}\u{1f4a9}ঙ漢".repeat(2000), true),
        ],
    }
}

/// Renders, and leaves the page to be looked at.
fn page(name: &str, view: &View) -> String {
    let html = view.html();
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("report-{name}.html"));
    spikeprobe::output::write_text(&path, &html).expect("temporary folder is writable");
    html
}

fn typical(check: impl FnOnce(&View)) {
    let (diagnosis, rows, ranges) = (diagnosis(), [row_text()], ranges(4));
    let log: Vec<LogRow> = (1..=48).map(|s| log_row(s, SPIKE)).collect();
    let baseline: Vec<StepRecord> = (13..=30).map(record).collect();
    let fact = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    check(&View {
        name: "runs/my run/train.yaml".into(),
        facts: vec![
            fact("model", "tiny-llama"),
            fact("precision", "bf16"),
            fact("learning_rate", "1e-3"),
            fact("device", "cpu"),
        ],
        diagnosis: &diagnosis,
        log: &log,
        baseline: &baseline,
        ranges: &ranges,
        rows: &rows,
    });
}

/// Every element closed in order, every attribute quoted; returns the names of all elements and attributes.
fn well_formed(html: &str) -> Vec<String> {
    let body = html.strip_prefix("<!DOCTYPE html>").expect("doctype");
    let (mut open, mut names) = (Vec::<&str>::new(), Vec::new());
    let mut rest = body;
    while let Some(start) = rest.find('<') {
        assert!(
            !rest[..start].contains('>') || open.last() == Some(&"style"),
            "stray > before {}",
            &rest[..start.min(80)]
        );
        let end = start + rest[start..].find('>').expect("tag ends");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed out of order");
            continue;
        }
        let name = tag.split([' ', '/']).next().expect("name");
        names.push(name.to_owned());
        let attributes = tag[name.len()..].trim_end_matches('/');
        let quotes: Vec<&str> = attributes.split('"').collect();
        assert_eq!(quotes.len() % 2, 1, "unbalanced quotes in <{tag}>");
        names.extend(
            quotes.iter().step_by(2).filter(|s| s.contains('=')).map(|s| s.trim().trim_end_matches('=').to_owned()),
        );
        if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "never closed: {open:?}");
    names
}

#[test]
fn a_page_is_well_formed_and_asks_the_network_for_nothing() {
    typical(|view| {
        let html = page("typical", view);
        let names = well_formed(&html);
        for forbidden in ["script", "link", "img", "iframe", "object", "src", "href", "onerror", "onload", "@import"] {
            assert!(!names.iter().any(|n| n == forbidden), "{forbidden}");
        }
        let css = &html[html.find("<style>").expect("style")..html.find("</style>").expect("style")];
        assert!(!css.contains("url(") && !css.contains("@import"));
        assert!(html.contains("default-src 'none'"));
    });
}

#[test]
fn a_page_says_cause_evidence_and_change_before_anything_else() {
    typical(|view| {
        let html = view.html();
        let head = &html[html.find("<body>").expect("body")..html.find("<figure").expect("charts")];
        for text in
            ["Bad rows in the dataset", "0.06276 → 7.67", "without row 37", "dataset: train_without_37", "strong"]
        {
            let text = text.replace("0.06276", "0.0628");
            assert!(head.contains(&text), "{text} not in the headline");
        }
        for section in [
            "Log and replay",
            "One thing changed",
            "Shares",
            "Rows behind it",
            "Micro-batches",
            "Number ranges",
            "Experiments",
            "Certificate",
            "Findings",
        ] {
            assert!(html.contains(&format!("<h2>{section}")), "{section}");
        }
    });
}

#[test]
fn rows_and_log_text_are_shown_and_never_become_markup() {
    typical(|view| {
        let html = view.html();
        assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;"));
        assert!(!html.contains("<script") && !html.contains("<img") && !html.contains('\u{1b}'));
        let text = view.terminal(Style { color: false, width: 80 });
        assert!(!text.contains('\u{1b}'), "{text}");
    });
}

#[test]
fn non_finite_values_are_marked_and_the_spike_is_labelled() {
    typical(|view| {
        let html = view.html();
        assert!(html.contains("step 25: logged is NaN"));
        assert!(html.contains("spike, step 22"));
        assert!(html.contains("micro-batch 3"), "cells carry their micro-batch");
    });
}

#[test]
fn a_log_of_fifty_thousand_rows_gives_a_small_page_that_keeps_the_spike() {
    let mut diagnosis = diagnosis();
    diagnosis.spikes[0].step = 31_234;
    let log: Vec<LogRow> = (1..=50_000).map(|s| log_row(s, 31_234)).collect();
    let baseline: Vec<StepRecord> = (31_100..31_300).map(record).collect();
    let (ranges, rows) = (ranges(48), [row_text()]);
    let view = View {
        name: "long".into(),
        facts: vec![],
        diagnosis: &diagnosis,
        log: &log,
        baseline: &baseline,
        ranges: &ranges,
        rows: &rows,
    };
    let html = page("long", &view);
    well_formed(&html);
    assert!(html.len() < 1_500_000, "{} bytes", html.len());
    assert!(html.contains("Loss, whole log") && html.contains("Loss, close-up"));
}

#[test]
fn a_healthy_run_and_an_empty_one_have_pages_too() {
    let mut diagnosis = diagnosis();
    diagnosis.spikes.clear();
    diagnosis.shares.clear();
    diagnosis.rows.clear();
    diagnosis.experiments.clear();
    diagnosis.fix = None;
    diagnosis.verdict = Verdict {
        cause: Cause::None,
        also_sufficient: vec![],
        confidence: Confidence::Strong,
        harmful: false,
        summary: "No spike in 48 logged steps.".into(),
    };
    let log: Vec<LogRow> = (1..=48).map(|s| log_row(s, 999)).collect();
    let mut view = View {
        name: "healthy".into(),
        facts: vec![],
        diagnosis: &diagnosis,
        log: &log,
        baseline: &[],
        ranges: &[],
        rows: &[],
    };
    let html = page("healthy", &view);
    well_formed(&html);
    assert!(html.contains("No spike") && html.contains("<li>Nothing.</li>"));
    view.log = &[];
    well_formed(&view.html());
    assert!(view.terminal(Style::plain(60)).starts_with("No spike\n"));
}

#[test]
fn the_terminal_summary_fits_a_screen_and_its_width() {
    typical(|view| {
        let text = view.terminal(Style::plain(80));
        println!("{text}");
        assert!(text.lines().count() <= 30, "{text}");
        assert!(text.lines().all(|l| l.chars().count() <= 80), "{text}");
        let first: Vec<&str> = text.lines().take(3).collect();
        assert_eq!(first[0], "Bad rows in the dataset");
        assert!(first[1].starts_with("step 22: loss 0.0628 → 7.67"), "{first:?}");
        assert!(text.contains("Change  dataset: train_without_37"), "{text}");
        assert!(view.terminal(Style { color: true, width: 80 }).contains("\u{1b}[1;31m"));
    });
}
