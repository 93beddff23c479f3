//! Shards, windows, leaks and resumes against accelerate and transformers of both generations.

use serde_json::Value;
use spikeprobe::batches::{Plan, Shards, Window};

use super::common::*;

/// Every window the process runs, in order.
fn windows(plan: &Plan) -> Vec<Window> {
    plan.steps().map(|step| plan.window(step).expect("a step of the plan")).collect()
}

fn plan(labels: &[u32], yaml: &str, versions: &[(&str, &str)], resumed_from: Option<u64>) -> Plan {
    let (config, semantics) = geometry(yaml, versions);
    Plan::of_counts(labels.to_vec(), &config, &semantics, resumed_from).expect("a plan")
}

fn leaked(window: &Window) -> usize {
    window.micro_batches.iter().filter(|micro| micro.fetched.leaked).count()
}

#[test]
fn ranks_get_the_batches_that_accelerate_gives_them() {
    for case in vector("sharding.json")["cases"].as_array().unwrap() {
        let [n, batch, world] = ["n", "batch_size", "world_size"].map(|key| integer(&case[key]) as u32);
        let shards = Shards::new(n, batch, world, false);
        let found: Vec<Vec<Vec<u32>>> = (0..world)
            .map(|rank| (0..shards.per_rank()).map(|index| shards.positions(index, rank)).collect())
            .collect();
        assert_eq!(serde_json::to_value(&found).unwrap(), case["per_rank"], "n {n}, B {batch}, W {world}");
    }
}

#[test]
fn tiny_llama_windows_hold_the_rows_and_counts_that_the_trainer_fetched() {
    let run = vector("tiny_llama/run.json");
    let samples = run["samples"].as_array().unwrap();
    let labels = |sample: &Value| {
        let counted = sample["labels"].as_array().unwrap().iter().filter(|label| label.as_i64() != Some(-100));
        counted.count() as u32
    };
    let counts: Vec<u32> = samples.iter().map(labels).collect();
    let yaml = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 3\nnum_train_epochs: 1.0\nseed: 42\n";
    let plan = plan(&counts, yaml, NEWEST, None);
    let mut expected = run["micro"].as_array().unwrap().iter();
    let rows = run["log_history"].as_array().unwrap();
    for window in windows(&plan) {
        assert_eq!(window.epoch, rows[window.step as usize - 1]["epoch"].as_f64().unwrap());
        for micro in &window.micro_batches {
            let expected = expected.next().expect("a micro-batch more than the trainer fetched");
            assert_eq!(micro.fetched.num_items, integer(&expected["num_items_in_batch"]));
            for (padded, &example) in expected["input_ids"].as_array().unwrap().iter().zip(&micro.examples) {
                let ids = integers(&samples[example]["input_ids"]);
                assert_eq!(integers(padded)[..ids.len()], ids);
            }
        }
    }
    assert!(expected.next().is_none(), "the trainer fetched more");
}

/// version_logs/epochs_*.json: steps, logged epochs, N and shapes of every micro-batch that ran.
fn compare_with_epochs_log(file: &str, versions: &[(&str, &str)]) {
    let log = vector(&format!("version_logs/{file}"));
    let samples = epoch_samples();
    for (name, batch, rows) in [("bs1_ga4", 1, 10), ("n93_bs2_ga4", 2, 93)] {
        let expected = &log["runs"][name];
        let samples = &samples[..rows];
        let counts: Vec<u32> = samples.iter().map(label_count).collect();
        let yaml = format!(
            "per_device_train_batch_size: {batch}\ngradient_accumulation_steps: 4\nnum_train_epochs: 2.0\nseed: 42\n"
        );
        let plan = plan(&counts, &yaml, versions, None);
        assert_eq!(plan.total_steps, integer(&expected["max_steps"]), "{file} {name}: T");
        assert_eq!(*plan.steps().end(), integer(&expected["global_step"]), "{file} {name}: last step");
        let windows = windows(&plan);
        let epochs: Vec<f64> = windows.iter().map(|window| window.epoch).collect();
        let rows = expected["log_history"].as_array().unwrap();
        let logged: Vec<f64> =
            rows.iter().filter(|row| row.get("loss").is_some()).map(|row| row["epoch"].as_f64().unwrap()).collect();
        assert_eq!(epochs, logged, "{file} {name}: epoch values");
        let micro: Vec<_> = windows.iter().flat_map(|window| &window.micro_batches).collect();
        assert_eq!(micro.len() as u64, integer(&expected["n_micro"]), "{file} {name}: micro-batches");
        let items: Vec<u32> = micro.iter().map(|micro| micro.fetched.num_items as u32).collect();
        assert_eq!(items, integers(&expected["num_items"]), "{file} {name}: N");
        let shape = |examples: &Vec<usize>| {
            let longest = examples.iter().map(|&i| samples[i].0.len() as u32).max().unwrap();
            [examples.len() as u32, longest.next_multiple_of(8)]
        };
        let shapes: Vec<[u32; 2]> = micro.iter().map(|micro| shape(&micro.examples)).collect();
        assert_eq!(serde_json::to_value(&shapes).unwrap(), expected["shapes"], "{file} {name}: shapes");
    }
}

#[test]
fn windows_of_transformers_5_6_0_end_each_epoch_with_a_short_one() {
    compare_with_epochs_log("epochs_5.6.0.json", NEWEST);
}

#[test]
fn windows_of_transformers_4_48_2_stop_early_and_leak() {
    compare_with_epochs_log("epochs_4.48.2.json", OLDER);
}

/// The geometry of a recorded leak: 329 rows in 165 batches, 20 windows of 8, 5 batches left, 329 % 8 = 1.
const LEAKY: &str = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 8\nnum_train_epochs: 3.0\n";

#[test]
fn a_leaked_micro_batch_carries_the_count_of_the_window_it_was_fetched_with() {
    let counts: Vec<u32> = (0..329).map(|row| 10 + row % 7).collect();
    let plan = plan(&counts, LEAKY, OLDER, None);
    assert_eq!((plan.steps_per_epoch, plan.total_steps), (20, 60));
    for step in plan.steps() {
        let window = plan.window(step).unwrap();
        let leak = usize::from(step == 21 || step == 41);
        assert_eq!((window.micro_batches.len(), leaked(&window)), (8 + leak, leak), "step {step}");
        let count = |micro: &spikeprobe::batches::MicroBatch| -> u64 {
            micro.examples.iter().map(|&i| u64::from(counts[i])).sum()
        };
        let (own, old): (Vec<_>, Vec<_>) = window.micro_batches.iter().partition(|micro| !micro.fetched.leaked);
        let total: u64 = own.iter().map(|micro| count(micro)).sum();
        assert!(own.iter().all(|micro| micro.fetched.num_items == total && micro.fetched.micro_batches == 8));
        for micro in old {
            assert_eq!((micro.fetched.num_items, micro.fetched.micro_batches), (count(micro), 1), "step {step}");
        }
    }
}

#[test]
fn a_resume_at_the_boundary_loses_the_leak_and_one_inside_an_epoch_leaks_all_that_is_left() {
    let counts = vec![5; 329];
    let whole = plan(&counts, LEAKY, OLDER, None);
    let boundary = plan(&counts, LEAKY, OLDER, Some(20));
    assert_eq!(boundary.steps(), 21..=60);
    assert_eq!(leaked(&boundary.window(21).unwrap()), 0);
    assert_eq!(boundary.window(22).unwrap(), whole.window(22).unwrap());
    let inside = plan(&counts, LEAKY, OLDER, Some(10));
    assert_eq!(inside.window(11).unwrap(), whole.window(11).unwrap());
    assert_eq!(leaked(&inside.window(21).unwrap()), 5);
    assert_eq!(leaked(&inside.window(41).unwrap()), 1);
}

#[test]
fn a_resume_of_a_floor_version_with_a_closing_tail_skips_too_far() {
    // 10 batches, GA 4: 2 steps by count, 3 performed. Step 4 is the second epoch's first window, but the
    // resumed trainer believes two epochs to be over.
    let counts = vec![5; 10];
    let yaml = "per_device_train_batch_size: 1\ngradient_accumulation_steps: 4\nnum_train_epochs: 4.0\n";
    let whole = plan(&counts, yaml, OLDER, None);
    let resumed = plan(&counts, yaml, OLDER, Some(4));
    assert_eq!(whole.window(5).unwrap().epoch_index, 1);
    assert_eq!(resumed.window(5).unwrap().epoch_index, 2);
}

#[test]
fn a_mid_epoch_resume_of_4_52_leaks_the_short_window_and_4_57_and_5_x_do_not() {
    let counts = vec![5; 10];
    let yaml = "per_device_train_batch_size: 1\ngradient_accumulation_steps: 4\nnum_train_epochs: 3.0\n";
    let at = |transformers| {
        let versions = [("transformers", transformers), ("accelerate", "1.3.0"), ("llamafactory", "0.9.4")];
        plan(&counts, yaml, &versions, Some(4))
    };
    assert_eq!(leaked(&at("4.52.4").window(6).unwrap()), 2);
    assert_eq!(at("4.52.4").window(6).unwrap().epoch_index, 2);
    let right = plan(&counts, yaml, NEWEST, None);
    for transformers in ["4.57.1", "5.6.0"] {
        let resumed = at(transformers);
        assert_eq!(resumed.window(6).unwrap().epoch_index, 1);
        let sizes = |plan: &Plan| windows(plan).iter().map(|w| w.micro_batches.len()).collect::<Vec<_>>();
        assert_eq!(sizes(&resumed), sizes(&right)[4..]);
    }
}

#[test]
fn the_wrong_permutation_lasts_for_the_rest_of_the_resumed_epoch_only() {
    let counts = vec![5; 40];
    let yaml = "per_device_train_batch_size: 1\ngradient_accumulation_steps: 4\nnum_train_epochs: 3.0\n";
    let right = plan(&counts, yaml, NEWEST, None);
    let wrong_pair = [("transformers", "5.6.0"), ("accelerate", "1.3.0"), ("llamafactory", "0.9.5")];
    let wrong = plan(&counts, yaml, &wrong_pair, Some(13));
    let rows = |plan: &Plan, step| -> Vec<usize> {
        plan.window(step).unwrap().micro_batches.into_iter().flat_map(|micro| micro.examples).collect()
    };
    assert_eq!(rows(&wrong, 14), rows(&right, 4), "epoch 1 goes on in the order of epoch 0");
    assert_eq!(rows(&wrong, 20), rows(&right, 10));
    assert_eq!(rows(&wrong, 21), rows(&right, 21), "epoch 2 is right again");
    let boundary = plan(&counts, yaml, &wrong_pair, Some(20));
    assert_eq!(rows(&boundary, 21), rows(&right, 21), "a resume at the boundary is right");
    let first_epoch = plan(&counts, yaml, &wrong_pair, Some(3));
    assert_eq!(rows(&first_epoch, 4), rows(&right, 4), "epoch 0 has only its own order");
}

#[test]
fn windows_of_4_45_straddle_epochs_and_4_46_is_refused_where_its_windows_disagree() {
    let yaml = "per_device_train_batch_size: 1\ngradient_accumulation_steps: 4\nnum_train_epochs: 2.0\n";
    let at = |transformers, rows: usize| {
        let versions = [("transformers", transformers), ("llamafactory", "0.9.1")];
        let (config, semantics) = geometry(yaml, &versions);
        Plan::of_counts(vec![5; rows], &config, &semantics, None)
    };
    let across = at("4.45.2", 10).unwrap();
    let third = across.window(3).unwrap();
    assert_eq!((across.total_steps, third.epoch_index, third.epoch, leaked(&third)), (4, 1, 1.2, 0));
    let message = at("4.46.3", 10).expect_err("windows and normalisers disagree").to_string();
    assert!(message.contains("4.46") && message.contains("gradient_accumulation_steps"), "{message}");
    assert_eq!(windows(&at("4.46.3", 12).unwrap()), windows(&at("4.48.2", 12).unwrap()));
}

#[test]
fn data_parallel_windows_hold_every_rank_and_count_labels_by_rank_or_over_all() {
    let counts: Vec<u32> = (1..=10).collect();
    let yaml = "per_device_train_batch_size: 2\ngradient_accumulation_steps: 2\nnum_train_epochs: 1.0\n";
    let (mut config, semantics) = geometry(yaml, NEWEST);
    config.world_size = 2;
    for average in [true, false] {
        config.average_tokens_across_devices = average;
        let plan = Plan::of_counts(counts.clone(), &config, &semantics, None).unwrap();
        assert_eq!((plan.batches_per_epoch, plan.steps_per_epoch), (3, 2));
        let window = plan.window(1).unwrap();
        let ranks: Vec<u16> = window.micro_batches.iter().map(|micro| micro.rank).collect();
        assert_eq!(ranks, [0, 1, 0, 1]);
        for micro in &window.micro_batches {
            let of_rank = |rank: Option<u16>| -> u64 {
                let counted = window.micro_batches.iter().filter(|m| rank.is_none_or(|rank| m.rank == rank));
                counted.flat_map(|m| &m.examples).map(|&i| u64::from(counts[i])).sum()
            };
            let expected = if average { of_rank(None) } else { of_rank(Some(micro.rank)) };
            assert_eq!(micro.fetched.num_items, expected, "average_tokens_across_devices {average}");
        }
    }
}

#[test]
fn a_step_the_attempt_does_not_run_is_an_error_that_says_which_it_runs() {
    let plan = plan(&[5; 8], "per_device_train_batch_size: 1\nnum_train_epochs: 2.0\n", NEWEST, Some(8));
    assert_eq!(plan.steps(), 9..=16);
    for step in [0, 8, 17] {
        let message = plan.window(step).expect_err("outside").to_string();
        assert!(message.contains("9 to 16") && message.contains(&format!("step {step}")), "{message}");
    }
}
