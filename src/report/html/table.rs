//! Plain tables: numbers to the right, long text wraps, wide tables scroll inside their box.

use std::fmt::Write as _;

use super::{breakable, escape};

/// One cell of a table.
#[derive(Debug, Clone)]
pub enum Content {
    Text(String),
    /// A number or short measure, aligned right with even digits.
    Number(String),
    /// A share between 0 and 1 drawn as a bar behind its label.
    Bar(f64, String),
    /// A word in a coloured pill: class `good`, `warn`, `bad` or `plain`.
    Badge(&'static str, String),
    /// File names, keys, settings.
    Code(String),
}

/// Text from this many bytes on is given room.
const SENTENCE: usize = 24;

/// Header and rows; the header decides the number of columns.
#[derive(Debug, Clone, Default)]
pub struct Table {
    pub header: Vec<&'static str>,
    pub rows: Vec<Vec<Content>>,
}

impl Table {
    pub fn render(&self) -> String {
        if self.rows.is_empty() {
            return String::new();
        }
        let mut out = String::from("<div class=\"scroll\"><table class=\"plain\"><thead><tr>");
        for (i, name) in self.header.iter().enumerate() {
            let right = self.rows.iter().all(|row| matches!(row.get(i), Some(Content::Number(_))));
            let class = if right { " class=\"num\"" } else { "" };
            let _ = write!(out, "<th scope=\"col\"{class}>{}</th>", escape(name));
        }
        out.push_str("</tr></thead><tbody>");
        for row in &self.rows {
            out.push_str("<tr>");
            row.iter().for_each(|content| out.push_str(&cell(content)));
            out.push_str("</tr>");
        }
        out.push_str("</tbody></table></div>\n");
        out
    }
}

fn cell(content: &Content) -> String {
    match content {
        // Sentences in a narrow column would be a word a line.
        Content::Text(text) if text.len() > SENTENCE => format!("<td class=\"long\">{}</td>", escape(text)),
        Content::Text(text) => format!("<td>{}</td>", escape(text)),
        Content::Number(text) => format!("<td class=\"num\">{}</td>", escape(text)),
        Content::Code(text) => format!("<td><code>{}</code></td>", breakable(text)),
        Content::Badge(class, text) => format!("<td><span class=\"badge {class}\">{}</span></td>", escape(text)),
        Content::Bar(share, text) => {
            let width = if share.is_finite() { share.clamp(0.0, 1.0) * 100.0 } else { 0.0 };
            format!(
                "<td class=\"bar\"><span class=\"fill\" style=\"width:{width:.1}%\"></span><span class=\"of\">{}</span></td>",
                escape(text)
            )
        }
    }
}
