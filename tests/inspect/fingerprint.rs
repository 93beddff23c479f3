//! Which normalisation a logged loss follows.

use spikeprobe::inspect::fingerprint::{MicroSum, Rule, candidates, scaling};

use super::support::*;

fn vector(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture(&format!("vectors/version_logs/{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The micro-batches of the recorded main run with these losses (as the trainer returned them: s_i / N).
fn micro_sums(losses: &[f64]) -> Vec<MicroSum> {
    let log = vector("main_4.48.2");
    let of = |(m, loss): (&Value, &f64)| {
        let items = m["num_items_in_batch"].as_f64().unwrap();
        let labels = m["labels"].as_array().unwrap().iter().flat_map(|r| r.as_array().unwrap());
        let unshifted = labels.filter(|l| l.as_i64() != Some(-100)).count() as u64;
        MicroSum { sum: loss * items, shifted: m["valid_shifted"].as_u64().unwrap(), unshifted }
    };
    log["micro"].as_array().unwrap().iter().zip(losses).map(of).collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

/// 12 micro-batches in 4 windows, on 4.48.2 and, in five precisions, on 5.6.0: every window is a token mean.
#[test]
fn the_fingerprint_names_the_rule_of_every_recorded_window() {
    let main = vector("main_4.48.2");
    let losses: Vec<f64> =
        main["micro"].as_array().unwrap().iter().map(|m| m["loss_as_returned"].as_f64().unwrap()).collect();
    let mut logs = vec![(losses, main["log_history"].clone(), 2e-5)];
    for (_, run) in vector("amp_5.6.0")["runs"].as_object().unwrap() {
        logs.push((numbers(&run["micro_losses"]), run["log_history"].clone(), 1e-5));
    }
    assert_eq!(logs.len(), 6);
    let mut told_apart = 0;
    for (losses, log, tolerance) in logs {
        for (window, row) in micro_sums(&losses).chunks(3).zip(log.as_array().unwrap()) {
            let logged = row["loss"].as_f64().unwrap();
            let all = candidates(window, 3, logged);
            assert!(matches!(all[0].rule, Rule::TokenMean | Rule::TokenMeanShifted), "{all:?}");
            assert!(all[0].error < tolerance, "{all:?}");
            told_apart += usize::from(all[2].error > 10.0 * tolerance);
        }
    }
    assert!(told_apart >= 18, "the other rules are off by more than ten times the rounding: {told_apart} of 24");
}

/// epochs_*: the loss of every window is the sum of its micro-batches' shares, the leaked ones of 4.48.2 included.
#[test]
fn windows_of_two_versions_add_up_and_the_leaked_one_only_with_its_leak() {
    for (file, leaks_at) in [("epochs_5.6.0", None), ("epochs_4.48.2", Some(12))] {
        for (name, run) in vector(file)["runs"].as_object().unwrap() {
            let (losses, items) = (numbers(&run["losses"]), numbers(&run["num_items"]));
            let mut rows = run["log_history"].as_array().unwrap().iter().filter(|r| r.get("loss").is_some());
            let (mut at, mut leaked) = (0, 0.0);
            while at < losses.len() {
                // A window's micro-batches share their N and are at most 4.
                let mut end = at + 1;
                while end < losses.len() && end - at < 4 && items[end] == items[at] {
                    end += 1;
                }
                let own: f64 = losses[at..end].iter().sum();
                at = end;
                let boundary = leaks_at.is_some() && name == "n93_bs2_ga4" && end == 45;
                if boundary {
                    // 47 batches, 11 windows of 4, then 93 % 4 = 1 of the 3 left: it never closes.
                    leaked = own;
                    continue;
                }
                let Some(row) = rows.next() else { break };
                let logged = row["loss"].as_f64().unwrap();
                let with = own + std::mem::take(&mut leaked);
                assert!(
                    (with - logged).abs() < 1.1e-4,
                    "{file} {name} step {}: {with} or {own}, logged {logged}",
                    row["step"]
                );
                let here = leaks_at.filter(|_| name == "n93_bs2_ga4") == row["step"].as_u64();
                assert_eq!((own - logged).abs() > 1.0, here, "{file} {name} step {}", row["step"]);
            }
        }
    }
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
    let judged = |logged: f64| {
        let all = candidates(&window, 2, logged);
        let left: Vec<_> = all.iter().filter(|c| c.error <= 1e-4).copied().collect();
        judge(&all, &left, 1, LossRule::TokenMean, logged, "log:1")
    };
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

fn replayer(run: &str, versions: &[(&str, &str)]) -> spikeprobe::replay::Replayer {
    let root = fixture("runs");
    let versions = versions.iter().map(|&(name, version)| (name.to_owned(), version.to_owned())).collect();
    let source = spikeprobe::replay::Source {
        path: root.join("runs").join(run),
        root,
        overrides: Vec::new(),
        versions,
        cache: None,
    };
    let device = spikeprobe::device::cpu::CpuDevice::new(Some(2)).unwrap();
    spikeprobe::replay::Replayer::open(source, std::sync::Arc::new(device)).unwrap()
}

/// n1 ran on transformers 4.48.2 and leaks at step 21.
#[test]
fn confirm_recomputes_a_recorded_leak_and_names_the_rule_on_the_windows_it_needs() {
    let found = spikeprobe::inspect::confirm::findings(&replayer("n1-leak-qwen2-bf16", &[])).unwrap();
    let of = |code| found.iter().find(|f| f.code == code).unwrap_or_else(|| panic!("{found:#?}"));
    assert_eq!(of(Code::SemanticsFingerprint).severity, Severity::Note, "{found:#?}");
    let leak = of(Code::EpochBoundaryLeak);
    assert_eq!(leak.severity, Severity::Error, "{leak:?}");
    assert!(leak.message.contains("step 21") && leak.message.contains("what the log shows"), "{leak:?}");
}

#[test]
fn confirm_follows_a_healthy_fp32_run_until_one_rule_is_left() {
    let found = spikeprobe::inspect::confirm::findings(&replayer("k6-healthy-cos-qwen2-fp32", &[])).unwrap();
    let [only] = found.as_slice() else { panic!("{found:#?}") };
    assert_eq!((only.code, only.severity), (Code::SemanticsFingerprint, Severity::Note));
    assert!(only.message.contains("follows the rule"), "{only:?}");
}

/// The other recorded 4.47 and 4.48 runs: n6's loss was never divided by the accumulation, n6base's and n7's were.
#[test]
fn confirm_names_the_rule_of_runs_on_older_trainers_and_of_a_wrong_version() {
    let first = |run: &str, versions: &[(&str, &str)]| {
        let found = spikeprobe::inspect::confirm::findings(&replayer(run, versions)).unwrap();
        found.into_iter().find(|f| f.code == Code::SemanticsFingerprint).unwrap()
    };
    for run in [
        "n6-lossx8-mistral447-bf16",
        "n6base-mistral448-bf16",
        "n7-healthy448-qwen2-bf16",
        "n8-evaldataset448-llama-bf16",
    ] {
        assert_eq!(first(run, &[]).severity, Severity::Note, "{run}: {:?}", first(run, &[]));
    }
    let wrong = first("n6-lossx8-mistral447-bf16", &[("transformers", "4.48.2")]);
    assert_eq!(wrong.severity, Severity::Error);
    assert!(wrong.message.contains("undivided") && wrong.message.contains("--versions"), "{wrong:?}");
    let wrong = first("n6base-mistral448-bf16", &[("transformers", "4.47.1")]);
    assert_eq!(wrong.severity, Severity::Error);
    assert!(wrong.message.contains("but: token mean over the window"), "{wrong:?}");
}

#[test]
fn recorded_runs_of_older_trainers_have_the_errors_that_were_planted_and_no_other() {
    let root = fixture("runs");
    for (run, errors) in [
        ("n1-leak-qwen2-bf16", vec!["epoch_boundary_leak"]),
        ("n6-lossx8-mistral447-bf16", vec!["loss_times_accumulation"]),
        ("n6base-mistral448-bf16", vec![]),
        ("n7-healthy448-qwen2-bf16", vec![]),
        ("n8-evaldataset448-llama-bf16", vec![]),
        ("k6-healthy-cos-qwen2-fp32", vec![]),
    ] {
        let run = Run::open_for_inspection(&root.join("runs").join(run), &root, &[]).unwrap();
        let all = inspect(&run);
        let found: Vec<_> = all.iter().filter(|f| f.severity == Severity::Error).map(|f| f.code.word()).collect();
        assert_eq!(found, errors, "{}", run.config_path.display());
        let renamed = all.iter().any(|f| f.code == Code::EvalMetricRenamed);
        assert_eq!(renamed, run.config_path.to_string_lossy().contains("n8-"), "eval_<name>_loss");
    }
}
