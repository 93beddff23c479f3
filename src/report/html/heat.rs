//! Heat maps: a grid of coloured cells with row and column labels and a legend.
//!
//! Sixteen shades of a palette that the colour-blind can order (cividis), as CSS classes, so that light, dark and
//! print can each choose their own; a value that is not a number is a crossed cell.

use std::fmt::Write as _;

use super::{breakable, escape};

/// One cell. `text` is printed in it when the map asks for text.
#[derive(Debug, Clone, Default)]
pub struct Cell {
    /// `None`: nothing there (a shorter window).
    pub value: Option<f64>,
    pub text: String,
    /// Shown under the pointer.
    pub title: String,
    /// Framed: the spike, the suggested setting.
    pub marked: bool,
    /// Hatched: crossed the stability frontier.
    pub bad: bool,
    /// Dotted: broken by what another cell did.
    pub inherited: bool,
}

/// A grid, row by row from the top.
#[derive(Debug, Clone, Default)]
pub struct HeatMap {
    pub title: String,
    pub unit: String,
    /// Names of the axes.
    pub row_name: String,
    pub column_name: String,
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    /// `cells[row][column]`.
    pub cells: Vec<Vec<Cell>>,
    /// Colours by logarithm.
    pub log: bool,
    /// Prints each cell's text; otherwise cells are as small as the page makes them.
    pub with_text: bool,
    /// Fixed ends of the colour scale; else those of the data.
    pub range: Option<(f64, f64)>,
    /// What stands at the ends of the legend instead of the numbers.
    pub ends: Option<(String, String)>,
    /// Row names are long (places in a model).
    pub wide_names: bool,
}

const SHADES: usize = 16;
/// More columns than this are unreadable and slow in a browser: the caller shows the part around the spike.
pub const MAX_COLUMNS: usize = 240;

impl HeatMap {
    pub fn render(&self) -> String {
        if self.cells.is_empty() || self.columns.is_empty() {
            return String::new();
        }
        let (low, high) = self.range.unwrap_or_else(|| self.data_range());
        let class = match (self.with_text, self.wide_names) {
            (true, _) => "heat text",
            (false, true) => "heat wide",
            (false, false) => "heat",
        };
        let mut out = format!(
            "<figure class=\"heatmap\"><figcaption><b>{}</b> <small>{}</small>{}</figcaption>\
             <div class=\"scroll\"><table class=\"{class}\"><thead><tr><th scope=\"col\" class=\"corner\">{} \\ <wbr/>{}</th>",
            escape(&self.title),
            escape(&self.unit),
            self.legend(low, high),
            breakable(&self.row_name),
            breakable(&self.column_name),
        );
        let stride = if self.with_text { 1 } else { self.columns.len().div_ceil(16) };
        for (i, column) in self.columns.iter().enumerate() {
            let shown = if i % stride == 0 { column.as_str() } else { "" };
            let _ = write!(out, "<th scope=\"col\"><span>{}</span></th>", escape(shown));
        }
        out.push_str("</tr></thead><tbody>");
        for (name, cells) in self.rows.iter().zip(&self.cells) {
            let _ = write!(out, "<tr><th scope=\"row\">{}</th>", escape(name));
            for cell in cells {
                out.push_str(&self.cell(cell, low, high));
            }
            out.push_str("</tr>");
        }
        out.push_str("</tbody></table></div></figure>\n");
        out
    }

    fn cell(&self, cell: &Cell, low: f64, high: f64) -> String {
        let mut class = match cell.value {
            None => "none".to_owned(),
            Some(value) if value.is_finite() => format!("h{}", self.shade(value, low, high)),
            Some(_) => "bad".to_owned(),
        };
        if cell.marked {
            class.push_str(" marked");
        }
        if cell.bad {
            class.push_str(" bad");
        }
        if cell.inherited {
            class.push_str(" after");
        }
        let title = if cell.title.is_empty() { String::new() } else { format!(" title=\"{}\"", escape(&cell.title)) };
        let text = match cell.value {
            _ if self.with_text => escape(&cell.text),
            Some(value) if !value.is_finite() => "×".into(),
            _ if cell.inherited => "·".into(),
            _ => String::new(),
        };
        format!("<td class=\"{class}\"{title}>{text}</td>")
    }

    fn data_range(&self) -> (f64, f64) {
        let drawable = |v: &f64| v.is_finite() && (!self.log || *v > 0.0);
        let values = || self.cells.iter().flatten().filter_map(|c| c.value).filter(drawable);
        let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
        match (low.is_finite(), self.log) {
            (false, _) => (0.0, 1.0),
            // Never less than one decade: ordinary scatter must not look like a fire.
            (true, true) => (low, high.max(low * 10.0)),
            (true, false) => (low, high),
        }
    }

    fn shade(&self, value: f64, low: f64, high: f64) -> usize {
        let place = |v: f64| if self.log { v.max(f64::MIN_POSITIVE).ln() } else { v };
        let span = place(high) - place(low);
        let fraction = if span > 0.0 { (place(value) - place(low)) / span } else { 0.0 };
        ((fraction.clamp(0.0, 1.0) * (SHADES - 1) as f64).round() as usize).min(SHADES - 1)
    }

    fn legend(&self, low: f64, high: f64) -> String {
        let mut swatches = String::new();
        for shade in 0..SHADES {
            let _ = write!(swatches, "<i class=\"h{shade}\"></i>");
        }
        let numbers = || (crate::report::number(low), crate::report::number(high));
        let (low, high) = self.ends.clone().unwrap_or_else(numbers);
        format!(
            "<span class=\"ramp\">{}<span class=\"swatches\">{swatches}</span>{}</span>",
            escape(&low),
            escape(&high)
        )
    }
}
