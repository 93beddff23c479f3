//! A log without a spike: is it the run's, does it hide a fault, and did its updates get lost?

use std::collections::BTreeMap;

use super::diagnose::{Answer, cost_of, not_replayed, summary_of};
use super::height::Point;
use super::investigate::Budget;
use super::laboratory::{Laboratory, Subject, step_of};
use super::{Cause, CertificateSummary, Confidence, Cost, Diagnosis, Finding, Fix, SCHEMA, Verdict};
use super::{departure, fix, hardware, stall};
use crate::Result;
use crate::error::Kind;
use crate::replay::{Start, StepRecord};

/// Steps replayed for the certificate of a log without spikes.
const CERTIFIED: u64 = 8;

/// No spike in the log: certify its end, and ask whether a half-precision adapter lost updates.
pub(super) fn diagnose(subject: &Subject<'_>, lab: &mut dyn Laboratory, budget: &mut Budget) -> Result<Answer> {
    let mut baseline = Vec::new();
    let mut diagnosis = Diagnosis {
        schema: SCHEMA.to_string(),
        spikes: Vec::new(),
        verdict: Verdict {
            cause: Cause::None,
            also_sufficient: Vec::new(),
            confidence: Confidence::Strong,
            harmful: false,
            summary: "The log shows no spike.".to_string(),
        },
        shares: BTreeMap::new(),
        rows: Vec::new(),
        sites: Vec::new(),
        experiments: Vec::new(),
        fix: None,
        fault: None,
        certificate: None,
        findings: Vec::new(),
        windows_replayed: 0,
        cost: Cost::default(),
    };
    if subject.rows.iter().all(|row| row.loss.is_none()) {
        diagnosis.verdict = nothing_logged();
        return Ok(Answer { diagnosis, baseline, measured: Vec::new() });
    }
    match stall::look(subject, lab, budget) {
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Ok(Some(stall)) => {
            diagnosis.verdict = stall.spike.verdict.clone();
            diagnosis.spikes = vec![stall.spike];
            diagnosis.experiments = stall.experiments;
            diagnosis.fix = stall.fix;
        }
        Ok(None) | Err(_) => {}
    }
    match certified(subject, lab, budget) {
        Err(error) if error.kind == Kind::Interrupted => return Err(error),
        Err(error) => {
            diagnosis.verdict.confidence = Confidence::Moderate;
            diagnosis.findings.push(not_replayed(&error));
        }
        Ok(mut quiet) => {
            if let Some(parted) = quiet.parted {
                hidden_fault(subject, lab, &mut quiet, parted, budget, &mut diagnosis)?;
            }
            diagnosis.certificate = Some(quiet.certificate);
            baseline = quiet.steps;
        }
    }
    diagnosis.windows_replayed = budget.used;
    diagnosis.cost = cost_of(budget, lab);
    Ok(Answer { diagnosis, baseline, measured: Vec::new() })
}

/// A missing log is not a quiet one.
fn nothing_logged() -> Verdict {
    Verdict {
        cause: Cause::Undetermined,
        also_sufficient: Vec::new(),
        confidence: Confidence::Weak,
        harmful: false,
        summary: "There is no log of a training step, so nothing shows whether the loss spiked. Check output_dir and \
                  --root: trainer_log.jsonl or trainer_state.json is read from there. `spikeprobe replay` computes the \
                  losses without a log."
            .to_string(),
    }
}

/// The end of a quiet log, replayed.
struct Quiet {
    certificate: CertificateSummary,
    start: Start,
    /// Where the replay parts after bits that were all equal: perhaps a fault too small for a spike.
    parted: Option<departure::Difference>,
    steps: Vec<StepRecord>,
}

/// Holds a quiet log against the replay: as many of its last steps as the budget allows while they are equal to the last
/// bit, else the few that no chaos has reached yet.
fn certified(subject: &Subject<'_>, lab: &mut dyn Laboratory, budget: &mut Budget) -> Result<Quiet> {
    let (last, limit) = (subject.last_step(), budget.limit);
    let mut replay = |start: &Start, to: u64| -> Result<(Vec<departure::Difference>, Quiet)> {
        let trace = lab.replay(start, to.min(last), &[])?;
        budget.baseline += trace.steps.len() as u64;
        let points: Vec<Point> = trace.steps.iter().map(Point::comparable).collect();
        let differences = departure::differences(&points, &subject.points, subject.rounding());
        let certificate = summary_of(subject, &differences, step_of(start) + 1);
        let parted = departure::first_after_exact(&differences).copied();
        Ok((differences, Quiet { certificate, start: start.clone(), parted, steps: trace.steps }))
    };
    let starts = subject.starts_before(last);
    let nearest = starts.first().cloned().unwrap_or(Start::Initial);
    let (differences, short) = replay(&nearest, step_of(&nearest) + CERTIFIED)?;
    let earliest = starts.iter().rfind(|start| last - step_of(start) <= limit);
    let Some(earliest) = earliest.filter(|_| departure::is_exact(&differences)) else { return Ok(short) };
    let (differences, long) = replay(earliest, last)?;
    Ok(if long.parted.is_some() || departure::is_exact(&differences) { long } else { short })
}

/// Says of a quiet log that a step is not what its inputs give, and which bit flipped if one explains it.
fn hidden_fault(
    subject: &Subject<'_>,
    lab: &mut dyn Laboratory,
    quiet: &mut Quiet,
    parted: departure::Difference,
    budget: &mut Budget,
    diagnosis: &mut Diagnosis,
) -> Result<()> {
    let (step, little) = (parted.step, parted.is_rounding());
    // A loss of four decimals alone cannot prove by its bits.
    if little && parted.grad_norm.is_nan() && subject.rounding() > 0.0 {
        return Ok(());
    }
    let fault = hardware::locate(subject, lab, &quiet.start, (step, little), budget)?;
    if little && !fault.proved {
        return Ok(());
    }
    // However little: every step before was equal.
    let certificate = &mut quiet.certificate;
    (certificate.verdict, certificate.departs_at) = ("departs".to_string(), Some(step));
    (certificate.loss_max_rel, certificate.grad_norm_max_rel) = (0.0, 0.0);
    diagnosis.findings.push(Finding {
        code: "parts_exactly".into(),
        severity: "warning".into(),
        message: format!(
            "Replay and log agree to the last bit up to step {} and part at step {step}: {}.",
            step - 1,
            fault.message
        ),
        place: format!("step {step}"),
    });
    let verdict = &mut diagnosis.verdict;
    if verdict.cause != Cause::None {
        return Ok(());
    }
    if !fault.proved {
        verdict.summary =
            format!("The log shows no spike, but step {step} is not what the files give: see the findings.");
        return Ok(());
    }
    (verdict.cause, verdict.harmful) = (Cause::Hardware, true);
    verdict.summary = format!(
        "The log shows no spike, but a bit flipped: {}. Injected into the replay, it gives the logged numbers. Check the \
         device's memory (ECC) and resume from the checkpoint before it.",
        fault.message
    );
    // The unchanged replay went through the same steps, and is as quiet there as before.
    let checked_steps = quiet.steps.iter().filter(|record| record.step >= step).count() as u64;
    let note = Some(fix::BEFORE_THE_FAULT.to_string());
    diagnosis.fix =
        fix::resume_before(subject, step).map(|(_, changes)| Fix { changes, height: 0.0, checked_steps, note });
    diagnosis.fault = Some(fault);
    Ok(())
}
