//! Heat maps in a terminal, the frontier and the suggestion.

use std::fmt::Write as _;

use super::{Panel, Sweep, verdict};
use crate::report::number;
use crate::report::page::changes_line;
use crate::report::terminal::{Align, Paint, Style, Table, painted, wrap};
use crate::sweep::grid::Keep;

impl Sweep<'_> {
    /// The summary as text.
    pub fn terminal(&self, style: Style) -> String {
        let mut out = String::new();
        for panel in self.panels() {
            out.push_str(&self.panel(&panel, style));
        }
        let _ = writeln!(out, "{}", painted(style, Paint::Dim, self.legend()));
        if self.missing() > 0 {
            let text = format!("{} of {} cells have no result yet.", self.missing(), self.manifest.cells.len());
            let _ = writeln!(out, "{}", style.paint(Paint::Warn, &text));
        }
        out.push_str(&self.suggestion_lines(style));
        out
    }

    fn panel(&self, panel: &Panel, style: Style) -> String {
        let held = changes_line(&panel.held);
        let title = if panel.across.is_empty() {
            panel.down.clone()
        } else {
            format!("{} (down) × {} (across)", panel.down, panel.across)
        };
        let title = if held.is_empty() { title } else { format!("{held}: {title}") };
        let mut table = Table::new(&vec![("", Align::Right); panel.columns.len() + 1]);
        let head = std::iter::once(String::new()).chain(panel.columns.iter().cloned());
        table.row(head.map(|name| (Paint::Dim, name)).collect());
        for (name, cells) in panel.rows.iter().zip(&panel.cells) {
            let mut row = vec![(Paint::Dim, name.clone())];
            row.extend(cells.iter().map(|cell| self.cell(*cell)));
            table.row(row);
        }
        let body = table.render(style);
        let body = body.split_once('\n').map_or("", |(_, rest)| rest);
        format!("{}\n{body}\n", style.paint(Paint::Bold, &title))
    }

    fn cell(&self, index: Option<usize>) -> (Paint, String) {
        let Some(index) = index else { return (Paint::Dim, "–".into()) };
        let result = self.results[index].as_ref();
        let mut text = verdict(result);
        if self.is_suggested(index) {
            text.insert_str(0, "→ ");
        }
        if self.is_own(&self.manifest.cells[index].axes) {
            text.push_str(" *");
        }
        let paint = match result.map(|r| r.outcome.stable) {
            None => Paint::Dim,
            Some(true) => Paint::Good,
            Some(false) => Paint::Bad,
        };
        (paint, text)
    }

    fn legend(&self) -> &'static str {
        match self.manifest.keep {
            Keep::MicroBatch => {
                "Final loss of each cell. * the run's own setting. → suggested. The micro-batch is kept: fewer accumulation \
                 steps mean fewer samples per update; every cell sees the same number of samples."
            }
            Keep::Samples => {
                "Final loss of each cell. * the run's own setting. → suggested. Samples per update are kept: fewer \
                 accumulation steps mean larger micro-batches; every cell sees the same number of samples."
            }
        }
    }

    fn suggestion_lines(&self, style: Style) -> String {
        let Some(suggestion) = &self.suggestion else {
            if self.missing() > 0 {
                return String::new();
            }
            return style.paint(Paint::Bad, "No cell of this grid is stable: try lower learning rates.") + "\n";
        };
        let mut out = format!(
            "{} {}\n  {}\n",
            style.paint(Paint::Good, "Suggested:"),
            changes_line(&suggestion.axes),
            wrap(
                &format!("final loss {}: {}", number(suggestion.final_loss), suggestion.reason),
                style.width - 2,
                "  "
            )
        );
        if let Some(check) = &suggestion.check {
            let (paint, word) = if check.stable { (Paint::Good, "stable") } else { (Paint::Bad, "not stable") };
            let _ = writeln!(
                out,
                "  with seed {}: {}, final loss {}, peak {}",
                check.seed,
                style.paint(paint, word),
                number(check.final_loss),
                number(check.peak_loss)
            );
        }
        out
    }
}
