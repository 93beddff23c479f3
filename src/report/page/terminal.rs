//! The answer in a terminal: cause, evidence, what to change, in one screen.

use std::fmt::Write as _;

use super::View;
use super::words::{cause_title, changes_line, confidence_word, evidence, plain, remedy, spike_line, tone};
use crate::report::terminal::{Align, Paint, Style, Table, sparkline, wrap};
use crate::report::{number, percent};

impl View<'_> {
    /// The summary as text; `style` decides width and colour.
    pub fn terminal(&self, style: Style) -> String {
        let verdict = &self.diagnosis.verdict;
        let paint = match tone(self.diagnosis) {
            "good" => Paint::Good,
            "bad" => Paint::Bad,
            _ => Paint::Warn,
        };
        let mut out = String::new();
        let _ = writeln!(out, "{}", style.paint(paint, cause_title(verdict.cause)));
        if let Some(spike) = self.spike() {
            let _ =
                writeln!(out, "{}", style.paint(Paint::Dim, &format!("step {}: {}", spike.step, spike_line(spike))));
        }
        out.push_str(&self.spark(style));
        let _ = writeln!(out, "\n{}", wrap(&verdict.summary, style.width, ""));
        let baseline = self.spike().map(|s| s.height);
        self.block(&mut out, style, "Why", &evidence(self.diagnosis, baseline));
        self.block(&mut out, style, "Change", &remedy(self.diagnosis));
        let mut certainty = format!("confidence {}", confidence_word(verdict.confidence));
        if !verdict.also_sufficient.is_empty() {
            let others: Vec<String> = verdict.also_sufficient.iter().map(|c| plain(c.word())).collect();
            let _ = write!(certainty, "; would also hide it: {}", others.join(", "));
        }
        self.block(&mut out, style, "Sure?", &[certainty]);
        out.push_str(&self.shares_line(style));
        out.push_str(&self.experiment_table(style));
        out
    }

    fn block(&self, out: &mut String, style: Style, name: &str, lines: &[String]) {
        for (i, line) in lines.iter().enumerate() {
            let label = format!("{:<8}", if i == 0 { name } else { "" });
            let text = wrap(line, style.width.saturating_sub(8), "        ");
            let _ = writeln!(out, "{}{text}", style.paint(Paint::Bold, &label));
        }
    }

    fn spark(&self, style: Style) -> String {
        let points: Vec<(u64, f64)> = self.log.iter().filter_map(|r| r.loss.map(|l| (r.step, l))).collect();
        sparkline(&points, self.spike().map(|s| s.step), style)
    }

    fn shares_line(&self, style: Style) -> String {
        let mut shares: Vec<(&String, f64)> = self.diagnosis.shares.iter().map(|(k, v)| (k, *v)).collect();
        shares.sort_by(|a, b| b.1.total_cmp(&a.1));
        let parts: Vec<String> = shares.iter().map(|(cause, s)| format!("{} {}", plain(cause), percent(*s))).collect();
        if parts.is_empty() {
            return String::new();
        }
        format!("{}{}\n", style.paint(Paint::Bold, "Shares  "), wrap(&parts.join(", "), style.width - 8, "        "))
    }

    fn experiment_table(&self, style: Style) -> String {
        let experiments = &self.diagnosis.experiments;
        if experiments.is_empty() {
            return String::new();
        }
        let mut table = Table::new(&[
            ("experiment", Align::Left),
            ("height", Align::Right),
            ("spike", Align::Left),
            ("change", Align::Left),
        ]);
        for e in experiments {
            let outcome = match (e.changes.is_empty(), e.removed) {
                (true, _) => (Paint::Dim, "unchanged"),
                (false, true) => (Paint::Good, "gone"),
                (false, false) => (Paint::Bad, "stays"),
            };
            table.row(vec![
                (Paint::Plain, e.name.clone()),
                (Paint::Plain, number(e.height)),
                (outcome.0, outcome.1.into()),
                (Paint::Dim, changes_line(&e.changes)),
            ]);
        }
        format!("\n{}", table.render(style))
    }
}
