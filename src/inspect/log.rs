//! Log forensics: what the rows of the log hide (contract 8, 15).

use super::{Code, Finding, Severity, ranges};
use crate::run::{LogRow, LoggedLearningRate, Run};

/// Findings about single rows of the log.
pub fn findings(run: &Run) -> Vec<Finding> {
    let rows = &run.log.rows;
    let mut found = Vec::new();
    found.extend(zeros(run));
    found.extend(not_finite(rows));
    found.extend(filler(run));
    found.extend(skipped(run));
    found.extend(sentinel(rows, run.config.deepspeed.is_some()));
    found.extend(missing(run));
    if run.semantics.logged_lr == LoggedLearningRate::Next && rows.iter().any(|r| r.learning_rate.is_some()) {
        found.push(Finding::new(
            Code::LearningRateOffByOne,
            Severity::Note,
            place(&rows[0]),
            "this transformers version (≤ 4.50) logs the learning rate of the NEXT step: a rate in the log belongs one \
             step later, and the last one shows 0 in a decaying schedule",
        ));
    }
    if run.config.deepspeed.is_some() && run.semantics.deepspeed_divides_again {
        found.push(Finding::new(
            Code::DeepspeedGradNorm,
            Severity::Warning,
            run.place("deepspeed"),
            format!(
                "under transformers 4.46–4.48 DeepSpeed divides the loss by gradient_accumulation_steps ({}) once more: \
                 gradients and grad_norm are that many times too small; transformers ≥ 4.49 repairs it",
                run.config.gradient_accumulation_steps
            ),
        ));
    }
    found
}

fn place(row: &LogRow) -> String {
    row.source.clone()
}

/// What a logged loss of exactly 0.0 stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Zero {
    /// No label in the window: gradient 0 as well.
    NoLabels,
    /// NaN, replaced by the NaN filter.
    MaskedNan,
}

/// Reads a row with a loss of exactly 0.0. `before`: the last finite non-zero loss; `rounds`: the log has 4 decimals,
/// so that a loss below 5e-5 is an honest 0.0.
pub fn zero(row: &LogRow, before: Option<f64>, rounds: bool) -> Option<Zero> {
    if row.loss != Some(0.0) {
        return None;
    }
    match row.grad_norm {
        Some(0.0) => Some(Zero::NoLabels),
        Some(norm) if !norm.is_finite() => Some(Zero::MaskedNan),
        _ if rounds && before.is_none_or(|b| b < 1e-2) => None,
        // A perfect loss has no gradient; a finite norm beside 0.0 is the norm of other micro-batches.
        _ => Some(Zero::MaskedNan),
    }
}

fn zeros(run: &Run) -> Vec<Finding> {
    let (mut masked, mut empty, mut before) = (Vec::new(), Vec::new(), None);
    for row in &run.log.rows {
        match zero(row, before, run.semantics.rounds_loss) {
            Some(Zero::MaskedNan) => masked.push(row),
            Some(Zero::NoLabels) => empty.push(row),
            None => before = row.loss.filter(|l| l.is_finite() && *l > 0.0).or(before),
        }
    }
    let mut found = Vec::new();
    if let Some(first) = masked.first() {
        found.push(Finding::new(
            Code::MaskedNan,
            Severity::Error,
            place(first),
            format!(
                "loss 0.0 at step {} stands for NaN: logging_nan_inf_filter (default true) replaces a NaN by the running \
                 mean, which is 0 at logging_steps 1{}; set logging_nan_inf_filter: false to see it",
                ranges(&steps(&masked)),
                match first.grad_norm {
                    Some(norm) if !norm.is_finite() => format!("; grad_norm there is {norm}"),
                    _ => String::new(),
                }
            ),
        ));
    }
    if let Some(first) = empty.first() {
        found.push(Finding::new(
            Code::AllMaskedWindow,
            Severity::Warning,
            place(first),
            format!(
                "loss 0.0 and grad_norm 0.0 at step {}: no token of that window has a label (answers cut away by \
                 cutoff_len, or empty); the weights are unharmed, the 0.0 is no progress",
                ranges(&steps(&empty))
            ),
        ));
    }
    found
}

fn steps(rows: &[&LogRow]) -> Vec<u64> {
    rows.iter().map(|r| r.step).collect()
}

fn not_finite(rows: &[LogRow]) -> Option<Finding> {
    let bad: Vec<&LogRow> = rows.iter().filter(|r| r.loss.is_some_and(|l| !l.is_finite())).collect();
    let first = bad.first()?;
    Some(Finding::new(
        Code::NanLogged,
        Severity::Error,
        place(first),
        format!(
            "the loss is not finite at step {}; with bf16 or fp32 a NaN gradient is applied and the adapter stays NaN: \
             go back to a checkpoint before step {}",
            ranges(&steps(&bad)),
            first.step
        ),
    ))
}

/// A NaN inside a longer logging window is replaced by a whole step's mean per micro-batch: the row is too high.
fn filler(run: &Run) -> Option<Finding> {
    if !run.config.logging_nan_inf_filter {
        return None;
    }
    let suspect = |r: &&LogRow| {
        r.window > 1 && r.grad_norm.is_some_and(|n| n.is_nan()) && r.loss.is_some_and(|l| l.is_finite() && l != 0.0)
    };
    let bad: Vec<&LogRow> = run.log.rows.iter().filter(suspect).collect();
    let first = bad.first()?;
    Some(Finding::new(
        Code::InflatedFiller,
        Severity::Warning,
        place(first),
        format!(
            "grad_norm is NaN at step {} and the loss finite over a window of {} steps: NaN micro-batches were replaced \
             by a filler (the running mean of a whole step for each micro-batch), so this loss is not a mean of real \
             losses; set logging_nan_inf_filter: false and logging_steps: 1",
            ranges(&steps(&bad)),
            first.window
        ),
    ))
}

/// fp16: steps that were not taken. In one form the learning rate freezes, in the other it moves on (contract 15.4).
fn skipped(run: &Run) -> Option<Finding> {
    let scaled = run.checkpoints.iter().any(|c| c.has_scaler) || (run.config.fp16 && !run.config.use_cpu);
    if !scaled {
        return None;
    }
    let rows = &run.log.rows;
    let bad: Vec<usize> = (0..rows.len()).filter(|&i| rows[i].grad_norm.is_some_and(|n| !n.is_finite())).collect();
    let first = &rows[*bad.first()?];
    let listed: Vec<u64> = bad.iter().map(|&i| rows[i].step).collect();
    let frozen = bad.iter().filter(|&&i| {
        rows.get(i + 1).is_some_and(|next| next.learning_rate.is_some() && next.learning_rate == rows[i].learning_rate)
    });
    let frozen = frozen.count();
    let schedule = if frozen == bad.len() {
        "the learning rate stands still there: the schedule falls behind by as many steps"
    } else {
        "the learning rate moves on all the same (fused AdamW skips inside its kernel), so nothing else shows it"
    };
    let scaler =
        run.checkpoints.iter().rev().find(|c| c.has_scaler).and_then(|c| Some((c.step, c.scaler().ok()?.scale)));
    let scaler = scaler.map(|(step, scale)| format!("; loss scale {scale} at checkpoint-{step}")).unwrap_or_default();
    let severity = if bad.len() * 20 > rows.len() { Severity::Error } else { Severity::Warning };
    Some(Finding::new(
        Code::SkippedSteps,
        severity,
        place(first),
        format!(
            "{} of {} logged steps overflowed in fp16 and were skipped (grad_norm not finite at step {}); {schedule}{scaler}; \
             the first few are normal while the loss scale settles, later ones are lost steps: train in bf16",
            bad.len(),
            rows.len(),
            ranges(&listed)
        ),
    ))
}

/// Older DeepSpeed marks an overflow by −1 per parameter group and squares it.
fn sentinel(rows: &[LogRow], deepspeed: bool) -> Option<Finding> {
    const ROOTS: [f64; 3] = [1.0, std::f64::consts::SQRT_2, 1.732_050_807_568_877_2];
    // grad_norm is an f32: exact to 1 in 10^7.
    let marked = |r: &&LogRow| r.grad_norm.is_some_and(|n| ROOTS.iter().any(|root| (n - root).abs() < 2e-7));
    let bad: Vec<&LogRow> = rows.iter().filter(marked).collect();
    let first = bad.first()?;
    // One exact 1 can be chance; under DeepSpeed it is not.
    if !deepspeed && bad.len() < 2 {
        return None;
    }
    Some(Finding::new(
        Code::SentinelGradNorm,
        Severity::Warning,
        place(first),
        format!(
            "grad_norm is exactly {} at step {}: older DeepSpeed reports an overflow as −1 per parameter group and takes \
             the norm of that (1, √2, √3); these steps were skipped, their real gradient was not finite",
            first.grad_norm.unwrap_or(f64::NAN),
            ranges(&steps(&bad))
        ),
    ))
}

fn missing(run: &Run) -> Vec<Finding> {
    let mut found = Vec::new();
    let output = run.path(&run.config.output_dir).display().to_string();
    if !run.log.rows.is_empty() && run.log.rows.iter().all(|r| r.grad_norm.is_none()) {
        found.push(Finding::new(
            Code::GradNormMissing,
            Severity::Note,
            output,
            "no row has a grad_norm: it is kept in trainer_state.json only (and transformers 4.x logs none when \
             max_grad_norm is 0); copy trainer_state.json of the output folder or of the last checkpoint",
        ));
    }
    if let Some((place, reason)) = run.log.unreadable.first() {
        found.push(Finding::new(
            Code::LogUnreadable,
            Severity::Note,
            place.clone(),
            format!(
                "{} line(s) cannot be read ({reason}); a trainer that was killed leaves half a last line",
                run.log.unreadable.len()
            ),
        ));
    }
    found
}
