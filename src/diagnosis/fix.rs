//! The smallest change that removes the spike, replayed past it.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::detect::Found;
use super::diagnose::{proof, proof_end};
use super::height::{self, Point};
use super::investigate::{Budget, Investigation};
use super::laboratory::{Laboratory, Subject};
use super::{Cause, CurvePoint, Experiment, Fix, RowBlame, plan};
use crate::Result;
use crate::error::Kind;
use crate::replay::{Intervention, Start, Trace};

/// Replays the cause's change past the spike; `None` where no setting of the run helps, or where the change does
/// not hold over the following steps.
///
/// # Errors
/// Only Ctrl-C.
pub fn prove(
    subject: &Subject<'_>,
    lab: &mut dyn Laboratory,
    found: &Found,
    investigation: &Investigation,
    cause: Cause,
    rows: &[RowBlame],
    budget: &mut Budget,
) -> Result<Option<Fix>> {
    // The rate held is what an experiment can afford; what a user would write is the schedule without its restarts.
    let written = match cause {
        Cause::Schedule => plan::one_cosine(subject),
        _ => None,
    };
    let written = written.map(|p| (Start::Initial, p.interventions, p.changes, None));
    for (start, interventions, changes, note) in written.into_iter().chain(change(subject, investigation, cause, rows))
    {
        let trace = match lab.replay(&start, proof_end(subject, found.step), &interventions) {
            Err(error) if error.kind == Kind::Interrupted => return Err(error),
            Err(_) => continue,
            Ok(trace) => trace,
        };
        let acts =
            interventions.iter().find_map(|i| if let Intervention::After(step) = i { Some(*step) } else { None });
        budget.proof += trace.steps.iter().filter(|r| acts.is_none_or(|step| r.step > step)).count() as u64;
        let experiment = measured(subject, found, &trace);
        if experiment.height <= 0.5 * investigation.evidence.reference_height() {
            return Ok(Some(proof(&experiment, changes, note)));
        }
    }
    Ok(None)
}

pub(super) const BEFORE_THE_FAULT: &str = "The checkpoint was written before the fault; the replay from it is quiet.";

type Change = (Start, Vec<Intervention>, BTreeMap<String, Value>, Option<String>);

/// What a user would set, and the interventions that replay it.
fn change(subject: &Subject<'_>, investigation: &Investigation, cause: Cause, rows: &[RowBlame]) -> Option<Change> {
    if cause == Cause::Hardware {
        let (before, changes) = resume_before(subject, investigation.evidence.step)?;
        return Some((before, Vec::new(), changes, Some(BEFORE_THE_FAULT.to_string())));
    }
    let evidence = &investigation.evidence;
    let (index, trial) = evidence.smallest_change(cause)?;
    let tried = investigation.tried.get(index)?;
    let mut interventions = tried.interventions.clone();
    let mut changes = trial.changes.clone();
    let mut note = None;
    match cause {
        Cause::Data => {
            interventions = vec![Intervention::NeutraliseRows(rows.iter().filter_map(|r| subject.row_id(r)).collect())];
            changes = BTreeMap::from([(
                "remove_rows".to_string(),
                json!(rows.iter().map(|r| format!("{}:{}", r.dataset, r.row)).collect::<Vec<_>>()),
            )]);
            note = Some("Removing rows changes the number of rows and so the whole order; the proof masks their labels instead.".to_string());
        }
        Cause::Fp16Overflow => {
            changes = BTreeMap::from([("fp16".to_string(), json!(false)), ("bf16".to_string(), json!(true))]);
        }
        Cause::Schedule if changes.contains_key("learning_rate") => {
            note = Some(
                "A schedule without the jump is not one key of the YAML: start the continuation as a new run whose \
                 learning_rate is no higher than where the first one ended."
                    .to_string(),
            );
        }
        Cause::OptimizerState => {
            changes = BTreeMap::from([("save_only_model".to_string(), json!(false))]);
            note = Some(
                "Resume from a checkpoint with optimizer.pt and scheduler.pt, or replay the steps from an earlier one."
                    .to_string(),
            );
        }
        Cause::GradientAccumulation => {
            note = Some(
                "The proof gave every update so many micro-batches and kept the number of updates; with the same \
                 num_train_epochs the run makes fewer of them."
                    .to_string(),
            );
        }
        Cause::TrainerBookkeeping | Cause::MaskedLabels => return None,
        _ => {}
    }
    Some((tried.start.clone(), interventions, changes, note))
}

/// The checkpoint before `step`, and what a user writes to go on from it.
pub(super) fn resume_before(subject: &Subject<'_>, step: u64) -> Option<(Start, BTreeMap<String, Value>)> {
    let start = subject.starts_before(step).into_iter().next()?;
    let Start::Checkpoint(saved) = start else { return None };
    let folder = subject.run.config.output_dir.join(format!("checkpoint-{saved}"));
    Some((start, BTreeMap::from([("resume_from_checkpoint".to_string(), json!(folder))])))
}

fn measured(subject: &Subject<'_>, found: &Found, trace: &Trace) -> Experiment {
    let points: Vec<Point> = trace.steps.iter().map(Point::replayed).collect();
    let first = points.first().map_or(0, |p| p.step);
    let history: Vec<Point> = subject.points.iter().filter(|p| p.step < first).copied().collect();
    let last = points.last().map_or(found.step, |p| p.step);
    Experiment {
        name: "fix".into(),
        changes: BTreeMap::new(),
        height: height::of(found.kind, &points, &history, found.step..=last),
        removed: true,
        cause: None,
        windows: points.len() as u64,
        curve: trace
            .steps
            .iter()
            .map(|r| CurvePoint { step: r.step, loss: r.loss_raw, grad_norm: r.grad_norm })
            .collect(),
    }
}
