//! Which historic loss normalisation explains the logged number (contract 5.1, 5.7, 8).
//!
//! Two ways: from the micro-batch sums of a replayed window, every rule's prediction against the log; or, where only
//! logs are at hand, from how the initial loss grows with the accumulation.

/// Sums of one micro-batch: s_i, its shifted label count c_i, its unshifted label count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MicroSum {
    /// Σ cross-entropy over valid shifted targets.
    pub sum: f64,
    /// c_i.
    pub shifted: u64,
    /// Labels ≠ −100 over all positions; what N counts from 4.46.2 on.
    pub unshifted: u64,
}

/// A normalisation that some trainer used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Σ s_i / N: ≥ 4.46.2 for models that take loss keywords.
    TokenMean,
    /// Σ s_i / N with N over `labels[:, 1:]`: 4.46.0–1.
    TokenMeanShifted,
    /// (1/GA) Σ s_i/c_i: ≤ 4.45, and models without loss keywords on 4.48–4.54.
    MeanOverAccumulation,
    /// (1/k) Σ s_i/c_i, k the window's real size: models without loss keywords on ≥ 4.55.
    MeanOverWindow,
    /// Σ s_i/c_i, undivided.
    MeanUndivided,
    /// Σ s_i / N / GA: the loss as older DeepSpeed engines divide it once more.
    TokenMeanDividedAgain,
}

impl Rule {
    pub const ALL: [Rule; 6] = [
        Rule::TokenMean,
        Rule::TokenMeanShifted,
        Rule::MeanOverAccumulation,
        Rule::MeanOverWindow,
        Rule::MeanUndivided,
        Rule::TokenMeanDividedAgain,
    ];

    /// What it computes, and who did so.
    pub fn about(self) -> &'static str {
        match self {
            Rule::TokenMean => "token mean over the window, Σ s_i / N (transformers ≥ 4.46.2)",
            Rule::TokenMeanShifted => "token mean, N counted on shifted labels (transformers 4.46.0–4.46.1)",
            Rule::MeanOverAccumulation => {
                "mean of micro-batch means over GA (transformers ≤ 4.45; models without loss keywords on 4.48–4.54)"
            }
            Rule::MeanOverWindow => {
                "mean of micro-batch means over the window (models without loss keywords on ≥ 4.55)"
            }
            Rule::MeanUndivided => {
                "sum of micro-batch means, undivided: GA times too big (transformers 4.46.2–4.47 without loss keywords; \
                 models whose forward takes **kwargs but ignores num_items_in_batch)"
            }
            Rule::TokenMeanDividedAgain => "token mean divided by GA once more (DeepSpeed on transformers 4.46–4.48)",
        }
    }

    /// The loss that a trainer with this rule logs for the window.
    pub fn predict(self, window: &[MicroSum], accumulation: usize) -> f64 {
        let total: f64 = window.iter().map(|m| m.sum).sum();
        let means: f64 = window.iter().map(|m| m.sum / m.shifted as f64).sum();
        let count = |of: fn(&MicroSum) -> u64| window.iter().map(of).sum::<u64>() as f64;
        match self {
            Rule::TokenMean => total / count(|m| m.unshifted),
            Rule::TokenMeanShifted => total / count(|m| m.shifted),
            Rule::MeanOverAccumulation => means / accumulation as f64,
            Rule::MeanOverWindow => means / window.len() as f64,
            Rule::MeanUndivided => means,
            Rule::TokenMeanDividedAgain => total / count(|m| m.unshifted) / accumulation as f64,
        }
    }
}

/// One rule held against the log.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    pub rule: Rule,
    pub predicted: f64,
    /// |predicted − logged| / |logged|.
    pub error: f64,
}

/// Every rule against a logged loss, best first. `tolerance`: relative; rules within it explain the log.
pub fn candidates(window: &[MicroSum], accumulation: usize, logged: f64) -> Vec<Candidate> {
    let of = |rule: Rule| {
        let predicted = rule.predict(window, accumulation);
        Candidate { rule, predicted, error: ((predicted - logged) / logged).abs() }
    };
    let mut all: Vec<Candidate> = Rule::ALL.into_iter().map(of).collect();
    // A NaN prediction explains nothing and goes last.
    all.sort_by(|a, b| a.error.is_nan().cmp(&b.error.is_nan()).then(a.error.total_cmp(&b.error)));
    all
}

/// How the initial loss depends on the accumulation at a constant total batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scaling {
    /// Slope of ln(loss) over ln(accumulation): 0 for a mean, 1 for an undivided sum.
    pub slope: f64,
    pub rule: Option<Rule>,
}

/// Reads the rule off several runs of the same data: `points` are (gradient_accumulation_steps, initial loss).
///
/// A mean stays where it is whatever the accumulation; a sum of means grows in proportion. `None`: fewer than two
/// accumulations, or losses that are not positive.
pub fn scaling(points: &[(usize, f64)]) -> Option<Scaling> {
    let usable = points.iter().all(|&(n, l)| n > 0 && l.is_finite() && l > 0.0);
    let logs: Vec<(f64, f64)> = points.iter().map(|&(n, l)| ((n as f64).ln(), l.ln())).collect();
    let n = logs.len() as f64;
    let (mx, my) = (logs.iter().map(|p| p.0).sum::<f64>() / n, logs.iter().map(|p| p.1).sum::<f64>() / n);
    let spread: f64 = logs.iter().map(|p| (p.0 - mx).powi(2)).sum();
    if !usable || logs.len() < 2 || spread == 0.0 {
        return None;
    }
    let slope = logs.iter().map(|p| (p.0 - mx) * (p.1 - my)).sum::<f64>() / spread;
    // Halfway points between the laws −1 (divided twice), 0 (a mean) and 1 (undivided).
    let rule = if (0.5..1.5).contains(&slope) {
        Some(Rule::MeanUndivided)
    } else if (-0.5..0.5).contains(&slope) {
        Some(Rule::TokenMean)
    } else if (-1.5..-0.5).contains(&slope) {
        Some(Rule::TokenMeanDividedAgain)
    } else {
        None
    };
    Some(Scaling { slope, rule })
}
