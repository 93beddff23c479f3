//! `inspect --confirm`: findings proved by replay. Windows are replayed until the log can follow one historic
//! normalisation only, and leaked windows are recomputed with and without their leak.

use super::fingerprint::{Candidate, MicroSum, Rule, candidates};
use super::{Code, Finding, Severity, bookkeeping};
use crate::Result;
use crate::batches::Corpus;
use crate::replay::{Observer, Replayer, Start, StepRecord};
use crate::run::{LossRule, Run, WindowRule};

/// Most windows replayed to tell rules apart, and furthest step of a leaked window that is replayed.
const MOST_WINDOWS: u64 = 24;
const FURTHEST_LEAK: u64 = 400;

/// Everything that a replay can confirm.
///
/// # Errors
/// Anything that keeps the run from being replayed.
pub fn findings(replayer: &Replayer) -> Result<Vec<Finding>> {
    let run = replayer.run();
    let leak = bookkeeping::leaks(&run.log.rows, run.config.gradient_accumulation_steps).into_iter().next();
    let leak = leak.filter(|l| l.step <= FURTHEST_LEAK && run.semantics.windows == WindowRule::FloorLeak);
    let logged = logged_windows(run);
    let last = logged.last().map(|(step, _, _)| *step).max(leak.as_ref().map(|l| l.step));
    let Some(last) = last else { return Ok(Vec::new()) };
    let mut judge = Windows::new(replayer, logged);
    judge.until = leak.as_ref().map_or(0, |l| l.step);
    let stopped = replayer.replay(&Start::Initial, last.min(replayer.scene().last_step()), &[], &mut judge);
    if let Err(error) = stopped
        && !judge.settled
    {
        return Err(error);
    }
    let mut found: Vec<Finding> = judge.finding().into_iter().collect();
    if let Some((leak, record)) =
        leak.and_then(|l| Some((l.clone(), judge.leaked.take().filter(|r| r.step == l.step)?)))
    {
        let logged = run.log.rows.iter().find(|r| r.attempt == 0 && r.step == leak.step).and_then(|r| r.loss);
        found.extend(logged.map(|logged| leaked(&record, logged, &leak.source, judge.tolerance(logged))));
    }
    Ok(found)
}

/// Step, loss and place of the first windows that were logged one by one.
fn logged_windows(run: &Run) -> Vec<(u64, f64, String)> {
    let rows = run.log.rows.iter().filter(|r| r.attempt == 0 && r.window == 1 && r.step <= MOST_WINDOWS);
    rows.filter_map(|r| Some((r.step, r.loss.filter(|l| l.is_finite() && *l > 0.0)?, r.source.clone()))).collect()
}

/// Holds window after window against the log.
struct Windows<'a> {
    replayer: &'a Replayer,
    logged: Vec<(u64, f64, String)>,
    /// Rules that hold on every window so far, best first at the first window; `None` before it.
    left: Option<Vec<Candidate>>,
    /// All candidates of the first window, for the table.
    first: Vec<Candidate>,
    seen: u64,
    /// Goes on to this step for its own sake.
    until: u64,
    leaked: Option<StepRecord>,
    /// Enough was seen.
    settled: bool,
}

impl<'a> Windows<'a> {
    fn new(replayer: &'a Replayer, logged: Vec<(u64, f64, String)>) -> Self {
        Self { replayer, logged, left: None, first: Vec::new(), seen: 0, until: 0, leaked: None, settled: false }
    }

    /// Rounding to 4 decimals, and what half precision may differ by (contract 12).
    fn tolerance(&self, logged: f64) -> f64 {
        let half = self.replayer.scene().engine.plan().linear().is_half();
        let rounds = self.replayer.run().semantics.rounds_loss;
        let rounding = if rounds { 5e-5 / logged } else { 0.0 };
        rounding + if half { 2e-3 } else { 2e-5 }
    }

    fn hold(&mut self, record: &StepRecord) {
        let Some((_, logged, _)) = self.logged.iter().find(|(step, _, _)| *step == record.step) else { return };
        let run = self.replayer.run();
        let window = sums(record, self.replayer.corpus());
        let tolerance = self.tolerance(*logged);
        let all = candidates(&window, run.config.gradient_accumulation_steps, *logged);
        let holds = |rule: Rule| all.iter().any(|c| c.rule == rule && c.error <= tolerance);
        match &mut self.left {
            None => {
                self.left = Some(all.iter().filter(|c| holds(c.rule)).copied().collect());
                self.first.clone_from(&all);
            }
            // Later windows depend on the weights, hence on the rule the replay assumes: they narrow, they do not refute.
            Some(left) if left.iter().any(|c| holds(c.rule)) => left.retain(|c| holds(c.rule)),
            Some(_) => self.settled = true,
        }
        self.seen += 1;
        self.settled |= self.left.as_ref().is_some_and(|left| left.len() <= 1);
    }

    fn finding(&self) -> Option<Finding> {
        let (_, logged, place) = self.logged.first()?;
        let left = self.left.as_ref()?;
        Some(judge(&self.first, left, self.seen, self.replayer.run().semantics.loss, *logged, place))
    }
}

impl Observer for Windows<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if !self.settled {
            self.hold(record);
        }
        if record.step == self.until {
            self.leaked = Some(record.clone());
        }
        if self.settled && record.step >= self.until {
            // Stops the replay; `findings` knows.
            return Err(crate::Error::interrupted());
        }
        Ok(())
    }
}

/// A leaked window's logged loss against its own micro-batches alone and with the leaked ones.
pub fn leaked(record: &StepRecord, logged: f64, place: &str, tolerance: f64) -> Finding {
    let own: f64 = record.micro_batches.iter().filter(|m| !m.leaked).map(|m| m.loss).sum();
    let with: f64 = record.micro_batches.iter().map(|m| m.loss).sum();
    let off = |x: f64| ((x - logged) / logged).abs();
    // The replay has taken many steps by then: which of the two is nearer decides, the tolerance says how near.
    let proved = off(with) <= (20.0 * tolerance).max(1e-2) && off(with) < off(own);
    Finding::new(
        Code::EpochBoundaryLeak,
        if proved { Severity::Error } else { Severity::Warning },
        place,
        format!(
            "by replay of step {}: its own window has a loss of {own:.5}, with the {} leaked micro-batch(es) it is {with:.5}; \
             the log says {logged:.5}: {}",
            record.step,
            record.micro_batches.iter().filter(|m| m.leaked).count(),
            if proved { "the leak is what the log shows" } else { "the leak alone does not explain it" }
        ),
    )
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

/// What the windows say: the expected rule holds, another one does, or none. `all`: candidates of the first window,
/// `left`: those that hold on all `seen` windows.
pub fn judge(
    all: &[Candidate],
    left: &[Candidate],
    seen: u64,
    expected_rule: LossRule,
    logged: f64,
    place: &str,
) -> Finding {
    let expected = expected(expected_rule);
    let table: Vec<String> = all.iter().map(|c| format!("\n    {:>12.5}  {}", c.predicted, c.rule.about())).collect();
    let windows = if seen == 1 { "the first window".to_owned() } else { format!("the first {seen} windows") };
    let (severity, verdict) = if left.iter().any(|c| c.rule == expected) {
        let others = left.len() - 1;
        let also = if others == 0 {
            ", and no other rule".to_owned()
        } else {
            format!("; {others} other rule(s) give the same numbers here, so nothing hangs on the choice")
        };
        (Severity::Note, format!("the log follows the rule of this version on {windows}{also}"))
    } else if let Some(other) = left.first() {
        (
            Severity::Error,
            format!(
                "the logged loss {logged} does not follow the rule of the version assumed for this run, but: {}; give the \
                 real --versions",
                other.rule.about()
            ),
        )
    } else {
        (
            Severity::Warning,
            format!(
                "no known normalisation gives the logged loss {logged}: base weights, template, data or precision differ \
                 from the run's"
            ),
        )
    };
    Finding::new(
        Code::SemanticsFingerprint,
        severity,
        place,
        format!("{verdict}; the first window, by each rule (logged: {logged}):{}", table.concat()),
    )
}
