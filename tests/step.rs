//! Clip, optimizers, schedules, loss scale.
//!
//! Expected numbers: `fixtures/vectors/` (made by transformers 5.6 and torch on a CPU).

use std::collections::BTreeMap;

use serde_json::Value;
use spikeprobe::batches::Fetched;
use spikeprobe::device::DType;
use spikeprobe::run::LossRule;
use spikeprobe::step::{GradScaler, LossRules, RunningLoss, Schedule, ScheduleSpec, clip, warmup_steps};

fn vectors(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("array").iter().map(|x| x.as_f64().expect("number")).collect()
}

#[test]
fn every_schedule_gives_the_trainers_learning_rates_bit_by_bit() {
    let all = vectors("lr_schedules.json");
    let cases = all["cases"].as_array().expect("cases");
    assert!(cases.len() >= 20, "only {} cases", cases.len());
    for case in cases {
        let kwargs: BTreeMap<String, Value> = serde_json::from_value(case["kwargs"].clone()).expect("kwargs");
        let base = case["base_lr"].as_f64().expect("base_lr");
        let total = case["total_steps"].as_u64().expect("total_steps");
        let name = case["type"].as_str().expect("type");
        let warmup = case["warmup_steps"].as_u64().expect("warmup_steps");
        let schedule =
            Schedule::new(&ScheduleSpec { name, kwargs: &kwargs, base, total, warmup }).expect("a known schedule");
        let mut expected = floats(&case["lr_used_at_step_1_based"]);
        expected.push(case["last_lr_after_step_total"].as_f64().expect("last"));
        for (s, &lr) in expected.iter().enumerate() {
            let ours = base * schedule.factor(s as u64);
            assert_eq!(ours.to_bits(), lr.to_bits(), "{name} {kwargs:?} T={total} W={warmup} s={s}: {ours} vs {lr}");
        }
    }
}

#[test]
fn warmup_ratio_rounds_up() {
    for case in vectors("lr_schedules.json")["warmup_cases"].as_array().expect("cases") {
        let (total, ratio) = (case["total"].as_u64().expect("total"), case["ratio"].as_f64());
        let expected = case["steps"].as_u64().expect("steps");
        assert_eq!(warmup_steps(0.0, ratio, total, true), expected, "{case}");
        assert_eq!(warmup_steps(0.0, ratio, total, false), expected, "{case}");
    }
}

#[test]
fn warmup_steps_win_before_transformers_5_and_lose_from_it_on() {
    assert_eq!(warmup_steps(7.0, Some(0.5), 100, false), 7);
    assert_eq!(warmup_steps(7.0, Some(0.5), 100, true), 50);
    assert_eq!(warmup_steps(7.0, None, 100, true), 7);
    assert_eq!(warmup_steps(0.03, None, 100, true), 3);
}

#[test]
fn unknown_schedules_and_kwargs_are_named() {
    let none = BTreeMap::new();
    let spec = ScheduleSpec { name: "reduce_lr_on_plateau", kwargs: &none, base: 1e-4, total: 10, warmup: 0 };
    let error = Schedule::new(&spec).expect_err("refused").to_string();
    assert!(error.contains("reduce_lr_on_plateau") && error.contains("lr_scheduler_type"), "{error}");
    let kwargs = BTreeMap::from([("num_cylces".to_string(), Value::from(2))]);
    let error = Schedule::new(&ScheduleSpec { name: "cosine", kwargs: &kwargs, ..spec }).expect_err("refused");
    assert!(error.to_string().contains("num_cylces"), "{error}");
}

#[test]
fn clipping_matches_torch() {
    let all = vectors("loss_clip_adamw.json");
    for step in all["adamw"]["steps"].as_array().expect("steps") {
        let gradient = floats(&step["grad"]);
        // The tensor's own norm is the device's; the norm of one norm is itself.
        let norm = step["norm"].as_f64().expect("norm") as f32;
        let found = clip(&[norm], 1.0, DType::F32);
        assert_eq!(f64::from(found.norm), step["norm"].as_f64().expect("norm"), "{step}");
        for (g, expected) in gradient.iter().zip(floats(&step["clipped"])) {
            assert_eq!(f64::from(*g as f32 * found.coefficient), expected, "{step}");
        }
    }
}

#[test]
fn clipping_lets_nan_through_and_zero_switches_it_off() {
    assert!(clip(&[1.0, f32::NAN], 1.0, DType::F32).coefficient.is_nan());
    assert_eq!(clip(&[f32::INFINITY], 1.0, DType::F32).coefficient, 0.0);
    assert_eq!(clip(&[1e9], 0.0, DType::F32).coefficient, 1.0);
}

#[test]
fn half_adapters_have_a_half_norm() {
    let found = clip(&[1.001, 1.001], 1.0, DType::BF16);
    assert_eq!(found.norm, half::bf16::from_f32(2f32.sqrt()).to_f32());
}

#[test]
fn the_loss_scale_backs_off_and_grows_like_gradscaler() {
    let mut scaler = GradScaler { growth_interval: 3, ..GradScaler::default() };
    scaler.update(true);
    assert_eq!((scaler.scale, scaler.growth_tracker), (32768.0, 0));
    scaler.update(false);
    scaler.update(false);
    assert_eq!((scaler.scale, scaler.growth_tracker), (32768.0, 2));
    scaler.update(false);
    assert_eq!((scaler.scale, scaler.growth_tracker), (65536.0, 0));
    scaler.scale = 2f64.powi(127);
    scaler.growth_tracker = 2;
    scaler.update(false);
    assert_eq!(scaler.scale, 2f64.powi(127), "it never grows to infinity");
}

const FETCHED: Fetched = Fetched { num_items: 40, micro_batches: 3, leaked: false };

fn rules(rule: LossRule) -> LossRules {
    LossRules { rule, accumulation: 4, world_size: 1, averages_tokens: false, divides_again: false }
}

#[test]
fn each_trainer_version_normalises_its_own_way() {
    let loss = |rule| rules(rule).of(&FETCHED, 10).loss(20.0);
    assert_eq!(loss(LossRule::TokenMean), 0.5);
    assert_eq!(loss(LossRule::MeanUndivided), 2.0);
    assert_eq!(loss(LossRule::MeanOverAccumulation), 0.5);
    assert_eq!(loss(LossRule::MeanOverWindow), 2.0 / 3.0);
    assert!(rules(LossRule::MeanUndivided).of(&FETCHED, 0).loss(0.0).is_nan(), "0/0 as in torch");
    assert_eq!(rules(LossRule::TokenMean).of(&FETCHED, 0).loss(0.0), 0.0);
}

#[test]
fn ranks_average_tokens_or_means() {
    let two = |averages_tokens| LossRules { world_size: 2, averages_tokens, ..rules(LossRule::TokenMean) };
    // N counts all ranks: loss times W, gradient averaged, so 1/N in all.
    assert_eq!(two(true).of(&FETCHED, 10).seed, 1.0 / 40.0);
    assert_eq!(two(true).of(&FETCHED, 10).loss(20.0), 1.0);
    // N counts one rank: its mean, halved by the average over ranks.
    assert_eq!(two(false).of(&FETCHED, 10).seed, 1.0 / 80.0);
    assert_eq!(two(false).of(&FETCHED, 10).loss(20.0), 0.5);
    let engine = LossRules { divides_again: true, ..rules(LossRule::TokenMean) };
    assert_eq!(engine.of(&FETCHED, 10).seed, 1.0 / 160.0, "the engine divides gradients, not the loss");
    assert_eq!(engine.of(&FETCHED, 10).loss(20.0), 0.5);
}

#[test]
fn the_nan_filter_doubles_the_running_sum_at_every_step_logging() {
    let mut running = RunningLoss::new(1, 0);
    running.add(0, 1.5, 0, true);
    running.add(0, f32::NAN, 0, true);
    running.add(0, f32::NAN, 0, true);
    assert_eq!(running.mean(1).0, 6.0);
    assert!(running.mean(1).1.is_nan());
    running.logged(1);
    running.add(0, f32::INFINITY, 1, true);
    assert_eq!(running.mean(2).0, 0.0, "a window of nothing but NaN logs 0.0");
}

#[test]
fn without_the_filter_one_nan_stays_for_ever() {
    let mut running = RunningLoss::new(1, 0);
    running.add(0, f32::NAN, 0, false);
    running.logged(1);
    running.add(0, 1.0, 1, false);
    assert!(running.mean(2).0.is_nan());
    assert_eq!(running.mean(2).1, 1.0);
}

#[test]
fn a_logging_window_is_the_mean_of_its_steps_and_of_the_ranks() {
    let mut running = RunningLoss::new(2, 4);
    for step in 4..8 {
        running.add(0, 1.0, step, true);
        running.add(1, 3.0, step, true);
    }
    assert_eq!(running.mean(8), (2.0, 2.0));
}
