//! Faults planted into single operations of a recorded step: told apart and found; clean steps accused of nothing.

use std::path::PathBuf;
use std::sync::Arc;

use spikeprobe::device::{Device, cpu::CpuDevice, noise};
use spikeprobe::numerics::{Effort, Evidence, Fault, Faults, Lasts, State, Suspect, Trail, Wrong, examine};
use spikeprobe::replay::Source;

const FP32: &str = "runs/k6-healthy-cos-qwen2-fp32";
const BF16: &str = "runs/n1-leak-qwen2-bf16";
const REPEATS_ONLY: Effort = Effort { repeats: 3, orders: 0, second: false };

fn source(run: &str) -> Source {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runs");
    Source { path: root.join(run), root, ..Source::default() }
}

fn cpu() -> Arc<dyn Device> {
    Arc::new(CpuDevice::new(Some(2)).unwrap())
}

fn suspect(run: &str, step: u64) -> Suspect {
    Suspect::open(source(run), cpu(), step).unwrap_or_else(|e| panic!("{run}: {e}"))
}

fn calls(suspect: &Suspect) -> u64 {
    let trail = Arc::new(Trail::default());
    suspect.run(Some(trail.clone()), None).unwrap();
    trail.marks().len() as u64
}

/// The n-th random fault of a step with so many operations.
fn fault(n: u64, calls: u64, lasts: Lasts) -> Fault {
    let draw = |stream: u64, below: u64| noise::bits(7, stream, n) % below;
    let wrong = match draw(0, 4) {
        0 => Wrong::OtherRow,
        1 => Wrong::StuckAtOne { bit: 8 + draw(1, 8) as u32, every: 16 },
        // Any bit of the smaller dtype; those of an f32 reach its exponent.
        _ => Wrong::Flip { bit: draw(2, 16) as u32 },
    };
    Fault { call: draw(3, calls), output: draw(4, 3) as usize, element: draw(5, 1 << 20) as usize, wrong, lasts }
}

/// Evidence on the n-th fault, with the operation it struck; `None` where it changed nothing.
fn examined(suspect: &Suspect, fault: Fault) -> Option<(Evidence, &'static str)> {
    let planted = Arc::new(Faults::new(fault));
    let evidence = examine(suspect, &cpu(), REPEATS_ONLY, Some(&planted)).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
    planted.struck().map(|operation| (evidence, operation))
}

/// Shares of the faults with a trace that are told apart, and that are found where they were planted.
fn shares(run: &str, step: u64, faults: u64) -> (f64, f64) {
    let suspect = suspect(run, step);
    let calls = calls(&suspect);
    let (mut traced, mut told, mut found) = (0, 0, 0);
    for n in 0..faults {
        let (lasts, state) =
            if n % 2 == 0 { (Lasts::Once, State::Transient) } else { (Lasts::Always, State::Persistent) };
        let fault = fault(n, calls, lasts);
        let Some((evidence, operation)) = examined(&suspect, fault) else { continue };
        traced += 1;
        told += u64::from(evidence.state() == state);
        let here = evidence.location().is_some_and(|l| l.call as u64 == fault.call && l.operation == operation);
        found += u64::from(here);
    }
    assert!(traced * 2 > faults, "only {traced} of {faults} faults changed anything");
    (told as f64 / traced as f64, found as f64 / traced as f64)
}

#[test]
fn transient_and_persistent_faults_are_told_apart_and_found() {
    let (told, found) = shares(FP32, 2, 8);
    assert!(told >= 0.95 && found >= 0.9, "told apart {told}, found {found}");
}

#[test]
fn a_clean_step_is_accused_of_nothing() {
    for (run, step) in [(FP32, 1), (FP32, 5), (BF16, 1), (BF16, 4)] {
        let evidence =
            examine(&suspect(run, step), &cpu(), Effort { repeats: 2, orders: 1, second: true }, None).unwrap();
        assert_eq!(evidence.violations, vec![], "{run} step {step}");
        assert!(matches!(evidence.state(), State::Correct | State::OrderDependent), "{run} step {step}: {evidence:?}");
    }
}

/// The figures of the documentation: 200 faults and 100 clean steps. Minutes; `cargo test --release -- --ignored`.
#[test]
#[ignore = "minutes"]
fn two_hundred_faults_and_a_hundred_clean_steps() {
    let shares = [shares(FP32, 2, 100), shares(BF16, 2, 100)];
    println!("told apart, found: {shares:?}");
    assert!(shares.iter().all(|(told, found)| *told >= 0.95 && *found >= 0.9), "{shares:?}");
    for n in 0..100u64 {
        let (run, step) = if n % 2 == 0 { (FP32, 1 + n / 10) } else { (BF16, 1 + n / 10) };
        let evidence =
            examine(&suspect(run, step), &cpu(), Effort { repeats: 2, orders: 0, second: false }, None).unwrap();
        assert!(evidence.violations.is_empty() && evidence.mismatch.is_none(), "{run} step {step}: {evidence:?}");
        assert_eq!(evidence.parted, None, "{run} step {step}");
    }
}
