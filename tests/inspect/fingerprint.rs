//! Which normalisation a logged loss follows.

use spikeprobe::inspect::fingerprint::{MicroSum, Rule, candidates, scaling};

use super::support::*;

#[test]
fn the_fingerprint_names_the_rule_of_a_recorded_window() {
    let text = std::fs::read_to_string(fixture("vectors/version_logs/main_4.48.2.json")).unwrap();
    let log: Value = serde_json::from_str(&text).unwrap();
    let window: Vec<MicroSum> = log["micro"].as_array().unwrap()[..3]
        .iter()
        .map(|m| {
            let items = m["num_items_in_batch"].as_f64().unwrap();
            let labels = m["labels"].as_array().unwrap().iter().flat_map(|r| r.as_array().unwrap());
            let unshifted = labels.filter(|l| l.as_i64() != Some(-100)).count() as u64;
            let sum = m["loss_as_returned"].as_f64().unwrap() * items;
            MicroSum { sum, shifted: m["valid_shifted"].as_u64().unwrap(), unshifted }
        })
        .collect();
    let logged = log["log_history"][0]["loss"].as_f64().unwrap();
    let best = &candidates(&window, 3, logged)[0];
    assert!(matches!(best.rule, Rule::TokenMean | Rule::TokenMeanShifted));
    assert!(best.error < 2e-5, "{best:?}");
    let third = candidates(&window, 3, logged)[2];
    assert!(third.error > 1e-4, "the other rules are off by more than ten times the rounding: {third:?}");
}

#[test]
fn each_rule_is_named_when_the_log_follows_it() {
    let window = [
        MicroSum { sum: 30.0, shifted: 10, unshifted: 11 },
        MicroSum { sum: 90.0, shifted: 20, unshifted: 20 },
        MicroSum { sum: 8.0, shifted: 4, unshifted: 4 },
    ];
    // Accumulation 4, but the epoch's last window has 3 micro-batches.
    for rule in Rule::ALL {
        let logged = rule.predict(&window, 4);
        assert_eq!(candidates(&window, 4, logged)[0].rule, rule);
    }
    // An all-masked micro-batch: means are NaN and go last.
    let masked = [MicroSum { sum: 0.0, shifted: 0, unshifted: 0 }, window[0]];
    assert!(candidates(&masked, 2, 30.0 / 11.0)[5].error.is_nan());
}

#[test]
fn a_fingerprint_is_a_note_an_error_or_a_warning() {
    use spikeprobe::inspect::confirm::judge;
    use spikeprobe::run::LossRule;
    let window = [MicroSum { sum: 30.0, shifted: 10, unshifted: 11 }, MicroSum { sum: 9.0, shifted: 2, unshifted: 2 }];
    let judged = |logged: f64| judge(&candidates(&window, 2, logged), LossRule::TokenMean, logged, 1e-4, "log:1");
    assert_eq!(judged(39.0 / 13.0).severity, Severity::Note);
    let other = judged(7.5);
    assert_eq!((other.code, other.severity), (Code::SemanticsFingerprint, Severity::Error));
    assert!(other.message.contains("undivided"), "{}", other.message);
    assert_eq!(judged(1.0).severity, Severity::Warning);
}

#[test]
fn issue_7443_is_an_undivided_sum() {
    // LLaVA-1.5, LLaMA-Factory 0.9.2, transformers 4.49.0, constant total batch.
    let found = scaling(&[(2, 6.4), (4, 13.65), (16, 69.0), (32, 138.0)]).unwrap();
    assert_eq!(found.rule, Some(Rule::MeanUndivided));
    assert!((1.0..1.2).contains(&found.slope), "{found:?}");
    assert_eq!(scaling(&[(2, 3.2), (32, 3.3)]).unwrap().rule, Some(Rule::TokenMean));
    assert_eq!(scaling(&[(2, 3.2), (32, 0.2)]).unwrap().rule, Some(Rule::TokenMeanDividedAgain));
    assert_eq!(scaling(&[(2, 3.2), (2, 3.3)]), None);
    assert_eq!(scaling(&[(2, 3.2), (4, f64::NAN)]), None);
}
