//! The whole diagnosis: spikes of the log, the largest one in full, the others as far as the budget goes, the fix.

use std::collections::BTreeMap;

use super::detect::{self, Found};
use super::height::{self, Point};
use super::investigate::{Budget, Investigation, PAST, Tried, investigate};
use super::laboratory::{Laboratory, Subject, step_of};
use super::{Cause, CertificateSummary, Confidence, Cost, Diagnosis, Envelope, Experiment, Finding, Fix, RowBlame};
use super::{SCHEMA, Spike, SpikeKind, Verdict};
use super::{departure, fix, mechanism, quiet, shares, suspects, verdict};
use crate::error::Kind;
use crate::probe::Measurement;
use crate::replay::{Start, StepRecord};
use crate::run::LogRow;
use crate::{Error, Result};

/// What the user asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Options {
    /// `--spike`: the spike at or nearest to this step gets the top verdict.
    pub spike: Option<u64>,
    /// Optimizer steps that experiments may replay …
    pub windows: u64,
    /// … and seconds within which they may exceed it, if the user gave some.
    pub seconds: Option<f64>,
    pub vocab_size: Option<usize>,
}

/// Spikes beyond the largest that are looked into.
const OTHERS: usize = 6;

/// A diagnosis and what its report shows beside it.
#[derive(Debug)]
pub struct Answer {
    pub diagnosis: Diagnosis,
    /// The unchanged replay around the largest spike.
    pub baseline: Vec<StepRecord>,
    /// Every site at the spike's step.
    pub measured: Vec<Measurement>,
}

/// Diagnoses a run.
///
/// # Errors
/// Ctrl-C. What cannot be replayed leaves the verdict open and says so in the findings.
pub fn diagnose(subject: &Subject<'_>, lab: &mut dyn Laboratory, options: &Options) -> Result<Answer> {
    let mut budget = Budget::new(options.windows, options.seconds);
    let mut found = detect::spikes(&subject.rows, &subject.context(options.vocab_size));
    rank(&mut found, &subject.rows, options.spike);
    if let (true, Some(step)) = (found.is_empty(), options.spike) {
        found.extend(asked_for(subject, step));
    }
    let mut looked_into: Vec<(Found, Investigation)> = Vec::new();
    let mut top = None;
    for spike in found.iter().take(1 + OTHERS) {
        // Without a window left, a look could only say that nothing was found.
        if top.is_some() && !budget.allows(1) {
            break;
        }
        let investigation = investigate(subject, lab, spike, top, &mut budget)?;
        if top.is_none() {
            let cause = verdict::judge(&investigation.evidence).cause;
            looked_into.push((*spike, investigation));
            if matches!(cause, Cause::None | Cause::Undetermined | Cause::Hardware) {
                break;
            }
            top = Some(cause);
        } else {
            looked_into.push((*spike, investigation));
        }
    }
    if looked_into.is_empty() {
        return quiet::diagnose(subject, lab, &mut budget);
    }
    assemble(subject, lab, &found, looked_into, &mut budget)
}

/// Largest first, explosions of the gradient norm alone after everything that shows in the loss; the spike
/// that was asked for before all.
fn rank(found: &mut [Found], rows: &[LogRow], asked: Option<u64>) {
    let gradient = |f: &Found| f.kind == SpikeKind::GradientExplosion;
    let size = |f: &Found| height::size(rows, f);
    found.sort_by(|a, b| gradient(a).cmp(&gradient(b)).then(size(b).total_cmp(&size(a))).then(a.step.cmp(&b.step)));
    if let Some(step) = asked {
        let away = |f: &Found| if step < f.step { f.step - step } else { step.saturating_sub(f.until) };
        found.sort_by_key(away);
    }
}

/// The user sees a spike where the detection sees none.
fn asked_for(subject: &Subject<'_>, step: u64) -> Option<Found> {
    let index = subject.rows.iter().position(|r| r.step >= step)?;
    let row = &subject.rows[index];
    let series = &subject.points;
    let height = height::of(SpikeKind::Jump, series, &[], row.step..=row.step);
    let recent = series.iter().rev().filter(|p| p.step < row.step).take(3).map(|p| p.loss);
    Some(Found {
        index,
        step: row.step,
        until: row.step,
        kind: SpikeKind::Jump,
        before: recent.reduce(f64::min),
        at: row.loss.unwrap_or(f64::NAN),
        height,
    })
}

fn assemble(
    subject: &Subject<'_>,
    lab: &mut dyn Laboratory,
    found: &[Found],
    looked_into: Vec<(Found, Investigation)>,
    budget: &mut Budget,
) -> Result<Answer> {
    let mut spikes: Vec<Spike> = Vec::new();
    let mut rows: Vec<RowBlame> = Vec::new();
    let top = verdict::judge(&looked_into[0].1.evidence);
    for (spike, investigation) in &looked_into {
        let verdict = verdict::judge(&investigation.evidence);
        // A row that is bad in another state too is bad whether or not a window was left to try the spike without it.
        if matches!(top.cause, Cause::Data | Cause::MaskedLabels) {
            rows.extend(investigation.evidence.rows.iter().cloned());
        }
        spikes.push(spike_with(spike, verdict));
    }
    spikes.extend(found.iter().skip(looked_into.len()).map(|spike| spike_with(spike, not_looked_into(spike))));
    spikes.sort_by_key(|s| s.step);
    let rows = suspects::each_once(rows);

    let Some((spike, mut first)) = looked_into.into_iter().next() else {
        return Err(Error::internal("a diagnosis without a spike was assembled as one with"));
    };
    let mut top = top;
    if !rows.is_empty() && rows.len() > first.evidence.rows.len() {
        // The other spikes showed more rows of the same kind; the summary names them all.
        first.evidence.rows.clone_from(&rows);
        top = verdict::judge(&first.evidence);
        // One of the listed spikes carries the verdict, word for word: that is how a reader finds its step.
        spikes.iter_mut().filter(|s| s.step == spike.step).for_each(|s| s.verdict.clone_from(&top));
    }
    // A step that the replay does not show cannot be divided among changes that were tried for other reasons.
    let shares = match top.cause {
        Cause::Hardware => BTreeMap::new(),
        _ => shares_of(lab, &first, spike.step, budget)?,
    };
    let fix = match top.harmful {
        true => fix::prove(subject, lab, &spike, &first, top.cause, &rows, budget)?,
        false => None,
    };
    let certificate = certificate(subject, &first);
    let measured = match &first.start {
        Some(start) if top.cause != Cause::None => measured(lab, start, spike.step)?,
        _ => Vec::new(),
    };
    let diagnosis = Diagnosis {
        schema: SCHEMA.to_string(),
        shares,
        sites: mechanism::sites(&first.baseline, spike.step, &measured),
        findings: findings(&first),
        fault: first.evidence.fault.filter(|_| top.cause == Cause::Hardware),
        experiments: first.experiments,
        spikes,
        verdict: top,
        rows,
        fix,
        certificate,
        windows_replayed: budget.used,
        cost: cost_of(budget, lab),
    };
    Ok(Answer { diagnosis, baseline: first.baseline, measured })
}

fn measured(lab: &mut dyn Laboratory, start: &Start, step: u64) -> Result<Vec<Measurement>> {
    match lab.measure(start, step) {
        Err(error) if error.kind == Kind::Interrupted => Err(error),
        // The verdict stands without the map of sites.
        Err(_) => Ok(Vec::new()),
        Ok(measured) => Ok(measured),
    }
}

fn spike_with(found: &Found, verdict: Verdict) -> Spike {
    Spike {
        step: found.step,
        until: found.until,
        kind: found.kind,
        before: found.before,
        at: found.at,
        height: found.height,
        verdict,
    }
}

fn not_looked_into(found: &Found) -> Verdict {
    Verdict {
        cause: Cause::Undetermined,
        also_sufficient: Vec::new(),
        confidence: Confidence::Weak,
        harmful: found.until > found.step,
        summary: format!("Not looked into; `--spike {}` does.", found.step),
    }
}

pub(super) fn not_replayed(error: &Error) -> Finding {
    Finding {
        code: "not_replayed".into(),
        severity: "warning".into(),
        message: match &error.next {
            Some(next) => format!("The run could not be replayed: {}. Try: {next}", error.what),
            None => format!("The run could not be replayed: {}.", error.what),
        },
        place: error.place.clone().unwrap_or_default(),
    }
}

fn findings(investigation: &Investigation) -> Vec<Finding> {
    let mut all: Vec<Finding> = investigation.failure.iter().map(not_replayed).collect();
    if investigation.evidence.baseline.before == super::evidence::Match::Off {
        all.push(Finding {
            code: "replay_mismatch".into(),
            severity: "warning".into(),
            message: "The replay differs from the log before the spike: model, data or versions are not the run's."
                .into(),
            place: investigation.differences.first().map_or_else(String::new, |d| format!("step {}", d.step)),
        });
    }
    all
}

fn certificate(subject: &Subject<'_>, investigation: &Investigation) -> Option<CertificateSummary> {
    let start = investigation.start.as_ref()?;
    Some(summary_of(subject, &investigation.differences, step_of(start) + 1))
}

pub(super) fn summary_of(
    subject: &Subject<'_>,
    differences: &[departure::Difference],
    from: u64,
) -> CertificateSummary {
    let floor = subject.floor();
    let departs_at = departure::first_beyond(differences, floor);
    let before = || differences.iter().filter(|d| departs_at.is_none_or(|at| d.step < at));
    let worst = |values: &mut dyn Iterator<Item = f64>| values.filter(|v| !v.is_nan()).fold(0.0, f64::max);
    let verdict = match (differences.is_empty(), departs_at) {
        (true, _) => "no_log",
        (false, None) => "reproduced",
        (false, Some(_)) => "departs",
    };
    CertificateSummary {
        verdict: verdict.to_string(),
        from,
        to: differences.last().map_or(from, |d| d.step),
        departs_at,
        loss_max_rel: worst(&mut before().map(|d| d.loss)),
        grad_norm_max_rel: worst(&mut before().map(|d| d.grad_norm)),
        envelope: Envelope { loss: floor.loss, grad_norm: floor.grad_norm },
    }
}

pub(super) fn cost_of(budget: &Budget, lab: &dyn Laboratory) -> Cost {
    let Budget { used, baseline, proof, limit, .. } = *budget;
    Cost { limit, baseline, experiments: used, proof, cached: lab.cached() }
}

/// The part of the height that the best trial of each cause removes, and two together where neither alone removes
/// all of it, divided by Shapley.
fn shares_of(
    lab: &mut dyn Laboratory,
    investigation: &Investigation,
    step: u64,
    budget: &mut Budget,
) -> Result<BTreeMap<String, f64>> {
    let evidence = &investigation.evidence;
    let reference = evidence.reference_height();
    let mut best: BTreeMap<Cause, (f64, &Tried)> = BTreeMap::new();
    for (trial, tried) in evidence.trials.iter().zip(&investigation.tried) {
        let part = 1.0 - trial.height / reference;
        if part.is_finite() && best.get(&trial.cause).is_none_or(|(most, _)| part > *most) {
            best.insert(trial.cause, (part.max(0.0), tried));
        }
    }
    let removed: BTreeMap<Cause, f64> = best.iter().map(|(&c, (part, _))| (c, *part)).collect();
    let moved: Vec<Cause> = removed.iter().filter(|(_, v)| **v >= shares::LEAST).map(|(&c, _)| c).collect();
    let mut together = BTreeMap::new();
    for (i, a) in moved.iter().enumerate() {
        for b in &moved[i + 1..] {
            // Where one of them removes nearly all, both do.
            if removed[a].max(removed[b]) >= 1.0 - shares::LEAST {
                continue;
            }
            if let Some(part) = joint(lab, investigation, (best[a].1, best[b].1), step, budget)? {
                together.insert(vec![*a, *b], part);
            }
        }
    }
    Ok(shares::shapley(&removed, &together))
}

/// What two changes remove together; `None` where the budget or the changes do not allow the replay.
fn joint(
    lab: &mut dyn Laboratory,
    investigation: &Investigation,
    (a, b): (&Tried, &Tried),
    step: u64,
    budget: &mut Budget,
) -> Result<Option<f64>> {
    if a.start != b.start {
        return Ok(None);
    }
    let (to, first) = (step + PAST, step_of(&a.start));
    let mut interventions = a.interventions.clone();
    interventions.extend(b.interventions.iter().filter(|i| !a.interventions.contains(i)).cloned());
    if !budget.allows(to - first) {
        return Ok(None);
    }
    let trace = match lab.replay(&a.start, to, &interventions) {
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Err(_) => return Ok(None),
        Ok(trace) => trace,
    };
    budget.used += trace.steps.len() as u64;
    let evidence = &investigation.evidence;
    let points: Vec<Point> = trace.steps.iter().map(Point::replayed).collect();
    let before: Vec<Point> = investigation.baseline.iter().map(Point::replayed).collect();
    let height = height::of(evidence.kind, &points, &before, step..=to);
    let part = 1.0 - height / evidence.reference_height();
    Ok(part.is_finite().then_some(part))
}

/// An experiment as the fix's proof.
pub(super) fn proof(
    experiment: &Experiment,
    changes: BTreeMap<String, serde_json::Value>,
    note: Option<String>,
) -> Fix {
    Fix { changes, height: experiment.height, checked_steps: experiment.curve.len() as u64, note }
}

/// Last step of a proof: three times the steps that belong to a spike (design acceptance: at most 3×).
pub(super) fn proof_end(subject: &Subject<'_>, step: u64) -> u64 {
    (step + 3 * PAST).min(subject.last_step())
}
