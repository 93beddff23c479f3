//! Replays of the same steps in every precision: where they part, what the loss scaler did, what every site saw.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::SiteReport;
use crate::Result;
use crate::device::Device;
use crate::diagnosis::number;
use crate::model::PrecisionPlan;
use crate::probe::{Measurement, Probes, Site};
use crate::replay::{Intervention, Observer, Replayer, Start, StepRecord};
use crate::step::TrainState;

/// How a precision trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trajectory {
    pub points: Vec<Point>,
    /// First step whose loss is more than 1 % from the fp32 replay's.
    pub parts_at: Option<u64>,
    /// Largest |ln(loss / fp32's loss)|; infinite where one of them is not finite.
    #[serde(with = "number")]
    pub drift: f64,
    pub skipped: u64,
    /// Steps with a non-finite loss or gradient that were not skipped.
    pub broken: u64,
    /// Loss scale from each step at which it changed.
    pub loss_scale: Vec<(u64, f64)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    pub step: u64,
    #[serde(with = "number")]
    pub loss: f64,
    #[serde(with = "number")]
    pub grad_norm: f64,
}

/// A site's report and the counts it was made from.
#[derive(Debug, Clone)]
pub struct Seen {
    pub report: SiteReport,
    elements: u64,
    /// Zeros and subnormals.
    small: u64,
}

/// Sites in the order of a pass.
pub type Sites = BTreeMap<(bool, Site), Seen>;

/// Relative difference of losses at which two precisions have parted: an order of magnitude over bf16's own noise.
const PARTED: f64 = 0.01;

/// The plan of a word of [`super::PRECISIONS`].
pub fn plan(own: PrecisionPlan, name: &str) -> PrecisionPlan {
    match name {
        "fp16_unscaled" => PrecisionPlan { loss_scaling: false, ..own.with_arithmetic("fp16") },
        other => own.with_arithmetic(other),
    }
}

/// Replays up to `last` in a precision; `wide`: the fp32 replay, to compare with.
///
/// # Errors
/// What cannot be replayed.
pub fn replay(
    replayer: &Replayer,
    from: &Start,
    last: u64,
    name: &str,
    wide: Option<&(Trajectory, Sites)>,
) -> Result<(Trajectory, Sites)> {
    let plan = plan(replayer.run().precision()?.plan, name);
    let mut collector = Collector { sites: Sites::new(), records: vec![] };
    replayer.replay(from, last, &[Intervention::Precision(plan)], &mut collector)?;
    let mut sites = collector.sites;
    for (key, seen) in &mut sites {
        let before = wide.and_then(|(_, sites)| sites.get(key)).map_or(0, |s| s.small);
        let lost = if name == "fp32" { 0 } else { seen.small.saturating_sub(before) };
        seen.report.underflow_share = lost as f64 / seen.elements.max(1) as f64;
    }
    Ok((trajectory(&collector.records, wide.map(|(t, _)| t)), sites))
}

fn trajectory(records: &[StepRecord], wide: Option<&Trajectory>) -> Trajectory {
    let points: Vec<Point> =
        records.iter().map(|r| Point { step: r.step, loss: r.loss_raw, grad_norm: r.grad_norm }).collect();
    let distance = |p: &Point| {
        let other = wide.and_then(|w| w.points.iter().find(|o| o.step == p.step)).map_or(p.loss, |o| o.loss);
        let distance = (p.loss / other).ln().abs();
        if p.loss == other {
            0.0
        } else if distance.is_nan() {
            f64::INFINITY
        } else {
            distance
        }
    };
    let mut loss_scale: Vec<(u64, f64)> = Vec::new();
    for record in records {
        if let Some(scale) = record.loss_scale.filter(|s| loss_scale.last().is_none_or(|(_, last)| last != s)) {
            loss_scale.push((record.step, scale));
        }
    }
    let broken = |r: &&StepRecord| !r.skipped && (!r.loss_raw.is_finite() || r.nonfinite > 0);
    Trajectory {
        parts_at: points.iter().find(|p| distance(p) > PARTED).map(|p| p.step),
        drift: points.iter().map(distance).fold(0.0, f64::max),
        skipped: records.iter().filter(|r| r.skipped).count() as u64,
        broken: records.iter().filter(broken).count() as u64,
        points,
        loss_scale,
    }
}

/// Gathers every site of every step.
struct Collector {
    sites: Sites,
    records: Vec<StepRecord>,
}

impl Observer for Collector {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.records.push(record.clone());
        Ok(())
    }
    fn probes(&mut self, _: u64) -> Probes {
        // Per micro-batch: one that is broken says nothing about where another breaks.
        Probes::PerUnit
    }
    fn measured(&mut self, step: u64, measurements: &[Measurement]) -> Result<()> {
        let mut broken = BTreeSet::new();
        for m in measurements {
            let seen = self.sites.entry((m.site.is_backward(), m.site)).or_insert_with(|| unseen(m.site));
            let s = &m.statistics;
            let nonfinite = s.nan + s.pos_inf + s.neg_inf;
            seen.report.max_abs = seen.report.max_abs.max(f64::from(s.max_abs));
            seen.report.nonfinite += nonfinite;
            if nonfinite > 0 {
                seen.report.first_step.get_or_insert(step);
                if broken.insert(m.unit) {
                    seen.report.arisen += nonfinite;
                    seen.report.arises_at.get_or_insert(step);
                }
            }
            seen.elements += s.elements;
            seen.small += s.zero + s.subnormal;
        }
        Ok(())
    }
}

fn unseen(site: Site) -> Seen {
    let name = site.to_string();
    let kind = match (site.layer, name.splitn(3, '.').nth(2)) {
        (Some(_), Some(kind)) => kind.to_owned(),
        _ => name.clone(),
    };
    let report = SiteReport {
        site: name,
        layer: site.layer,
        kind,
        backward: site.is_backward(),
        max_abs: 0.0,
        nonfinite: 0,
        first_step: None,
        arisen: 0,
        arises_at: None,
        underflow_share: 0.0,
    };
    Seen { report, elements: 0, small: 0 }
}

/// The states of the unchanged replay after each of `steps`, ascending; of the fp32 replay where the run scales its loss,
/// because a run whose steps are skipped has no moments and goes nowhere. The gradient of such a step's own window is
/// taken at the weights it led to: any weights of the run serve the comparison, and these have moments.
///
/// # Errors
/// What cannot be replayed.
pub fn states(replayer: &Replayer, from: &Start, steps: &[u64]) -> Result<Vec<TrainState>> {
    let mut keeper = Keeper { wanted: steps, states: vec![] };
    let last = steps.iter().max().copied().unwrap_or(1);
    let own = replayer.run().precision()?.plan;
    let wide = Intervention::Precision(plan(own, "fp32"));
    replayer.replay(from, last, if own.loss_scaling { std::slice::from_ref(&wide) } else { &[] }, &mut keeper)?;
    Ok(keeper.states)
}

/// Keeps the states after steps.
struct Keeper<'a> {
    wanted: &'a [u64],
    states: Vec<TrainState>,
}

impl Observer for Keeper<'_> {
    fn wants_state(&mut self, step: u64) -> bool {
        self.wanted.contains(&step)
    }
    fn state(&mut self, _: &dyn Device, state: &TrainState) -> Result<()> {
        self.states.push(state.clone());
        Ok(())
    }
}
