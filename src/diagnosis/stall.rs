//! A half-precision adapter whose updates are lost to rounding: no spike, only a loss that falls too slowly.

use std::collections::BTreeMap;

use serde_json::json;

use super::height::{self, Point};
use super::investigate::Budget;
use super::laboratory::{Laboratory, Subject};
use super::{Cause, Confidence, CurvePoint, Experiment, Fix, Spike, SpikeKind, Verdict};
use crate::Result;
use crate::device::DType;
use crate::model::PrecisionPlan;
use crate::replay::{Intervention, Start, Trace};

/// A loss this much higher (in ln) over the second half of the replayed steps is a stall: half-precision noise
/// differs in sign from step to step and averages out far below.
const LEAST: f64 = 0.03;
/// Steps replayed of each.
const STEPS: u64 = 40;

/// A stall with its proof.
#[derive(Debug)]
pub struct Stall {
    pub spike: Spike,
    pub experiments: Vec<Experiment>,
    pub fix: Option<Fix>,
}

/// Replays the beginning with the adapter in fp32 and compares. `None`: the adapter is fp32 already, or no worse.
///
/// # Errors
/// What cannot be replayed.
pub fn look(subject: &Subject<'_>, lab: &mut dyn Laboratory, budget: &mut Budget) -> Result<Option<Stall>> {
    if subject.plan.adapter == DType::F32 {
        return Ok(None);
    }
    let to = STEPS.min(subject.last_step());
    let baseline = lab.replay(&Start::Initial, to, &[])?;
    budget.baseline += baseline.steps.len() as u64;
    let plan = PrecisionPlan { adapter: DType::F32, ..subject.plan };
    let fp32 = lab.replay(&Start::Initial, to, &[Intervention::Precision(plan)])?;
    budget.used += fp32.steps.len() as u64;
    let points = |t: &Trace| t.steps.iter().map(Point::replayed).collect::<Vec<_>>();
    let (own, other) = (points(&baseline), points(&fp32));
    let lost = height::lost_progress(&own, &other);
    let half = &own[own.len() / 2..];
    let worse = half.iter().filter(|p| other.iter().any(|q| q.step == p.step && p.loss > q.loss)).count();
    if lost.is_nan() || lost < LEAST || worse * 5 < half.len() * 4 {
        return Ok(None);
    }
    let changes = BTreeMap::from([("pure_bf16".to_string(), json!(false)), ("bf16".to_string(), json!(true))]);
    let (first, last) = (half.first(), half.last());
    let experiment = |name: &str, trace: &Trace, height: f64, cause: Option<Cause>| Experiment {
        name: name.into(),
        changes: if cause.is_some() { changes.clone() } else { BTreeMap::new() },
        height,
        removed: cause.is_some(),
        cause,
        windows: trace.steps.len() as u64,
        curve: trace
            .steps
            .iter()
            .map(|r| CurvePoint { step: r.step, loss: r.loss_raw, grad_norm: r.grad_norm })
            .collect(),
    };
    let verdict = Verdict {
        cause: Cause::Bf16Rounding,
        also_sufficient: Vec::new(),
        confidence: if lost > 3.0 * LEAST { Confidence::Strong } else { Confidence::Moderate },
        harmful: true,
        summary: format!(
            "Updates are lost when the adapter is rounded to half precision: over steps {} to {} the loss is {:.0} % above \
             that of the same run with an fp32 adapter. Keep the adapter in fp32.",
            first.map_or(0, |p| p.step),
            last.map_or(0, |p| p.step),
            100.0 * lost.exp_m1()
        ),
    };
    let spike = Spike {
        step: first.map_or(1, |p| p.step),
        until: last.map_or(1, |p| p.step),
        kind: SpikeKind::Stall,
        before: None,
        at: first.map_or(f64::NAN, |p| p.loss),
        height: lost,
        verdict,
    };
    let fix = Fix { changes: changes.clone(), height: 0.0, checked_steps: to, note: None };
    let experiments = vec![
        experiment("baseline", &baseline, lost, None),
        experiment("keep the adapter in fp32", &fp32, 0.0, Some(Cause::Bf16Rounding)),
    ];
    Ok(Some(Stall { spike, experiments, fix: Some(fix) }))
}
