//! Text for a terminal: colour that switches off, widths that count columns and not bytes, a sparkline, tables.
//!
//! Text of users (rows, paths, log lines) loses its control characters here, so that nothing in a dataset can
//! move the cursor or colour the screen.

use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::output;

/// How to write: with colour or not, and how wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Style {
    pub color: bool,
    /// Columns, at least 40.
    pub width: usize,
}

/// What a piece of text is, not which colour it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    Plain,
    Bold,
    Dim,
    Good,
    Warn,
    Bad,
}

impl Style {
    /// For standard output as it is: colour only on a terminal without NO_COLOR, its width, else 100 columns.
    pub fn stdout() -> Self {
        let width = terminal_size::terminal_size().map_or(100, |(width, _)| usize::from(width.0));
        Self { color: output::color(), width: width.clamp(40, 160) }
    }

    /// No colour, fixed width: for files and tests.
    pub fn plain(width: usize) -> Self {
        Self { color: false, width: width.max(40) }
    }

    /// Clean text in the paint's colour.
    pub fn paint(&self, paint: Paint, text: &str) -> String {
        let text = clean(text);
        let code = match paint {
            Paint::Plain => return text,
            _ if !self.color => return text,
            Paint::Bold => "1",
            Paint::Dim => "2",
            Paint::Good => "1;32",
            Paint::Warn => "1;33",
            Paint::Bad => "1;31",
        };
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// Wrapped text with every line in the paint's colour.
pub fn painted(style: Style, paint: Paint, text: &str) -> String {
    let wrapped = wrap(text, style.width, "");
    wrapped.lines().map(|line| style.paint(paint, line)).collect::<Vec<_>>().join("\n")
}

/// Control characters, escape sequences and direction overrides made visible as U+FFFD; line breaks become spaces.
pub fn clean(text: &str) -> String {
    let replace = |c: char| match c {
        '\n' | '\t' => ' ',
        c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => '\u{fffd}',
        c => c,
    };
    text.chars().map(replace).collect()
}

/// Breaks at spaces to `width` columns; following lines start with `indent`, which the width does not count.
pub fn wrap(text: &str, width: usize, indent: &str) -> String {
    let mut lines: Vec<String> = vec![String::new()];
    for word in clean(text).split_whitespace() {
        let used = lines.last().map_or(0, |l| l.width());
        if used > 0 && used + 1 + word.width() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines.join(&format!("\n{indent}"))
}

/// At most `width` columns, an ellipsis where something was cut.
pub fn fit(text: &str, width: usize) -> String {
    let text = clean(text);
    if text.width() <= width {
        return text;
    }
    let (mut out, mut used) = (String::new(), 0);
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used + 1 > width {
            break;
        }
        out.push(c);
    }
    out + "…"
}

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The loss as one line of bars (logarithmic; × is not finite), the spike pointed at below. `points`: step, loss,
/// ascending. Each column shows the highest value of its steps, so that a spike of one step is never lost.
pub fn sparkline(points: &[(u64, f64)], spike: Option<u64>, style: Style) -> String {
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    let columns = style.width.min(points.len()).min(80);
    let column = |i: usize| &points[i * points.len() / columns..((i + 1) * points.len() / columns)];
    let positive = || points.iter().map(|p| p.1).filter(|v| v.is_finite() && *v > 0.0);
    let (low, high) = (positive().fold(f64::INFINITY, f64::min).ln(), positive().fold(0.0, f64::max).ln());
    let bar = |value: f64| {
        let fraction = if high > low { (value.ln() - low) / (high - low) } else { 0.0 };
        BARS[(fraction.clamp(0.0, 1.0) * 7.0).round() as usize]
    };
    let holds = |i: usize| spike.is_some_and(|s| column(i).iter().any(|p| p.0 == s));
    let mut line = String::new();
    for i in 0..columns {
        let chunk = column(i);
        let highest = chunk.iter().map(|p| p.1).filter(|v| v.is_finite()).fold(0.0, f64::max);
        let glyph = if chunk.iter().any(|p| !p.1.is_finite()) { '×' } else { bar(highest) };
        let paint = if holds(i) { Paint::Bad } else { Paint::Dim };
        line.push_str(&style.paint(paint, &glyph.to_string()));
    }
    let mut out = format!("{line}\n");
    if let (Some(at), Some(step)) = ((0..columns).find(|i| holds(*i)), spike) {
        let label = format!("step {step}");
        let text = if at + 2 + label.width() > style.width && at > label.width() {
            format!("{}{label} ^", " ".repeat(at - label.width() - 1))
        } else {
            format!("{}^ {label}", " ".repeat(at))
        };
        out.push_str(&style.paint(Paint::Bad, &text));
    } else {
        out.push_str(&style.paint(Paint::Dim, &format!("loss, steps {}–{}", first.0, last.0)));
    }
    out + "\n"
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Columns of text; the widest left-aligned one is cut where the terminal is narrow.
#[derive(Debug, Clone)]
pub struct Table {
    header: Vec<(&'static str, Align)>,
    rows: Vec<Vec<(Paint, String)>>,
}

impl Table {
    pub fn new(header: &[(&'static str, Align)]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; missing cells stay empty.
    pub fn row(&mut self, cells: Vec<(Paint, String)>) {
        self.rows.push(cells);
    }

    pub fn render(&self, style: Style) -> String {
        let widths = self.widths(style.width);
        let header: Vec<(Paint, String)> = self.header.iter().map(|(name, _)| (Paint::Dim, (*name).into())).collect();
        let mut out = String::new();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            for (i, width) in widths.iter().enumerate() {
                let empty = (Paint::Plain, String::new());
                let (paint, text) = row.get(i).unwrap_or(&empty);
                let text = fit(text, *width);
                let gap = " ".repeat(width - text.width());
                let text = style.paint(*paint, &text);
                line.push_str(&match self.header[i].1 {
                    Align::Left => format!("{text}{gap}"),
                    Align::Right => format!("{gap}{text}"),
                });
                line.push_str("  ");
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }

    fn widths(&self, total: usize) -> Vec<usize> {
        let natural = |i: usize| {
            let cells = self.rows.iter().filter_map(|r| r.get(i)).map(|(_, text)| clean(text).width());
            cells.chain([self.header[i].0.width()]).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = (0..self.header.len()).map(natural).collect();
        let gaps = 2 * widths.len().saturating_sub(1);
        while widths.iter().sum::<usize>() + gaps > total {
            let left = (0..widths.len()).filter(|i| self.header[*i].1 == Align::Left);
            match left.max_by_key(|i| widths[*i]) {
                Some(widest) if widths[widest] > 8 => widths[widest] -= 1,
                _ => break,
            }
        }
        widths
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparkline_shows_a_spike_of_one_step_in_a_long_log_and_points_at_it() {
        let mut points: Vec<(u64, f64)> = (1..=5000).map(|s| (s, 0.05)).collect();
        points[2499].1 = 6.0;
        points[4000].1 = f64::NAN;
        let text = sparkline(&points, Some(2500), Style::plain(80));
        let (bars, pointer) = text.split_once('\n').expect("two lines");
        assert_eq!(bars.chars().count(), 80);
        assert_eq!(bars.chars().filter(|c| *c == '█').count(), 1);
        assert_eq!(bars.chars().filter(|c| *c == '×').count(), 1);
        assert_eq!(bars.chars().position(|c| c == '█'), pointer.find('^'));
        assert!(pointer.contains("step 2500"));
    }

    #[test]
    fn text_of_users_cannot_drive_the_terminal() {
        let style = Style { color: true, width: 80 };
        let painted = style.paint(Paint::Plain, "\u{1b}[2J\u{7}evil\r\n\u{202e}");
        assert_eq!(painted, "\u{fffd}[2J\u{fffd}evil\u{fffd} \u{fffd}");
    }

    #[test]
    fn tables_fit_the_terminal_and_count_wide_characters() {
        let mut table = Table::new(&[("name", Align::Left), ("n", Align::Right)]);
        table.row(vec![(Paint::Plain, "漢字".repeat(40)), (Paint::Good, "12345".into())]);
        table.row(vec![(Paint::Plain, "short".into()), (Paint::Bad, "1".into())]);
        let text = table.render(Style::plain(50));
        assert!(text.lines().all(|line| line.width() <= 50), "{text}");
        assert!(text.contains('…'));
        assert!(!text.contains('\u{1b}'));
    }

    #[test]
    fn wrapped_lines_keep_to_their_width() {
        let text = wrap("one two three four five six", 10, "  ");
        assert_eq!(text, "one two\n  three four\n  five six");
    }
}
