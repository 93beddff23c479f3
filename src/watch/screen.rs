//! The terminal view of a watched run: curves, GPUs, what happened. Text from state; who draws it is `cli`'s.

use std::fmt::Write as _;

use super::{Event, Watch};
use crate::device::nvml::Reading;
use crate::report::terminal::{Paint, Style, fit};
use crate::run::LogRow;

/// Rows of characters of the loss curve.
const HEIGHT: usize = 10;
/// Columns left of the curve: the scale.
const MARGIN: usize = 9;
/// Events shown, newest last.
const EVENTS: usize = 6;

/// What is shown.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The watched folder.
    pub title: &'a str,
    pub watch: &'a Watch,
    pub events: &'a [Event],
    pub gpus: &'a [Reading],
}

/// The whole screen, at most `style.width` columns wide.
pub fn render(view: &View<'_>, style: Style) -> String {
    let rows = view.watch.rows();
    let mut out = format!("{}\n", style.paint(Paint::Bold, &fit(&format!("watching {}", view.title), style.width)));
    let Some(last) = rows.last() else {
        out.push_str("no line in trainer_log.jsonl yet\n");
        events(&mut out, view.events, style);
        return out;
    };
    let _ = writeln!(out, "{}", fit(&headline(last), style.width));
    let losses: Vec<(u64, f64)> = rows.iter().filter_map(|r| Some((r.step, r.loss?))).collect();
    curve(&mut out, &losses, style);
    let of = |value: fn(&LogRow) -> Option<f64>| -> Vec<f64> { rows.iter().filter_map(value).collect() };
    strip(&mut out, "rate", &of(|r| r.learning_rate), "", style);
    let from = format!("  up to checkpoint-{}", view.watch.normed());
    strip(&mut out, "norm", &of(|r| r.grad_norm), &from, style);
    for gpu in view.gpus {
        let _ = writeln!(out, "{}", fit(&gpu_line(gpu), style.width));
    }
    events(&mut out, view.events, style);
    out
}

fn headline(last: &LogRow) -> String {
    let total = last.total_steps.map(|t| format!(" of {t}")).unwrap_or_default();
    let epoch = last.epoch.map(|e| format!(", epoch {e:.2}")).unwrap_or_default();
    let loss = last.loss.map(|l| format!(", loss {l:.4}")).unwrap_or_default();
    let rate = last.learning_rate.map(|r| format!(", learning rate {r:.3e}")).unwrap_or_default();
    format!("step {}{total}{epoch}{loss}{rate}", last.step)
}

/// The loss over steps on a logarithmic scale, in braille dots (2 × 4 a character). A column of dots shows the lowest
/// and the highest value of its steps; × marks steps whose loss is no positive number.
fn curve(out: &mut String, points: &[(u64, f64)], style: Style) {
    let usable = |v: f64| v.is_finite() && v > 0.0;
    let values = || points.iter().map(|p| p.1).filter(|v| usable(*v)).map(f64::ln);
    let (low, high) = (values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max));
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return };
    if low > high {
        let _ = writeln!(out, "no finite loss yet");
        return;
    }
    let columns = style.width.saturating_sub(MARGIN + 1).max(10);
    let (wide, tall) = (2 * columns, 4 * HEIGHT);
    let span = (last.0 - first.0).max(1) as f64;
    let column = |step: u64| (((step - first.0) as f64 / span) * (wide - 1) as f64).round() as usize;
    let row = |v: f64| {
        let share = if high > low { (v.ln() - low) / (high - low) } else { 0.5 };
        ((1.0 - share) * (tall - 1) as f64).round() as usize
    };
    let mut dots = vec![0u8; columns * HEIGHT];
    let mut broken = vec![false; columns];
    let mut before: Option<(usize, usize)> = None;
    for &(step, value) in points {
        let x = column(step);
        if !usable(value) {
            broken[x / 2] = true;
            before = None;
            continue;
        }
        let y = row(value);
        // Joined to the point before, so that a steep rise is a line.
        let (x0, y0) = before.unwrap_or((x, y));
        for along in 0..=(x - x0).max(y.abs_diff(y0)) {
            let share = along as f64 / (x - x0).max(y.abs_diff(y0)).max(1) as f64;
            let at = |a: usize, b: usize| (a as f64 + share * (b as f64 - a as f64)).round() as usize;
            let (x, y) = (at(x0, x), at(y0, y));
            dots[y / 4 * columns + x / 2] |= BRAILLE[y % 4][x % 2];
        }
        before = Some((x, y));
    }
    let scale = |y: usize| (high - (high - low) * (4 * y) as f64 / (tall - 1) as f64).exp();
    for y in 0..HEIGHT {
        let label = match y {
            0 => format!("{:>7.4}", high.exp()),
            _ if y == HEIGHT - 1 => format!("{:>7.4}", low.exp()),
            _ if y == HEIGHT / 2 => format!("{:>7.4}", scale(y)),
            _ => String::new(),
        };
        let line: String = (0..columns)
            .map(|x| {
                if y == 0 && broken[x] {
                    '×'
                } else {
                    char::from_u32(0x2800 + u32::from(dots[y * columns + x])).unwrap_or(' ')
                }
            })
            .collect();
        let _ = writeln!(out, "{} │{}", style.paint(Paint::Dim, &fit(&format!("{label:>7}"), 7)), line);
    }
    let (left, right) = (first.0.to_string(), last.0.to_string());
    let gap = columns.saturating_sub(left.len() + right.len());
    let _ = writeln!(out, "{:>7} └{left}{}{right}", "loss", " ".repeat(gap));
}

/// Bits of a braille character: rows from the top, left and right column (Unicode 2800).
const BRAILLE: [[u8; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One line of bars on a linear scale from 0, the highest value of each column; nothing where there is no value.
fn strip(out: &mut String, name: &str, values: &[f64], note: &str, style: Style) {
    let Some(last) = values.last() else { return };
    let top = values.iter().copied().filter(|v| v.is_finite()).fold(0.0, f64::max);
    let tail = format!("  {last:.3e}{note}");
    let columns = style.width.saturating_sub(MARGIN + 1 + tail.chars().count()).clamp(8, values.len().max(8));
    let columns = columns.min(values.len());
    let line: String = (0..columns)
        .map(|i| &values[i * values.len() / columns..(i + 1) * values.len() / columns])
        .map(|chunk| match chunk.iter().copied().fold(0.0, f64::max) {
            _ if chunk.iter().any(|v| !v.is_finite()) => '×',
            v if top > 0.0 => BARS[(v / top * 7.0).round() as usize],
            _ => BARS[0],
        })
        .collect();
    let _ = writeln!(out, "{name:>7}  {line}{}", style.paint(Paint::Dim, &tail));
}

fn gpu_line(gpu: &Reading) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1u32 << 30);
    let mut line = format!("  GPU {} {}", gpu.index, gpu.name);
    if let Some((used, total)) = gpu.memory {
        let _ = write!(line, ", {:.1} of {:.1} GiB", gib(used), gib(total));
    }
    if let Some(clock) = gpu.clock {
        let _ = write!(line, ", {clock} MHz");
    }
    if let Some(degrees) = gpu.temperature {
        let _ = write!(line, ", {degrees} °C");
    }
    if gpu.slowed == Some(true) {
        line.push_str(", slowed down");
    }
    if let Some(errors) = gpu.ecc_uncorrected.filter(|n| *n > 0) {
        let _ = write!(line, ", {errors} uncorrected memory errors");
    }
    line
}

fn events(out: &mut String, all: &[Event], style: Style) {
    for event in &all[all.len().saturating_sub(EVENTS)..] {
        let paint = match event {
            Event::Spike { .. } | Event::Gpu { .. } => Paint::Bad,
            Event::Restarted | Event::Unreadable { .. } => Paint::Warn,
            Event::Kept { .. } => Paint::Good,
        };
        let _ = writeln!(out, "{}", style.paint(paint, &fit(&describe(event), style.width)));
    }
}

/// An event in a line.
pub fn describe(event: &Event) -> String {
    match event {
        Event::Spike { step, kind, before, at } => {
            let before = before.map_or("-".to_owned(), |b| format!("{b:.5}"));
            format!("spike at step {step}: {}, {before} → {at}", kind.replace('_', " "))
        }
        Event::Restarted => "the log starts over: another process writes it now".to_owned(),
        Event::Unreadable { line } => format!("a line cannot be read: {line}"),
        Event::Kept { checkpoint } => format!("kept {checkpoint}"),
        Event::Gpu { gpu, what } => format!("GPU {gpu}: {what}"),
    }
}
