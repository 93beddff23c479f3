//! `inspect --confirm`: findings proved by replay. The first logged window is replayed and every historic
//! normalisation of its loss is held against the log.

use super::fingerprint::{Candidate, MicroSum, Rule, candidates};
use super::{Code, Finding, Severity};
use crate::Result;
use crate::batches::Corpus;
use crate::replay::{Replayer, Silent, Start, StepRecord};
use crate::run::LossRule;

/// Replays the first window of the run and names the rule that its logged loss follows.
///
/// # Errors
/// Anything that keeps the window from being replayed.
pub fn first_window(replayer: &Replayer) -> Result<Option<Finding>> {
    let run = replayer.run();
    let first = run.log.rows.iter().find(|r| r.attempt == 0 && r.step == 1 && r.window == 1);
    let Some((row, logged)) = first.and_then(|r| Some((r, r.loss.filter(|l| l.is_finite() && *l > 0.0)?))) else {
        return Ok(None);
    };
    let trace = replayer.replay(&Start::Initial, 1, &[], &mut Silent)?;
    let Some(step) = trace.steps.first() else { return Ok(None) };
    let window = sums(step, replayer.corpus());
    let all = candidates(&window, run.config.gradient_accumulation_steps, logged);
    // Rounding to 4 decimals, and what half precision may differ by in a first step (contract 12).
    let half = replayer.scene().engine.plan().linear().is_half();
    let tolerance = if half { 2e-3 } else { 2e-5 } + if run.semantics.rounds_loss { 5e-5 / logged } else { 0.0 };
    Ok(Some(judge(&all, run.semantics.loss, logged, tolerance, &row.source)))
}

/// Sums of a replayed window's micro-batches.
pub fn sums(step: &StepRecord, corpus: &Corpus) -> Vec<MicroSum> {
    let labels = |row| corpus.train.iter().find(|e| e.row == row).map_or(0, |e| e.unshifted_label_tokens() as u64);
    step.micro_batches
        .iter()
        .map(|m| MicroSum {
            // A micro-batch without labels has no mean.
            sum: if m.label_tokens == 0 { 0.0 } else { m.mean_loss * m.label_tokens as f64 },
            shifted: m.label_tokens,
            unshifted: m.rows.iter().map(|&row| labels(row)).sum(),
        })
        .collect()
}

/// The rule that a version table expects, in the fingerprint's words.
fn expected(rule: LossRule) -> Rule {
    match rule {
        LossRule::TokenMean => Rule::TokenMean,
        LossRule::MeanOverAccumulation => Rule::MeanOverAccumulation,
        LossRule::MeanOverWindow => Rule::MeanOverWindow,
        LossRule::MeanUndivided => Rule::MeanUndivided,
    }
}

/// What the candidates say: the expected rule holds, another one does, or none.
pub fn judge(all: &[Candidate], expected_rule: LossRule, logged: f64, tolerance: f64, place: &str) -> Finding {
    let holds = |c: &&Candidate| c.error <= tolerance;
    let expected = expected(expected_rule);
    let table: Vec<String> = all.iter().map(|c| format!("\n    {:>12.5}  {}", c.predicted, c.rule.about())).collect();
    let (severity, verdict) = match (all.iter().filter(holds).find(|c| c.rule == expected), all.iter().find(holds)) {
        (Some(_), _) => (Severity::Note, format!("the logged loss {logged} follows the rule of this version")),
        (None, Some(other)) => (
            Severity::Error,
            format!(
                "the logged loss {logged} does not follow the rule of the version assumed for this run, but: {}; give the \
                 real --versions",
                other.rule.about()
            ),
        ),
        (None, None) => (
            Severity::Warning,
            format!(
                "no known normalisation gives the logged loss {logged}: base weights, template, data or precision differ \
                 from the run's"
            ),
        ),
    };
    Finding::new(
        Code::SemanticsFingerprint,
        severity,
        place,
        format!("{verdict}; by replay of the first window:{}", table.concat()),
    )
}
