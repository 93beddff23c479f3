//! The bench in a terminal and as a page.

use std::fmt::Write as _;

use super::passes::FP16_MAX;
use super::{Bench, Precision};
use crate::report::html::heat::HeatMap;
use crate::report::html::line::{Line, LineChart, Stroke};
use crate::report::html::table::{Content, Table};
use crate::report::html::{Document, escape};
use crate::report::page::{Pass, SiteRange, range_map};
use crate::report::terminal::{Align, Paint, Style, Table as TextTable, painted, wrap};
use crate::report::{number, percent};

impl Bench {
    /// The summary as text.
    pub fn terminal(&self, style: Style) -> String {
        let mut out = format!("{}\n\n", wrap(&self.verdict.summary, style.width, ""));
        let columns = [
            ("precision", Align::Left),
            ("safe", Align::Left),
            ("gradient error", Align::Right),
            ("cosine", Align::Right),
            ("bias", Align::Right),
            ("parts at", Align::Right),
            ("skipped", Align::Right),
            ("ms/window", Align::Right),
        ];
        let mut table = TextTable::new(&columns);
        for p in &self.precisions {
            let safe = self.is_safe(&p.name);
            table.row(vec![
                (Paint::Bold, p.name.clone()),
                if safe { (Paint::Good, "yes".into()) } else { (Paint::Bad, "no".into()) },
                (Paint::Plain, number(p.gradient.relative_l2)),
                (Paint::Plain, format!("{:.6}", p.gradient.cosine)),
                (Paint::Plain, number(p.gradient.bias)),
                (Paint::Plain, p.trajectory.parts_at.map_or("–".into(), |s| format!("step {s}"))),
                (Paint::Plain, p.trajectory.skipped.to_string()),
                (Paint::Dim, format!("{:.1}", p.milliseconds)),
            ]);
        }
        out.push_str(&table.render(style));
        let _ = writeln!(out, "{}", painted(style, Paint::Dim, COLUMNS));
        let _ = writeln!(out, "\n{}\n", wrap(&self.scale_line(), style.width, ""));
        out.push_str(&self.lost_lines(style));
        if let Some(bytes) = self.peak_memory {
            let _ = writeln!(out, "peak host memory: {:.0} MiB", bytes as f64 / f64::from(1 << 20));
        }
        out
    }

    /// Shares of lost updates, adapter dtypes down and learning rates across.
    fn lost_lines(&self, style: Style) -> String {
        let Some(first) = self.lost_updates.first() else { return String::new() };
        let title = "Updates lost to rounding, by the adapter's dtype and the learning rate (* the run's own):";
        let mut out = format!("{}\n", wrap(title, style.width, ""));
        let mut table = TextTable::new(&vec![("", Align::Right); first.by_learning_rate.len() + 1]);
        let own = |rate: f64| if rate == self.learning_rate { " *" } else { "" };
        let rates = first.by_learning_rate.iter().map(|(rate, _)| format!("{}{}", number(*rate), own(*rate)));
        table.row(std::iter::once(String::new()).chain(rates).map(|name| (Paint::Dim, name)).collect());
        for row in &self.lost_updates {
            let mut cells = vec![(Paint::Bold, row.dtype.clone())];
            cells.extend(row.by_learning_rate.iter().map(|(_, share)| (Paint::Plain, percent(*share))));
            table.row(cells);
        }
        // Its own first line is the empty header.
        out.push_str(table.render(style).split_once('\n').map_or("", |(_, rows)| rows));
        for row in self.lost_updates.iter().filter(|row| row.dtype != "fp32") {
            if let Some((name, rate)) = worst(row) {
                let text = format!("{}: half are lost below a learning rate of {} in {name}", row.dtype, number(rate));
                let _ = writeln!(out, "{}", wrap(&text, style.width, "  "));
            }
        }
        out
    }

    fn is_safe(&self, name: &str) -> bool {
        self.verdict.precisions.iter().any(|(n, safe, _)| n == name && *safe)
    }

    fn scale_line(&self) -> String {
        let limit = &self.loss_scale;
        let site = limit.site.as_deref().unwrap_or("a site");
        let half = self.precisions.iter().find(|p| p.name == "fp16");
        let overflows = half.is_some_and(|p| p.sites.iter().any(|s| !s.backward && s.arisen > 0));
        let whose = if overflows { "Where its forward pass stays finite, fp16" } else { "fp16" };
        match limit.fails_at {
            None => format!("fp16 overflows at {site} at any loss scale (step {}).", limit.step),
            Some(scale) => format!(
                "{whose} bears loss scales up to {} (first to overflow: {site}, step {}); {}.",
                number(scale),
                limit.step,
                if limit.confirmed {
                    "confirmed by passes at ½ and 2 times it"
                } else {
                    "passes at ½ and 2 times it did not confirm that"
                }
            ),
        }
    }

    /// The report as one HTML file.
    pub fn html(&self) -> String {
        let mut page = Document::new(&format!("{} · bench · spikeprobe", self.run));
        page.push(&format!(
            "<header class=\"top\"><span><b>{}</b></span><span>spikeprobe {} · {} · {} steps</span></header>",
            escape(&self.run),
            env!("CARGO_PKG_VERSION"),
            escape(&self.device),
            self.steps
        ));
        let tone = if self.is_safe("bf16") || self.is_safe("fp16") { "good" } else { "warn" };
        page.push(&format!(
            "<section class=\"headline {tone}\"><div class=\"word\">Which precision is safe here</div><p class=\"summary\">{}</p>\
             <p>{}</p></section>",
            escape(&self.verdict.summary),
            escape(&self.scale_line())
        ));
        page.section("Precisions", COLUMNS, &self.table());
        page.section("Loss by precision", "The same steps, replayed in each.", &self.losses());
        page.section(
            "Room in fp16",
            "From the magnitudes of the fp32 replay; striped sites overflow in fp16.",
            &self.maps(),
        );
        page.section("Gradient error by matrix", "Relative L2 error of each LoRA matrix's gradient.", &self.matrices());
        page.section(
            "Loss scale by site",
            "Loss scale from which each site of the backward pass leaves fp16's range, the lowest first.",
            &self.scales(),
        );
        page.section(
            "Updates lost to rounding",
            "Share of the moving weights that an update leaves where they are.",
            &self.lost(),
        );
        page.push("<footer>This file makes no network requests.</footer>");
        page.finish()
    }

    fn table(&self) -> String {
        let row = |p: &Precision| {
            let verdict = self.verdict.precisions.iter().find(|(n, _, _)| *n == p.name);
            let safe = verdict.is_some_and(|(_, safe, _)| *safe);
            vec![
                Content::Code(p.name.clone()),
                Content::Badge(if safe { "good" } else { "bad" }, if safe { "safe" } else { "not safe" }.into()),
                Content::Text(verdict.map_or(String::new(), |(_, _, why)| why.clone())),
                Content::Number(number(p.gradient.relative_l2)),
                Content::Number(format!("{:.6}", p.gradient.cosine)),
                Content::Number(number(p.gradient.bias)),
                Content::Number(p.trajectory.parts_at.map_or("–".into(), |s| s.to_string())),
                Content::Number(p.trajectory.skipped.to_string()),
                Content::Number(format!("{:.1}", p.milliseconds)),
            ]
        };
        let header =
            vec!["precision", "", "why", "gradient error", "cosine", "bias", "parts at step", "skipped", "ms/window"];
        Table { header, rows: self.precisions.iter().map(row).collect() }.render() + &self.scale_history()
    }

    /// The loss scale from each step at which it changed.
    fn scale_history(&self) -> String {
        let changes = |p: &Precision| {
            let scales = p.trajectory.loss_scale.iter().take(16);
            let steps: Vec<String> = scales.map(|(step, scale)| format!("{scale} from step {step}")).collect();
            format!("<p class=\"lead\">Loss scale in {}: {}.</p>", escape(&p.name), steps.join(", "))
        };
        self.precisions.iter().filter(|p| !p.trajectory.loss_scale.is_empty()).map(changes).collect()
    }

    fn losses(&self) -> String {
        let line = |(i, p): (usize, &Precision)| Line {
            name: p.name.clone(),
            stroke: Stroke::Colour(i as u8),
            points: p.trajectory.points.iter().map(|x| (x.step as f64, x.loss)).collect(),
        };
        let lines = self.precisions.iter().enumerate().map(line).collect();
        LineChart { title: "Loss".into(), log: true, lines, ..LineChart::default() }.render()
    }

    /// Magnitudes of the fp32 replay against fp16's range, with what the fp16 replay broke.
    fn maps(&self) -> String {
        let find = |name: &str| self.precisions.iter().find(|p| p.name == name);
        let (Some(wide), half) = (find("fp32"), find("fp16")) else { return String::new() };
        let scale = half.and_then(|h| h.trajectory.loss_scale.last()).map_or(1.0, |(_, scale)| *scale);
        let range = |s: &super::SiteReport| {
            let in_half = half.and_then(|h| h.sites.iter().find(|o| o.site == s.site));
            SiteRange {
                layer: s.layer,
                kind: s.kind.clone(),
                pass: if s.backward { Pass::Backward } else { Pass::Forward },
                max_abs: s.max_abs * if s.backward { scale } else { 1.0 },
                limit: FP16_MAX,
                overflow: if s.backward { 0 } else { in_half.map_or(0, |h| h.arisen) },
                inherited: if s.backward { 0 } else { in_half.map_or(0, |h| h.nonfinite - h.arisen) },
                underflow_share: in_half.map_or(0.0, |h| h.underflow_share),
            }
        };
        let ranges: Vec<SiteRange> = wide.sites.iter().map(range).collect();
        let maps = [Pass::Forward, Pass::Backward].into_iter().filter_map(|pass| range_map(&ranges, pass));
        maps.map(|map: HeatMap| map.render()).collect()
    }

    fn matrices(&self) -> String {
        let mut header = vec!["matrix"];
        let shown: Vec<&Precision> = self.precisions.iter().filter(|p| p.name != "fp16_unscaled").collect();
        header.extend(shown.iter().map(|p| match p.name.as_str() {
            "fp32" => "fp32",
            "tf32" => "tf32",
            "bf16" => "bf16",
            "fp16" => "fp16",
            _ => "pure bf16",
        }));
        let count = shown.first().map_or(0, |p| p.matrices.len()).min(400);
        let row = |i: usize| {
            let mut cells = vec![Content::Code(shown[0].matrices[i].0.clone())];
            cells.extend(
                shown
                    .iter()
                    .map(|p| Content::Number(p.matrices.get(i).map_or("–".into(), |(_, e)| number(e.relative_l2)))),
            );
            cells
        };
        Table { header, rows: (0..count).map(row).collect() }.render()
    }

    fn scales(&self) -> String {
        if self.loss_scale.sites.is_empty() {
            return String::new();
        }
        let row = |(site, scale): &(String, f64)| vec![Content::Code(site.clone()), Content::Number(number(*scale))];
        let rows = self.loss_scale.sites.iter().take(12).map(row).collect();
        Table { header: vec!["site", "fails from a loss scale of"], rows }.render()
    }

    fn lost(&self) -> String {
        let row = |l: &super::LostUpdates| {
            let shares: Vec<String> =
                l.by_learning_rate.iter().map(|(r, s)| format!("{}: {}", number(*r), percent(*s))).collect();
            vec![
                Content::Code(l.dtype.clone()),
                Content::Text(shares.join(" · ")),
                Content::Number(l.half_lost_below.map_or("–".into(), number)),
                Content::Text(worst(l).map_or("–".into(), |(name, rate)| format!("{name} below {}", number(rate)))),
            ]
        };
        let header = vec!["adapter in", "share lost, by learning rate", "half lost below", "first matrix to lose half"];
        Table { header, rows: self.lost_updates.iter().map(row).collect() }.render()
    }
}

/// What the columns of precisions are.
const COLUMNS: &str = "Gradient error: relative L2 distance from a pass whose products accumulate in f64; cosine and bias \
                       (-0.01: 1 % too short) of the same. Parts at: first step whose loss is 1 % from fp32's. Skipped: \
                       updates that the loss scaler left out. ms/window: one forward and backward pass on this device.";

/// The matrix that loses half of its updates at the highest learning rate, and that rate.
fn worst(lost: &super::LostUpdates) -> Option<(&str, f64)> {
    let known = lost.by_matrix.iter().filter_map(|(name, rate)| Some((name.as_str(), (*rate)?)));
    known.max_by(|a, b| a.1.total_cmp(&b.1))
}
