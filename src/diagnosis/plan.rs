//! Which changes are worth a replay for one spike: a pure function of what the log and the baseline show.
//!
//! Each proposal changes one factor to its reference value. Learning rates are bisected elsewhere, because each
//! replay there decides the next one.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::laboratory::Subject;
use super::rows::Suspect;
use super::{Cause, SpikeKind, rows};
use crate::batches::RowId;
use crate::device::DType;
use crate::model::PrecisionPlan;
use crate::replay::{Intervention, StepRecord};
use crate::run::{LossRule, ResumeOrder, TrainerSemantics, WindowRule};

/// Reference values (design 5.3): LLaMA-Factory's default clipping, and the accumulation of its own examples.
const CLIPPING: f64 = 1.0;
const ACCUMULATION: usize = 8;
/// A learning rate that rises by this factor within a step after it had fallen is a jump.
const JUMP: f64 = 2.0;
/// Of the rate it jumped to: below it a learning rate is spent, and at it the continuation is gentle.
const SPENT: f64 = 0.1;
/// Updates through which a jump of the learning rate can still be the cause of a spike.
const AFTERMATH: u64 = 16;

/// Where a proposal has to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// A few steps before the spike; further back where the damage was done before.
    Near,
    /// Any start point before this step, up to and including which the run stays as it was.
    Before(u64),
    /// The beginning: the change alters the run from its first step.
    Initial,
}

/// One counterfactual replay to make.
#[derive(Debug, Clone, PartialEq)]
pub struct Proposal {
    pub cause: Cause,
    pub name: String,
    pub changes: BTreeMap<String, Value>,
    pub interventions: Vec<Intervention>,
    pub from: From,
}

/// What is known about the spike before the trials.
#[derive(Debug)]
pub struct Situation<'a> {
    pub step: u64,
    pub kind: SpikeKind,
    /// The unchanged replay around the spike.
    pub baseline: &'a [StepRecord],
    /// Micro-batches that stand out, and did so in an earlier state too.
    pub suspects: &'a [Suspect],
}

/// Everything worth trying but the learning rate, most specific first.
pub fn proposals(subject: &Subject<'_>, situation: &Situation<'_>) -> Vec<Proposal> {
    let mut all = Vec::new();
    all.extend(bookkeeping(subject, situation));
    all.extend(masked_labels(situation));
    all.extend(precision(subject));
    all.extend(data(subject, situation));
    all.extend(optimizer_state(subject, situation));
    all.extend(schedule(subject, situation));
    all.extend(clipping(subject));
    all.extend(accumulation(subject));
    all
}

fn proposal(
    cause: Cause,
    name: String,
    key: &str,
    value: Value,
    interventions: Vec<Intervention>,
    from: From,
) -> Proposal {
    Proposal { cause, name, changes: BTreeMap::from([(key.to_string(), value)]), interventions, from }
}

fn set(key: &str, value: Value) -> Intervention {
    Intervention::Set { key: key.to_string(), value }
}

/// What the newest trainer would do with the same configuration.
pub fn sound_semantics(semantics: TrainerSemantics) -> TrainerSemantics {
    TrainerSemantics {
        windows: WindowRule::Ceil,
        loss: LossRule::TokenMean,
        count_shifted: false,
        resume_order: ResumeOrder::Right,
        resume_restarts_count: false,
        ..semantics
    }
}

/// A leaked window, a loss that is a multiple, or an order that a resume got wrong.
fn bookkeeping(subject: &Subject<'_>, situation: &Situation<'_>) -> Option<Proposal> {
    let semantics = subject.run.semantics;
    let leaked = |r: &&StepRecord| r.step.abs_diff(situation.step) <= 1 && r.micro_batches.iter().any(|m| m.leaked);
    let leaks = situation.baseline.iter().any(|r| leaked(&r));
    let undivided = situation.kind == SpikeKind::Level && semantics.loss == LossRule::MeanUndivided;
    let resumed = subject.run.attempts.iter().filter_map(|a| a.resumed_from).any(|from| {
        let wrong = semantics.resume_order == ResumeOrder::EpochZero || semantics.resume_restarts_count;
        wrong && situation.step > from && situation.step <= from + AFTERMATH
    });
    let name = if leaks {
        "leave out the micro-batches leaked from the window before"
    } else if undivided {
        "divide the loss by the accumulation"
    } else if resumed {
        "resume in the right order"
    } else {
        return None;
    };
    let change = vec![Intervention::Semantics(sound_semantics(semantics))];
    let from = if undivided { From::Initial } else { From::Near };
    Some(proposal(Cause::TrainerBookkeeping, name.into(), "trainer", json!("as transformers 5.6"), change, from))
}

/// Bookkeepings that could have given a step which this run's trainer, as far as it is known, would not.
pub fn other_trainers(subject: &Subject<'_>, baseline: &[StepRecord], step: u64) -> Vec<Proposal> {
    let now = subject.run.semantics;
    let epoch_of = |s: u64| baseline.iter().find(|r| r.step == s).map(|r| r.epoch);
    let boundary = match (epoch_of(step.saturating_sub(1)), epoch_of(step)) {
        (Some(before), Some(at)) => before.ceil() < at.ceil() || before.fract() == 0.0,
        _ => false,
    };
    let resumed = subject.run.attempts.iter().filter_map(|a| a.resumed_from).any(|k| step > k && step <= k + AFTERMATH);
    let mut rows = Vec::new();
    if boundary && now.windows == WindowRule::Ceil {
        rows.push((
            "a trainer that leaks the last window of an epoch",
            TrainerSemantics { windows: WindowRule::FloorLeak, ..now },
        ));
    }
    if resumed {
        let other = match now.resume_order {
            ResumeOrder::Right => ResumeOrder::EpochZero,
            ResumeOrder::EpochZero => ResumeOrder::Right,
        };
        rows.push(("the other order after a resume", TrainerSemantics { resume_order: other, ..now }));
        let counts = !now.resume_restarts_count;
        rows.push(("the other count after a resume", TrainerSemantics { resume_restarts_count: counts, ..now }));
    }
    if step == 1 && now.loss != LossRule::MeanUndivided {
        rows.push((
            "a trainer that does not divide the loss",
            TrainerSemantics { loss: LossRule::MeanUndivided, ..now },
        ));
    }
    let make = |(name, semantics): (&str, TrainerSemantics)| {
        let change = vec![Intervention::Semantics(semantics)];
        proposal(Cause::TrainerBookkeeping, name.into(), "trainer", json!(name), change, From::Near)
    };
    rows.into_iter().map(make).collect()
}

/// A window without labels: the neighbouring window in its place.
fn masked_labels(situation: &Situation<'_>) -> Option<Proposal> {
    let record = situation.baseline.iter().find(|r| r.step == situation.step)?;
    if record.micro_batches.iter().any(|m| m.label_tokens > 0) {
        return None;
    }
    let with = if situation.step > 1 { situation.step - 1 } else { situation.step + 1 };
    let change = vec![Intervention::SwapWindow { step: situation.step, with }];
    let name = format!("the window of step {with} in place of that of step {}", situation.step);
    Some(proposal(Cause::MaskedLabels, name, "window", json!(with), change, From::Near))
}

fn precision(subject: &Subject<'_>) -> Vec<Proposal> {
    let plan = subject.plan;
    let mut all = Vec::new();
    if plan.autocast == Some(DType::F16) || plan.base == DType::F16 {
        let half = |dtype| if dtype == DType::F16 { DType::BF16 } else { dtype };
        let bf16 =
            PrecisionPlan { base: half(plan.base), autocast: plan.autocast.map(half), loss_scaling: false, ..plan };
        let change = vec![Intervention::Precision(bf16)];
        all.push(proposal(Cause::Fp16Overflow, "bf16 instead of fp16".into(), "bf16", json!(true), change, From::Near));
    }
    if plan.adapter != DType::F32 {
        let change = vec![Intervention::Precision(PrecisionPlan { adapter: DType::F32, ..plan })];
        all.push(proposal(
            Cause::Bf16Rounding,
            "keep the adapter in fp32".into(),
            "pure_bf16",
            json!(false),
            change,
            From::Initial,
        ));
    }
    all
}

fn data(subject: &Subject<'_>, situation: &Situation<'_>) -> Option<Proposal> {
    let rows = rows::rows_of(situation.suspects);
    if rows.is_empty() {
        return None;
    }
    let written: Vec<String> = rows.iter().map(|r| format!("{}:{}", subject.dataset_name(*r), r.row)).collect();
    let name = format!("mask the labels of {}", written.join(", "));
    Some(neutralise(name, written, rows))
}

fn neutralise(name: String, written: Vec<String>, rows: Vec<RowId>) -> Proposal {
    let change = vec![Intervention::NeutraliseRows(rows)];
    proposal(Cause::Data, name, "neutralise_rows", json!(written), change, From::Near)
}

/// The resume before the spike found no optimizer state: go on as if it had.
fn optimizer_state(subject: &Subject<'_>, situation: &Situation<'_>) -> Option<Proposal> {
    let lost = lost_optimizer(subject, situation.step)?;
    let name = format!("keep the optimizer state through the resume at step {lost}");
    Some(proposal(
        Cause::OptimizerState,
        name,
        "optimizer_state",
        json!("kept"),
        vec![Intervention::KeepOptimizer],
        From::Before(lost),
    ))
}

/// Step of the last resume before `step` whose checkpoint lacks the optimizer's or the scheduler's state.
pub fn lost_optimizer(subject: &Subject<'_>, step: u64) -> Option<u64> {
    let resumes = subject.run.attempts.iter().filter_map(|a| a.resumed_from).filter(|from| *from < step);
    let last = resumes.max()?;
    let checkpoint = subject.run.checkpoints.iter().find(|c| c.step == last)?;
    (!(checkpoint.has_optimizer && checkpoint.has_scheduler)).then_some(last)
}

/// An upward jump of the learning rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RateJump {
    /// First step with the higher rate.
    pub step: u64,
    pub before: f64,
    /// The highest rate between the jump and the spike.
    pub after: f64,
}

impl RateJump {
    /// The rate to go on with instead: that before the jump, or where that was spent, a tenth of that after it.
    fn gentle(&self) -> f64 {
        self.before.max(SPENT * self.after)
    }
}

/// The last upward jump of the learning rate before `step`.
pub fn schedule_jump(baseline: &[StepRecord], logged: &[(u64, f64)], step: u64) -> Option<RateJump> {
    // The replayed rate is the one the update used; the log fills in what lies before the start point.
    let first = baseline.first().map_or(u64::MAX, |r| r.step);
    let before = logged.iter().copied().filter(|(s, _)| *s < first);
    let rates: Vec<(u64, f64)> = before.chain(baseline.iter().map(|r| (r.step, r.learning_rate))).collect();
    let mut jump: Option<RateJump> = None;
    let mut highest: f64 = 0.0;
    for pair in rates.windows(2) {
        let ((_, old), (at, new)) = (pair[0], pair[1]);
        // Rising from where it had already been: a warm-up rises to where it has never been.
        if new > JUMP * old && old < 0.5 * highest && at < step && at + AFTERMATH >= step {
            // The warm-up of a second schedule goes on from its first steps.
            let before = jump.filter(|j| at <= j.step + 1).map_or(old, |j| j.before);
            let from = jump.filter(|j| at <= j.step + 1).map_or(at, |j| j.step);
            jump = Some(RateJump { step: from, before, after: new });
        } else if let Some(jump) = jump.as_mut().filter(|_| at < step) {
            jump.after = jump.after.max(new);
        }
        highest = highest.max(old);
    }
    jump
}

fn schedule(subject: &Subject<'_>, situation: &Situation<'_>) -> Option<Proposal> {
    let logged: Vec<(u64, f64)> = subject.rows.iter().filter_map(|r| Some((r.step, r.learning_rate?))).collect();
    let at = schedule_jump(situation.baseline, &logged, situation.step)?.step;
    let resumed = subject.run.attempts.iter().filter_map(|a| a.resumed_from).any(|from| at > from && at <= from + 2);
    one_cosine(subject).filter(|_| !resumed).or_else(|| held(subject, situation))
}

/// A schedule that restarts, without its restarts. Its number of cycles would make plain cosine rise again, too
/// (transformers' get_cosine_schedule_with_warmup takes num_cycles waves).
pub fn one_cosine(subject: &Subject<'_>) -> Option<Proposal> {
    let config = &subject.run.config;
    if !config.lr_scheduler_type.contains("restarts") {
        return None;
    }
    let mut changes = BTreeMap::from([("lr_scheduler_type".to_string(), json!("cosine"))]);
    if !config.lr_scheduler_kwargs.is_empty() {
        changes.insert("lr_scheduler_kwargs".to_string(), json!({}));
    }
    let interventions = changes.iter().map(|(key, value)| set(key, value.clone())).collect();
    let name = "one cosine without restarts".to_string();
    Some(Proposal { cause: Cause::Schedule, name, changes, interventions, from: From::Initial })
}

/// The learning rate held at what it was before its last jump. A schedule that had ended was at zero, where nothing
/// is learned and nothing can spike: then at a tenth of what it jumped to.
pub fn held(subject: &Subject<'_>, situation: &Situation<'_>) -> Option<Proposal> {
    let logged: Vec<(u64, f64)> = subject.rows.iter().filter_map(|r| Some((r.step, r.learning_rate?))).collect();
    let jump = schedule_jump(situation.baseline, &logged, situation.step)?;
    let value = jump.gentle();
    let change = vec![Intervention::HoldLearningRate { from_step: jump.step, value }];
    let name = format!("hold the learning rate at {value:.3e} from step {} on", jump.step);
    Some(proposal(Cause::Schedule, name, "learning_rate", json!(value), change, From::Near))
}

fn clipping(subject: &Subject<'_>) -> Option<Proposal> {
    let now = subject.run.config.max_grad_norm;
    if now > 0.0 && now <= CLIPPING {
        return None;
    }
    let change = vec![set("max_grad_norm", json!(CLIPPING))];
    let name = format!("max_grad_norm {CLIPPING} instead of {now}");
    Some(proposal(Cause::GradientClipping, name, "max_grad_norm", json!(CLIPPING), change, From::Near))
}

/// As many updates, each of [`ACCUMULATION`] micro-batches, so the epochs are as many times longer: every update keeps
/// its learning rate. Where an update averages that many rows already, the noise of small updates is not a suspect:
/// more of them would only hide another cause.
fn accumulation(subject: &Subject<'_>) -> Option<Proposal> {
    let config = &subject.run.config;
    let now = config.gradient_accumulation_steps;
    if subject.samples() >= ACCUMULATION {
        return None;
    }
    let key = "gradient_accumulation_steps";
    let epochs = config.num_train_epochs * ACCUMULATION as f64 / now as f64;
    let change = vec![set(key, json!(ACCUMULATION)), set("num_train_epochs", json!(epochs))];
    let name = format!("{key} {ACCUMULATION} instead of {now}");
    Some(proposal(Cause::GradientAccumulation, name, key, json!(ACCUMULATION), change, From::Near))
}

/// The learning rate multiplied by `factor`.
pub fn scaled_learning_rate(subject: &Subject<'_>, factor: f64, from: From) -> Proposal {
    let rate = subject.run.config.learning_rate * factor;
    let name = format!("learning_rate {rate:.2e} instead of {:.2e}", subject.run.config.learning_rate);
    let change = vec![Intervention::ScaleLearningRate(factor)];
    proposal(Cause::LearningRate, name, "learning_rate", json!(rate), change, from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(values: &[f64]) -> Vec<(u64, f64)> {
        values.iter().enumerate().map(|(i, &rate)| (i as u64 + 1, rate)).collect()
    }

    #[test]
    fn a_warm_up_and_a_decay_are_no_jump() {
        assert_eq!(schedule_jump(&[], &rates(&[0.0, 1e-4, 5e-4, 1e-3, 9e-4, 8e-4, 7e-4]), 7), None);
    }

    #[test]
    fn a_schedule_that_had_ended_goes_on_at_a_tenth_of_what_it_jumped_to_and_never_at_zero() {
        let jump = schedule_jump(&[], &rates(&[1e-3, 6e-4, 2e-4, 0.0, 5e-4, 5e-4]), 6).expect("a jump");
        assert_eq!((jump.step, jump.before, jump.after), (5, 0.0, 5e-4));
        assert!((jump.gentle() - 5e-5).abs() < 1e-18);
    }

    #[test]
    fn a_second_warm_up_counts_as_one_jump_from_its_beginning_to_its_end() {
        let jump = schedule_jump(&[], &rates(&[1e-3, 8e-4, 1e-4, 3e-4, 8e-4, 9e-4]), 6).expect("a jump");
        assert_eq!((jump.step, jump.before), (4, 1e-4));
        assert!((jump.gentle() - 1e-4).abs() < 1e-18);
    }

    #[test]
    fn a_jump_long_before_the_spike_is_not_its_cause() {
        let mut all = vec![1e-3, 8e-4, 1e-4, 9e-4];
        all.extend([8e-4; 30]);
        assert_eq!(schedule_jump(&[], &rates(&all), 30), None);
        assert!(schedule_jump(&[], &rates(&all), 10).is_some());
    }
}
