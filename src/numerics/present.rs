//! Fingerprints and triage for people and programs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::order::Found;
use super::{Evidence, Fingerprint, SecondOpinion, State, Through, published};
use crate::device::Device;
use crate::report::terminal::{Paint, Style};

const UNCONFIRMED: &str = "as published; not confirmed on a GPU by this program";

/// The order in words.
fn order(found: &Found) -> String {
    match found {
        Found::Sequential { block: 1 } => "one after another".into(),
        Found::Sequential { block } => format!("blocks of {block} at once, one after another"),
        Found::SequentialSwapped => "one after another, pairs swapped".into(),
        Found::Lanes { lanes, block: 1 } => format!("{lanes} accumulators"),
        Found::Lanes { lanes, block } => format!("{lanes} accumulators of blocks of {block}"),
        Found::Pairwise { block } => format!("a tree over blocks of {block}"),
        Found::Exact => "exact over all terms".into(),
        Found::Other { .. } => "no order with a name (see --json)".into(),
    }
}

fn yes(value: Option<bool>) -> &'static str {
    match value {
        Some(true) => "yes",
        Some(false) => "no",
        None => "cannot tell",
    }
}

/// One fingerprint of a device.
pub struct Seen {
    /// `bf16`.
    pub name: &'static str,
    pub through: Through,
    pub print: Fingerprint,
}

/// What a fingerprint of this device is worth.
fn standing(device: &dyn Device) -> Option<&'static str> {
    if device.name() == "cpu" {
        return None;
    }
    if device.fingerprint().contains("emulator") {
        return Some(
            "an emulated device: its library adds in ascending order, its matrix unit is a host twin of the A100 as \
             published; nothing here was measured on a GPU",
        );
    }
    Some("measured now, on this device; no GPU has confirmed this program's reading of it yet")
}

/// What each kind of product does, and what is published of GPUs.
pub fn fingerprints(style: Style, device: &dyn Device, seen: &[Seen]) -> String {
    let mut text = format!("{}  {}\n", style.paint(Paint::Bold, &device.name()), device.fingerprint());
    if let Some(standing) = standing(device) {
        let _ = writeln!(text, "{}", style.paint(Paint::Warn, standing));
    }
    for Seen { name, through, print } in seen {
        let through = match through {
            Through::Library => "",
            Through::MatrixUnit => ", by mma.sync (kernels/mma.cu)",
        };
        let rounding = print.rounding.map_or_else(|| "unknown".into(), |r| format!("{r:?}"));
        let _ = writeln!(text, "\n{}", style.paint(Paint::Bold, &format!("{name} products{through}")));
        let mut line = |what: &str, value: String| {
            let _ = writeln!(text, "  {what:<22} {value}");
        };
        line("terms are added", order(&print.order));
        let cuts: Vec<String> = print.cuts.iter().map(usize::to_string).collect();
        line("4096 terms", if cuts.is_empty() { "one sum".into() } else { format!("new sums at {}", cuts.join(", ")) });
        if let Some(bits) = print.reduced_bits {
            line("partial sums", format!("{bits} bits where the result is a half (reduced-precision split)"));
        }
        line("accumulator", format!("{} bits, rounded {rounding}", print.accumulator_bits));
        line("kept while adding", format!("{} bits below the largest term, then {:?}", print.kept_bits, print.cut_off));
        line("fused multiply-add", yes(print.exact_products).into());
        line("subnormal operands", yes(Some(print.subnormal_operands)).into());
        line("subnormal sums", yes(print.subnormal_sums).into());
        let rules = print.nonfinite;
        let ieee = rules.infinity_times_zero_is_nan && rules.infinities_cancel_to_nan && rules.nan_propagates;
        line("NaN and infinity", if ieee { "as IEEE 754 says".into() } else { format!("not IEEE 754: {rules:?}") });
    }
    let _ = writeln!(text, "\n{} ({UNCONFIRMED})", style.paint(Paint::Bold, "Matrix units of GPUs"));
    for profile in published() {
        let model = &profile.arithmetic;
        let super::Sum::Aligned { fraction_bits } = model.sum else { continue };
        let _ = writeln!(
            text,
            "  {:<10} blocks of {:>2}, {fraction_bits} bits kept, cut off, {} bits between blocks  {}",
            profile.name,
            model.block,
            model.accumulator_bits,
            style.paint(Paint::Dim, profile.source)
        );
    }
    text
}

pub fn fingerprints_json(device: &dyn Device, seen: &[Seen]) -> Value {
    let of = |wanted: Through| -> serde_json::Map<String, Value> {
        let kind = seen.iter().filter(|seen| seen.through == wanted);
        kind.map(|seen| (seen.name.to_owned(), json!(seen.print))).collect()
    };
    let profiles: Vec<Value> = published()
        .iter()
        .map(|p| {
            json!({"name": p.name, "source": p.source, "confirmed": false, "block": p.arithmetic.block,
                "sum": p.arithmetic.sum, "rounding": p.arithmetic.rounding, "order": p.arithmetic.order,
                "accumulator_bits": p.arithmetic.accumulator_bits})
        })
        .collect();
    json!({"schema": "spikeprobe.numerics/1", "device": device.name(), "fingerprint": device.fingerprint(),
        "standing": standing(device), "products": of(Through::Library), "mma": of(Through::MatrixUnit),
        "published": profiles})
}

/// What a state means.
pub fn sentence(state: State) -> &'static str {
    match state {
        State::Correct => {
            "this device computes the step the same way every time, and its products agree with their checksums"
        }
        State::Transient => "one repeat of the step differed and the others agreed: a transient fault",
        State::Persistent => "the same wrong result every time: a persistent fault of this device or its software",
        State::OrderDependent => {
            "the difference is what another order of additions makes: no fault, but no fixed result"
        }
        State::Undetermined => "repeats disagree and results are wrong: more repeats are needed to tell why",
    }
}

/// The evidence and its judgement.
pub fn evidence(style: Style, evidence: &Evidence) -> String {
    let state = evidence.state();
    let paint = match state {
        State::Correct => Paint::Good,
        State::Transient | State::Persistent => Paint::Bad,
        State::OrderDependent | State::Undetermined => Paint::Warn,
    };
    let mut text = format!("step {}: {}\n", evidence.step, style.paint(paint, sentence(state)));
    let mut line = |what: &str, value: String| {
        let _ = writeln!(text, "  {what:<16} {}", crate::report::terminal::clean(&value));
    };
    let pair = |(loss, norm): &(f64, f64)| format!("loss {loss:.6}, grad norm {norm:.6}");
    let same = evidence.parted.is_none();
    let count = evidence.repeats.len();
    line("repeats", if same { format!("{count}, the same bits") } else { format!("{count}, not the same") });
    evidence.repeats.iter().take(if same { 1 } else { count }).for_each(|r| line("", pair(r)));
    if let Some(place) = evidence.location() {
        line("where", place.to_string());
    }
    line("checksums", format!("{} products, {} wrong", evidence.products, evidence.violations.len()));
    let compared = match &evidence.mismatch {
        None => format!("as {} computes every operation", evidence.compared_with),
        Some((_, m)) => format!("column {}: {:e}, {} gives {:e}", m.column, m.ours, evidence.compared_with, m.theirs),
    };
    line("recomputed", compared);
    line("candle", second(&evidence.second));
    evidence.reordered.iter().for_each(|r| line("other order", pair(r)));
    evidence.split.iter().for_each(|r| line("in rounded parts", pair(r)));
    let known = |x: Option<f64>| x.map_or_else(|| "not logged".into(), |x| format!("{x:.6}"));
    line("log", format!("loss {}, grad norm {}", known(evidence.logged.0), known(evidence.logged.1)));
    text
}

fn second(opinion: &SecondOpinion) -> String {
    match opinion {
        SecondOpinion::Silent(why) => why.clone(),
        SecondOpinion::Heard(check) if !check.losses[0].is_finite() => {
            "its numbers are not finite in f32 either: nothing to compare".into()
        }
        SecondOpinion::Heard(check) => format!(
            "{} in f32: loss {:.1e} apart, gradients {:.1e} (rounding: up to {:.1e}); says nothing of half precision",
            if check.agrees() { "agrees" } else { "DISAGREES" },
            check.loss_rel(),
            check.relative_l2,
            check.allowed,
        ),
    }
}

pub fn evidence_json(evidence: &Evidence) -> Value {
    let mut value = json!(evidence);
    value["schema"] = "spikeprobe.triage/1".into();
    value["state"] = json!(evidence.state());
    value["location"] = json!(evidence.location());
    value["candle"] = match &evidence.second {
        SecondOpinion::Heard(check) => check.json(),
        SecondOpinion::Silent(why) => json!({"silent": why}),
    };
    value
}
