//! One self-contained HTML file: no network, no script, no font; charts are inline SVG that stretches with the
//! page while lines and letters keep their size. Prints, and follows the reader's light or dark setting.
//!
//! Owns markup: escaping, the page's frame, charts ([`line`], [`heat`]) and tables. What a page says is decided
//! in [`crate::report::page`].

pub mod heat;
pub mod line;
pub mod scale;
pub mod table;

use std::fmt::Write as _;

/// Text made safe for element content and for attributes in double quotes. Control characters, which HTML
/// forbids, become U+FFFD, so that a row of a dataset can hold anything.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            '\r' => {}
            c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => {
                out.push('\u{fffd}');
            }
            c => out.push(c),
        }
    }
    out
}

/// [`escape`]d, and free to break behind the underscores and full stops of settings and module paths.
pub fn breakable(text: &str) -> String {
    let text = escape(text);
    let mut out = String::with_capacity(text.len() + 32);
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        out.push(c);
        if c == '_' || (c == '.' && rest.peek().is_some_and(|next| next.is_ascii_alphabetic())) {
            out.push_str("<wbr/>");
        }
    }
    out
}

/// A document under construction: sections in reading order.
#[derive(Debug, Clone)]
pub struct Document {
    title: String,
    body: String,
}

impl Document {
    pub fn new(title: &str) -> Self {
        Self { title: title.to_owned(), body: String::new() }
    }

    /// Appends markup that is already escaped.
    pub fn push(&mut self, markup: &str) {
        self.body.push_str(markup);
        self.body.push('\n');
    }

    /// A section with a heading and one sentence that says how to read it; nothing when `markup` is empty.
    pub fn section(&mut self, heading: &str, lead: &str, markup: &str) {
        if markup.is_empty() {
            return;
        }
        let lead = if lead.is_empty() { String::new() } else { format!("<p class=\"lead\">{}</p>", escape(lead)) };
        let _ = write!(self.body, "<section><h2>{}</h2>{lead}\n{markup}</section>\n", escape(heading));
    }

    /// The whole file. The content security policy forbids every request, whatever the text holds.
    pub fn finish(&self) -> String {
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/>\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{}</title>\n<style>\n{}</style></head>\n\
             <body><main>\n{}</main></body></html>\n",
            escape(&self.title),
            include_str!("style.css"),
            self.body
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_break_between_their_words_and_numbers_do_not() {
        assert_eq!(breakable("warmup_ratio: 0.03"), "warmup_<wbr/>ratio: 0.03");
        assert_eq!(breakable("mlp.up_proj <a>"), "mlp.<wbr/>up_<wbr/>proj &lt;a&gt;");
    }

    #[test]
    fn text_cannot_become_markup() {
        let text = "<script>alert('x')</script>&\u{1b}[31m\"\u{202e}";
        assert_eq!(escape(text), "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;\u{fffd}[31m&quot;\u{fffd}");
    }
}
