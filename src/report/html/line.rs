//! Line charts over optimizer steps: a band, lines, marks, places where a value was not a number.
//!
//! The SVG has a fixed coordinate system (10 000 × 2 000), stretched by the page; strokes do not scale. Labels are
//! HTML beside it, so they stay readable at any width and in print.

use std::fmt::Write as _;

use super::escape;
use super::scale::{COLUMNS, Scale, downsample};

/// How a line is drawn; the colours are in style.css.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stroke {
    /// What the trainer logged: a broad pale band of ink, so that a replay on top of it shows agreement.
    Logged,
    /// What was replayed.
    Replayed,
    /// The other numbered colours of the palette, 0–5.
    Colour(u8),
}

impl Stroke {
    fn class(self) -> String {
        match self {
            Self::Logged => "logged".into(),
            Self::Replayed => "replayed".into(),
            Self::Colour(i) => format!("k{}", i % 6),
        }
    }
}

/// One line: ascending x (steps, samples), y as computed, non-finite values included.
#[derive(Debug, Clone)]
pub struct Line {
    pub name: String,
    pub stroke: Stroke,
    pub points: Vec<(f64, f64)>,
}

/// `(x, low, high)` of a span between two curves.
pub type BandPoint = (f64, f64, f64);

/// A chart; empty ones draw nothing.
#[derive(Debug, Clone, Default)]
pub struct LineChart {
    pub title: String,
    pub unit: String,
    pub log: bool,
    /// Half height, no legend: for many side by side.
    pub small: bool,
    /// Named span between two curves.
    pub band: Option<(String, Vec<BandPoint>)>,
    pub lines: Vec<Line>,
    /// A vertical mark with its label.
    pub mark: Option<(f64, String)>,
    /// Horizontal limits with their labels.
    pub limits: Vec<(f64, String)>,
    /// Name of the x axis; "step" when empty.
    pub x_name: String,
}

/// Above this many points a chart shows no values under the pointer: the file would outgrow its limit.
const HOVER_LIMIT: usize = 600;

impl LineChart {
    /// The chart's markup, or nothing when no line has a point.
    pub fn render(&self) -> String {
        let xs = || self.lines.iter().flat_map(|l| [l.points.first(), l.points.last()]).flatten().map(|p| p.0);
        let (first, last) = (xs().fold(f64::INFINITY, f64::min), xs().fold(f64::NEG_INFINITY, f64::max));
        if !first.is_finite() || !last.is_finite() {
            return String::new();
        }
        let x = Scale::linear(first, last);
        let values = self.lines.iter().flat_map(|l| l.points.iter().map(|p| p.1));
        let band = self.band.iter().flat_map(|(_, points)| points.iter().flat_map(|p| [p.1, p.2]));
        let y = Scale::around(values.chain(band).chain(self.limits.iter().map(|l| l.0)), self.log);
        let class = if self.small { "chart small" } else { "chart" };
        format!(
            "<figure class=\"{class}\">{}<div class=\"plot\"><div class=\"ylab\">{}</div><div class=\"area\">{}{}</div>\
             <div class=\"xlab\">{}</div></div></figure>\n",
            self.caption(),
            labels(&y.ticks(if self.small { 3 } else { 5 }), "bottom"),
            self.svg(x, y),
            self.overlay(x, y),
            labels(&x.whole_ticks(if self.small { 4 } else { 10 }), "left"),
        )
    }

    fn caption(&self) -> String {
        let unit = match (self.unit.as_str(), self.log) {
            ("", true) => "log scale".to_owned(),
            ("", false) => String::new(),
            (unit, true) => format!("{unit}, log scale"),
            (unit, false) => unit.to_owned(),
        };
        let mut keys = String::new();
        if !self.small {
            for line in &self.lines {
                let _ = write!(
                    keys,
                    "<span class=\"key\"><i class=\"{}\"></i>{}</span>",
                    line.stroke.class(),
                    escape(&line.name)
                );
            }
            if let Some((name, _)) = &self.band {
                let _ = write!(keys, "<span class=\"key\"><i class=\"band\"></i>{}</span>", escape(name));
            }
        }
        format!(
            "<figcaption><b>{}</b> <small>{}</small><span class=\"keys\">{keys}</span></figcaption>",
            escape(&self.title),
            escape(&unit)
        )
    }

    fn svg(&self, x: Scale, y: Scale) -> String {
        let mut out = String::from(
            "<svg viewBox=\"0 0 10000 2000\" preserveAspectRatio=\"none\" role=\"img\" aria-hidden=\"true\">",
        );
        let mut grid = String::new();
        for tick in y.ticks(if self.small { 3 } else { 5 }) {
            let _ = write!(grid, "M0 {}H10000", 2000 - units(tick.position, 2000.0));
        }
        let _ = write!(out, "<path class=\"grid\" d=\"{grid}\"/>");
        if let Some((_, points)) = &self.band {
            out.push_str(&band_path(points, x, y));
        }
        for (limit, _) in &self.limits {
            if let Some(position) = y.position(*limit) {
                let _ = write!(out, "<path class=\"limit\" d=\"M0 {}H10000\"/>", 2000 - units(position, 2000.0));
            }
        }
        if let Some(position) = self.mark.as_ref().and_then(|(at, _)| x.position(*at)) {
            let _ = write!(out, "<path class=\"mark\" d=\"M{} 0V2000\"/>", units(position, 10000.0));
        }
        for line in &self.lines {
            let points = downsample(&line.points, COLUMNS);
            let _ = write!(out, "<path class=\"{}\" d=\"{}\"/>", line.stroke.class(), line_path(&points, x, y));
            if points.len() <= 60 && !self.small {
                let _ = write!(out, "<path class=\"dot {}\" d=\"{}\"/>", line.stroke.class(), dots(&points, x, y));
            }
        }
        out.push_str("</svg>");
        out
    }

    /// HTML above the drawing: the mark's label, limits, non-finite values, values under the pointer.
    fn overlay(&self, x: Scale, y: Scale) -> String {
        let mut out = String::new();
        for (limit, name) in &self.limits {
            if let Some(position) = y.position(*limit) {
                let _ = write!(
                    out,
                    "<span class=\"limitname\" style=\"bottom:{:.1}%\">{}</span>",
                    position * 100.0,
                    escape(name)
                );
            }
        }
        if let Some((at, name)) = &self.mark
            && let Some(position) = x.position(*at)
        {
            let side = if position > 0.6 { "left" } else { "right" };
            let _ = write!(
                out,
                "<span class=\"markname {side}\" style=\"left:{:.2}%\">{}</span>",
                position * 100.0,
                escape(name)
            );
        }
        out.push_str(&self.nonfinite(x));
        out.push_str(&self.hover(x));
        out
    }

    /// One cross a column and line where values were NaN or infinite.
    fn nonfinite(&self, x: Scale) -> String {
        let mut out = String::new();
        for line in &self.lines {
            let mut previous = None;
            for (at, value) in line.points.iter().filter(|p| !p.1.is_finite()) {
                let column = x.position(*at).map(|p| (p * 100.0).round() as i64);
                if column == previous {
                    continue;
                }
                previous = column;
                let _ = write!(
                    out,
                    "<b class=\"nan {}\" style=\"left:{:.2}%\" title=\"{} {}: {} is {}\">×</b>",
                    line.stroke.class(),
                    x.position(*at).unwrap_or(0.0) * 100.0,
                    escape(self.axis()),
                    at,
                    escape(&line.name),
                    crate::report::number(*value)
                );
            }
        }
        out
    }

    fn hover(&self, x: Scale) -> String {
        let mut steps: Vec<f64> = self.lines.iter().flat_map(|l| l.points.iter().map(|p| p.0)).collect();
        steps.sort_by(f64::total_cmp);
        steps.dedup();
        if steps.len() > HOVER_LIMIT || self.small {
            return String::new();
        }
        let mut out = String::from("<div class=\"hover\">");
        for (i, at) in steps.iter().enumerate() {
            let place = |v: f64| x.position(v).unwrap_or(0.0) * 100.0;
            let left = if i == 0 { 0.0 } else { place((steps[i - 1] + at) / 2.0) };
            let right = steps.get(i + 1).map_or(100.0, |next| place((next + at) / 2.0));
            let mut text = format!("{} {at}", self.axis());
            for line in &self.lines {
                if let Ok(found) = line.points.binary_search_by(|p| p.0.total_cmp(at)) {
                    let _ = write!(text, "\n{}: {}", line.name, crate::report::number(line.points[found].1));
                }
            }
            let _ =
                write!(out, "<i style=\"left:{left:.2}%;width:{:.2}%\" title=\"{}\"></i>", right - left, escape(&text));
        }
        out.push_str("</div>");
        out
    }

    fn axis(&self) -> &str {
        if self.x_name.is_empty() { "step" } else { &self.x_name }
    }
}

fn units(position: f64, size: f64) -> i64 {
    (position * size).round() as i64
}

fn labels(ticks: &[super::scale::Tick], side: &str) -> String {
    let mut out = String::new();
    for tick in ticks {
        let class = if tick.minor { " class=\"minor\"" } else { "" };
        let _ =
            write!(out, "<span{class} style=\"{side}:{:.2}%\">{}</span>", tick.position * 100.0, escape(&tick.label));
    }
    out
}

/// Polyline that breaks where a value is not a number.
fn line_path(points: &[(f64, f64)], x: Scale, y: Scale) -> String {
    let mut path = String::new();
    let mut pen_down = false;
    for (at, value) in points {
        match (x.position(*at), y.position(*value).filter(|_| value.is_finite())) {
            (Some(px), Some(py)) => {
                let command = if pen_down { 'L' } else { 'M' };
                let _ = write!(path, "{command}{} {}", units(px, 10000.0), 2000 - units(py, 2000.0));
                pen_down = true;
            }
            _ => pen_down = false,
        }
    }
    path
}

/// Zero-length strokes: with round caps that do not scale they are round dots at any stretch.
fn dots(points: &[(f64, f64)], x: Scale, y: Scale) -> String {
    let mut path = String::new();
    for (at, value) in points.iter().filter(|p| p.1.is_finite()) {
        if let (Some(px), Some(py)) = (x.position(*at), y.position(*value)) {
            let _ = write!(path, "M{} {}h0", units(px, 10000.0), 2000 - units(py, 2000.0));
        }
    }
    path
}

fn band_path(points: &[(f64, f64, f64)], x: Scale, y: Scale) -> String {
    let lower: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.1)).collect();
    let mut upper: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.2)).collect();
    upper = downsample(&upper, COLUMNS / 2);
    upper.reverse();
    let outline = downsample(&lower, COLUMNS / 2).into_iter().chain(upper).filter(|p| p.1.is_finite());
    let mut path = String::new();
    for (i, (at, value)) in outline.enumerate() {
        if let (Some(px), Some(py)) = (x.position(at), y.position(value)) {
            let command = if i == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{command}{} {}", units(px, 10000.0), 2000 - units(py, 2000.0));
        }
    }
    if path.is_empty() { path } else { format!("<path class=\"band\" d=\"{path}Z\"/>") }
}
