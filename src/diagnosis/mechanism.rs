//! What the measurements around a spike show of its mechanism: ranges, updates, who carries the gradient.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::SiteBlame;
use super::number::json as number;
use crate::probe::{Measurement, first_out_of_range, least_headroom};
use crate::replay::StepRecord;

/// An update this many times the usual one is worth a line.
const LARGE: f64 = 2.0;
/// Binades of headroom below which a site is close to the end of its format.
const CLOSE: f64 = 2.0;

/// The first site out of range, or the one closest to it; the update before the spike; the micro-batch that carries
/// the gradient. `measured`: every site at `step`, in execution order.
pub fn sites(baseline: &[StepRecord], step: u64, measured: &[Measurement]) -> Vec<SiteBlame> {
    let mut all: Vec<SiteBlame> = Vec::new();
    all.extend(range(step, measured));
    all.extend(update(baseline, step));
    all.extend(carriers(baseline, step));
    all
}

fn blame(site: String, step: u64, message: String, measured: &[(&str, Value)]) -> SiteBlame {
    let measured =
        measured.iter().map(|(name, value)| ((*name).to_string(), value.clone())).collect::<BTreeMap<_, _>>();
    SiteBlame { site, step, message, measured }
}

fn range(step: u64, measured: &[Measurement]) -> Option<SiteBlame> {
    let values = |m: &Measurement| {
        [
            ("max_abs", number(f64::from(m.statistics.max_abs))),
            ("headroom_binades", number(m.headroom())),
            ("out_of_range", json!(m.out_of_range())),
        ]
    };
    if let Some(first) = first_out_of_range(measured) {
        let pass = if first.site.is_backward() { "backward" } else { "forward" };
        let message =
            format!("the first place of the {pass} pass with values out of range ({} of them)", first.out_of_range());
        return Some(blame(first.site.to_string(), step, message, &values(first)));
    }
    let least = least_headroom(measured).filter(|m| m.headroom() < CLOSE)?;
    let message = format!("closest to the end of its format: {:.1} binades left", least.headroom());
    Some(blame(least.site.to_string(), step, message, &values(least)))
}

/// The update that made the state in which `step` was measured.
fn update(baseline: &[StepRecord], step: u64) -> Option<SiteBlame> {
    let last = baseline.iter().rfind(|r| r.step < step)?;
    let mut usual: Vec<f64> = baseline.iter().filter(|r| r.step < last.step).map(|r| r.update_norm).collect();
    usual.sort_by(f64::total_cmp);
    let median = *usual.get(usual.len() / 2)?;
    if last.update_norm.is_nan() || last.update_norm <= LARGE * median {
        return None;
    }
    let size = if median == 0.0 {
        "is the first that moves the weights".to_string()
    } else {
        format!("is {:.1} times the usual one", last.update_norm / median)
    };
    let message = format!("the update before the spike {size}, at learning rate {:.2e}", last.learning_rate);
    let measured = [("update_norm", number(last.update_norm)), ("usual_update_norm", number(median))];
    Some(blame("update".into(), last.step, message, &measured))
}

/// Micro-batches that carry most of the window's squared gradient, or gradients that are not finite.
fn carriers(baseline: &[StepRecord], step: u64) -> Vec<SiteBlame> {
    let Some(record) = baseline.iter().find(|r| r.step == step) else { return Vec::new() };
    let total: f64 = record.micro_batches.iter().map(|m| m.grad_norm.powi(2)).sum();
    let mut all = Vec::new();
    for (index, micro) in record.micro_batches.iter().enumerate() {
        let share = micro.grad_norm.powi(2) / total;
        if micro.nonfinite == 0 && (share.is_nan() || share <= 0.5 || record.micro_batches.len() == 1) {
            continue;
        }
        let message = match micro.nonfinite {
            0 => format!("carries {:.0} % of the window's squared gradient", 100.0 * share),
            n => format!("{n} gradient elements are not finite"),
        };
        let measured = [
            ("gradient_share", number(share)),
            ("mean_loss", number(micro.mean_loss)),
            ("nonfinite", json!(micro.nonfinite)),
        ];
        all.push(blame(format!("micro-batch {index}"), step, message, &measured));
    }
    all
}
