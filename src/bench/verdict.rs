//! Which precision is safe, and why: a pure function of what was measured.

use serde::{Deserialize, Serialize};

use super::passes::FP16_MAX;
use super::{LostUpdates, Precision, ScaleLimit};
use crate::report::{number, percent};

/// The answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// One sentence with the precision to take.
    pub summary: String,
    /// Name, safe, why.
    pub precisions: Vec<(String, bool, String)>,
}

/// A share of lost updates from which training visibly stands still.
const LOST: f64 = 0.25;
/// A gradient error from which Adam's direction is no longer that of the data.
const WRONG: f64 = 0.1;
/// GradScaler gives up usefulness below this scale: small gradients then underflow (fp16's smallest normal is 2⁻¹⁴).
const SMALL_SCALE: f64 = 16.0;

/// Judges every precision, cheapest safe one first.
pub fn decide(precisions: &[Precision], scale: &ScaleLimit, lost: &[LostUpdates], learning_rate: f64) -> Verdict {
    let judged: Vec<(String, bool, String)> = precisions
        .iter()
        .map(|p| {
            let (safe, why) = judge(p, scale, lost, learning_rate);
            (p.name.clone(), safe, why)
        })
        .collect();
    let safe = |name: &str| judged.iter().find(|(n, _, _)| n == name).filter(|(_, safe, _)| *safe);
    let take = ["bf16", "fp16", "tf32", "fp32"].into_iter().find(|name| safe(name).is_some());
    let mut summary = match take {
        Some("fp16") => match scale.fails_at {
            Some(limit) => format!("fp16 is safe here with a loss scale below {}.", power_below(limit)),
            None => "fp16 is safe here.".into(),
        },
        Some(name) => format!("{name} is safe here."),
        None => "None of the precisions tried is safe here.".into(),
    };
    if take.is_some_and(|name| name != "fp16") && safe("fp16").is_some() {
        let skipped = precisions.iter().find(|p| p.name == "fp16").map_or(0, |p| p.trajectory.skipped);
        let limit =
            scale.fails_at.map_or(String::new(), |limit| format!(", with a loss scale below {}", power_below(limit)));
        let steps = if skipped == 1 { "step" } else { "steps" };
        summary.push_str(&format!(" fp16 is too{limit}; GradScaler skipped {skipped} {steps} to find one."));
    }
    for (name, safe, why) in &judged {
        if !safe && name != "fp16_unscaled" {
            summary.push_str(&format!(" {name} is not: {why}."));
        }
    }
    Verdict { summary, precisions: judged }
}

/// The largest power of two that leaves a factor of two to the limit: GradScaler moves in powers of two.
fn power_below(limit: f64) -> f64 {
    2f64.powf((limit / 2.0).log2().floor())
}

fn judge(p: &Precision, scale: &ScaleLimit, lost: &[LostUpdates], learning_rate: f64) -> (bool, String) {
    if let Some((step, site)) = first_broken(p) {
        let limit = if p.name.contains("fp16") { format!(" beyond {}", number(FP16_MAX)) } else { String::new() };
        return (
            false,
            format!("{site} overflows{limit} in the forward pass at step {step}, and no loss scale helps there"),
        );
    }
    if p.trajectory.broken > 0 {
        return (false, format!("{} steps were not finite", p.trajectory.broken));
    }
    if p.name == "pure_bf16"
        && let Some(share) = share_at(lost, "bf16", learning_rate).filter(|s| *s > LOST)
    {
        return (
            false,
            format!(
                "{} of the updates are lost to rounding at learning rate {}",
                percent(share),
                number(learning_rate)
            ),
        );
    }
    if p.name == "fp16"
        && let (Some(limit), Some(site)) = (scale.fails_at, &scale.site)
        && limit < SMALL_SCALE
    {
        return (
            false,
            format!("{site} overflows from a loss scale of {} on, too small to keep gradients", number(limit)),
        );
    }
    if p.gradient.relative_l2.is_nan() {
        let site = scale.site.as_deref().filter(|_| p.name == "fp16" && scale.fails_at.is_none());
        let whose = site.map_or("its gradient is not finite".into(), |s| format!("{s} overflows at any loss scale"));
        return (false, format!("{whose} at step {}", scale.step));
    }
    if p.gradient.relative_l2 > WRONG {
        return (false, format!("its gradient is {} off", percent(p.gradient.relative_l2)));
    }
    (true, format!("gradient within {} of the reference", percent(p.gradient.relative_l2)))
}

/// The earliest step at which something of the forward pass broke by itself, and the site where most of it did.
fn first_broken(p: &Precision) -> Option<(u64, &str)> {
    let arisen = p.sites.iter().filter(|s| !s.backward).filter_map(|s| Some((s.arises_at?, s)));
    let first = arisen.min_by_key(|(step, site)| (*step, std::cmp::Reverse(site.arisen)));
    first.map(|(step, site)| (step, site.site.as_str()))
}

/// Share of lost updates in `dtype` at the learning rate nearest to `rate`.
pub fn share_at(lost: &[LostUpdates], dtype: &str, rate: f64) -> Option<f64> {
    let row = lost.iter().find(|l| l.dtype == dtype)?;
    let near = |(r, _): &&(f64, f64)| (r / rate).ln().abs();
    row.by_learning_rate.iter().min_by(|a, b| near(a).total_cmp(&near(b))).map(|(_, share)| *share)
}
