//! The sweep's page: heat maps, frontier, curves.

use std::fmt::Write as _;

use super::{Panel, Sweep, verdict};
use crate::report::html::heat::{Cell as HeatCell, HeatMap};
use crate::report::html::line::{Line, LineChart, Stroke};
use crate::report::html::table::{Content, Table};
use crate::report::html::{Document, breakable, escape};
use crate::report::page::{changes_line, value_text};
use crate::report::{number, percent};
use crate::sweep::folder::CellResult;
use crate::sweep::grid::Keep;

/// Curves drawn as panels; a grid of 500 cells keeps to the size of a page.
const CURVES: usize = 64;

impl Sweep<'_> {
    /// The report as one HTML file.
    pub fn html(&self) -> String {
        let run = self.manifest.run.display().to_string();
        let mut page = Document::new(&format!("{run} · sweep · spikeprobe"));
        page.push(&format!(
            "<header class=\"top\"><span><b>{}</b></span><span>spikeprobe {} · {} cells</span></header>",
            escape(&run),
            env!("CARGO_PKG_VERSION"),
            self.manifest.cells.len()
        ));
        page.push(&self.headline());
        let lead = match self.manifest.keep {
            Keep::MicroBatch => {
                "Final loss; striped cells spiked or diverged; framed: suggested. The micro-batch is kept, so fewer \
                 accumulation steps mean fewer samples per update. Every cell sees the same number of samples."
            }
            Keep::Samples => {
                "Final loss; striped cells spiked or diverged; framed: suggested. Samples per update are kept, so fewer \
                 accumulation steps mean larger micro-batches. Every cell sees the same number of samples."
            }
        };
        let maps: String = self.panels().iter().map(|p| self.heat(p)).collect();
        page.section("Where it is stable", lead, &maps);
        page.section(
            "Stability frontier",
            &self.frontiers.first().map_or(String::new(), |f| {
                format!("The highest {} up to which every cell is stable, and the next, which is not.", f.axis)
            }),
            &self.frontier_table(),
        );
        page.section("Loss over samples seen", "Unstable cells in orange, stable ones in green.", &self.curves());
        page.section("Every cell", "", &self.table());
        page.push("<footer>This file makes no network requests.</footer>");
        page.finish()
    }

    fn headline(&self) -> String {
        let stable = self.results.iter().flatten().filter(|r| r.outcome.stable).count();
        let counted = format!("{stable} of {} cells are stable", self.manifest.cells.len() - self.missing());
        if self.missing() > 0 {
            let text =
                format!("{counted}, {} have no result yet: a suggestion follows when all have one.", self.missing());
            return format!(
                "<section class=\"headline warn\"><h1>Unfinished</h1><p class=\"summary\">{}</p></section>",
                escape(&text)
            );
        }
        let Some(suggestion) = &self.suggestion else {
            return format!(
                "<section class=\"headline bad\"><h1>Nothing here is stable</h1><p class=\"summary\">{}: try lower learning \
                 rates.</p></section>",
                escape(&counted)
            );
        };
        let check = suggestion.check.as_ref().map_or("Not yet checked with another seed.".to_owned(), |c| {
            let word = if c.stable { "stable" } else { "NOT stable" };
            format!(
                "Replayed with seed {}: {word}, final loss {}, peak {}.",
                c.seed,
                number(c.final_loss),
                number(c.peak_loss)
            )
        });
        let tone = match &suggestion.check {
            Some(check) if check.stable => "good",
            Some(_) => "bad",
            None => "warn",
        };
        let mut settings = String::new();
        for (key, value) in &suggestion.axes {
            let _ = write!(settings, "<li><code>{}: {}</code></li>", breakable(key), escape(&value_text(value)));
        }
        format!(
            "<section class=\"headline {tone}\"><div class=\"word\">Suggested setting</div><h1>{}</h1>\
             <p class=\"summary\">Final loss {}: {}.</p><div class=\"trio\"><div><h3>What to set</h3><ul>{settings}</ul></div>\
             <div><h3>Checked</h3><ul><li>{}</li></ul></div><div><h3>The grid</h3><ul><li>{}</li></ul></div></div></section>",
            breakable(&changes_line(&suggestion.axes)),
            number(suggestion.final_loss),
            escape(&suggestion.reason),
            escape(&check),
            escape(&counted)
        )
    }

    fn heat(&self, panel: &Panel) -> String {
        let held = changes_line(&panel.held);
        let cells = panel.cells.iter().map(|row| row.iter().map(|cell| self.heat_cell(*cell)).collect()).collect();
        HeatMap {
            title: if held.is_empty() { "Final loss".into() } else { held },
            unit: "final loss, log scale".into(),
            row_name: panel.down.clone(),
            column_name: if panel.across.is_empty() { "all".into() } else { panel.across.clone() },
            rows: panel.rows.clone(),
            columns: panel.columns.clone(),
            cells,
            log: true,
            with_text: true,
            ..HeatMap::default()
        }
        .render()
    }

    fn heat_cell(&self, index: Option<usize>) -> HeatCell {
        let Some(index) = index else { return HeatCell::default() };
        let cell = &self.manifest.cells[index];
        let Some(result) = &self.results[index] else {
            return HeatCell { text: "…".into(), title: "no result yet".into(), ..HeatCell::default() };
        };
        let own = if self.is_own(&cell.axes) { " *" } else { "" };
        HeatCell {
            value: Some(result.outcome.final_loss),
            text: format!("{}{own}", verdict(Some(result))),
            title: format!(
                "{}\nfinal loss {}, peak {}\n{} samples in {} steps{}",
                changes_line(&cell.axes),
                number(result.outcome.final_loss),
                number(result.outcome.peak_loss),
                result.outcome.samples,
                result.outcome.steps,
                result.outcome.stopped.as_ref().map_or(String::new(), |s| format!("\nstopped: {s}"))
            ),
            marked: self.is_suggested(index),
            bad: !result.outcome.stable,
            ..HeatCell::default()
        }
    }

    fn frontier_table(&self) -> String {
        let row = |f: &crate::sweep::suggest::Frontier| {
            let value = |v: Option<f64>, none: &str| Content::Number(v.map_or(none.into(), number));
            vec![
                Content::Code(if f.held.is_empty() { "all".into() } else { changes_line(&f.held) }),
                value(f.stable_to, "none"),
                value(f.unstable_from, "beyond the grid"),
            ]
        };
        let rows = self.frontiers.iter().map(row).collect();
        Table { header: vec!["with", "stable up to", "unstable from"], rows }.render()
    }

    fn curves(&self) -> String {
        let cells = self.manifest.cells.iter().zip(self.results).filter_map(|(c, r)| r.as_ref().map(|r| (c, r)));
        let panel = |(cell, result): (&crate::sweep::Cell, &CellResult)| {
            let colour = Stroke::Colour(if result.outcome.stable { 2 } else { 1 });
            let points = result.outcome.curve.iter().map(|p| (p.samples as f64, p.loss)).collect();
            let chart = LineChart {
                title: changes_line(&cell.axes),
                log: true,
                small: true,
                x_name: "samples".into(),
                lines: vec![Line { name: "loss".into(), stroke: colour, points }],
                ..LineChart::default()
            };
            format!("<div>{}</div>", chart.render())
        };
        let panels: String = cells.take(CURVES).map(panel).collect();
        let rest = self.results.iter().flatten().count().saturating_sub(CURVES);
        let note = if rest > 0 {
            format!("<p class=\"lead\">{rest} more curves are in the cells' files.</p>")
        } else {
            String::new()
        };
        if panels.is_empty() { panels } else { format!("<div class=\"multiples\">{panels}</div>{note}") }
    }

    fn table(&self) -> String {
        let row = |(cell, result): (&crate::sweep::Cell, &CellResult)| {
            let o = &result.outcome;
            let (class, word) = if o.stable { ("good", "stable") } else { ("bad", "unstable") };
            vec![
                Content::Code(changes_line(&cell.axes)),
                Content::Badge(class, word.into()),
                Content::Number(number(o.final_loss)),
                Content::Number(number(o.peak_loss)),
                Content::Number(o.spikes.len().to_string()),
                Content::Number(format!("{} / {}", o.nonfinite_steps, o.skipped_steps)),
                Content::Number(percent(o.clip_share)),
                Content::Number(number(o.max_update_rms)),
                Content::Number(o.steps.to_string()),
                Content::Number(number((o.tokens as f64 / result.seconds).round())),
                Content::Text(o.stopped.clone().unwrap_or_default()),
            ]
        };
        let cells = self.manifest.cells.iter().zip(self.results).filter_map(|(c, r)| r.as_ref().map(|r| (c, r)));
        let header = vec![
            "cell",
            "",
            "final loss",
            "peak",
            "spikes",
            "not finite / skipped",
            "clipped",
            "update RMS",
            "steps",
            "tokens/s",
            "stopped",
        ];
        Table { header, rows: cells.map(row).collect() }.render()
    }
}
