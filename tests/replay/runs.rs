//! Real LLaMA-Factory runs, replayed from what lies on disk.

use std::path::PathBuf;
use std::sync::Arc;

use spikeprobe::device::Device;
use spikeprobe::numerics::Reorder;
use spikeprobe::replay::{
    Envelope, Intervention, Keeping, Observer, Replayer, Reproduction, Silent, Source, Start, StepRecord, Trace,
    certify, relative,
};
use spikeprobe::run::LogRow;
use spikeprobe::step::TrainState;

pub const DEMO: &str = "runs/a8-lr-stage2-llama-fp32";
pub const HEALTHY: &str = "runs/k6-healthy-cos-qwen2-fp32";
pub const LOST_OPTIMIZER: &str = "runs/d1-noopt-llama-bf16";
const LEAK: &str = "runs/n1-leak-qwen2-bf16";
const OTHER_CONSTANTS: &str = "runs/resume-other-constants";
const FP16: &str = "runs/h1-fp16-llama-rare";

fn folder(run: &str) -> PathBuf {
    let repository = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    if run == DEMO { repository.join("demo") } else { repository.join("tests/fixtures/runs") }
}

fn open_on(run: &str, threads: usize) -> Replayer {
    let root = folder(run);
    let source = Source { path: root.join(run), root, ..Source::default() };
    let device = spikeprobe::device::open("cpu", Some(threads)).expect("cpu");
    Replayer::open(source, device).unwrap_or_else(|e| panic!("{run}: {e}"))
}

pub fn open(run: &str) -> Replayer {
    open_on(run, 2)
}

pub fn replay(replayer: &Replayer, start: Start, to: u64, with: &[Intervention]) -> Vec<StepRecord> {
    replayer.replay(&start, to, with, &mut Silent).unwrap_or_else(|e| panic!("{e}")).steps
}

fn logged<'a>(replayer: &'a Replayer, step: &StepRecord) -> &'a LogRow {
    let rows = &replayer.run().log.rows;
    rows.iter().find(|r| r.attempt == step.attempt && r.step == step.step).expect("a logged step")
}

/// Fails unless every step lies within these relative deviations of the log, learning rates bit by bit.
pub fn assert_reproduced(replayer: &Replayer, steps: &[StepRecord], loss: f64, grad_norm: f64) {
    assert!(!steps.is_empty());
    for step in steps {
        let row = logged(replayer, step);
        let theirs = row.loss.expect("loss");
        let rounding = if replayer.run().semantics.rounds_loss { 5e-5 / theirs } else { 0.0 };
        let by = relative(step.loss, theirs);
        assert!(by <= loss + rounding, "step {}: loss {} for {theirs}, off by {by:e}", step.step, step.loss);
        let theirs = row.grad_norm.expect("grad_norm");
        let by = relative(step.grad_norm, theirs);
        assert!(by <= grad_norm, "step {}: grad_norm {} for {theirs}, off by {by:e}", step.step, step.grad_norm);
        let theirs = row.learning_rate.expect("learning rate");
        assert_eq!(step.learning_rate_logged.to_bits(), theirs.to_bits(), "step {}", step.step);
    }
}

#[test]
fn the_demonstration_reproduces_its_spike() {
    let replayer = open(DEMO);
    let start = Start::Initial;
    let trace = replayer.replay(&start, 3, &[], &mut Silent).expect("replay");
    assert_reproduced(&replayer, &trace.steps, 1e-4, 1e-3);
    assert!(trace.steps[1].loss < 0.06 && trace.steps[2].loss > 5.0, "the jump of the original report");
    let floor = Envelope::floor(replayer.scene().engine.plan());
    let certificate = certify(&replayer.run().log.rows, false, floor, &trace, &[]);
    assert_eq!((certificate.verdict, certificate.bump_at), (Reproduction::Reproduced, Some(3)));
}

/// Whole runs recorded by LLaMA-Factory on a CPU, spikes included: every logged loss, gradient norm and learning rate
/// equals the replay's to the last bit (transformers 4.48 logs four decimals of the loss).
#[test]
fn runs_replay_to_the_last_bit_of_their_logs() {
    for (run, steps, spike, bf16) in [
        (DEMO, 24, Some(3), false),
        (HEALTHY, 48, None, false),
        ("runs/e1-restarts-llama-bf16", 60, Some(35), true),
        ("runs/d1-noopt-llama-bf16", 24, None, true),
        (LEAK, 60, None, true),
    ] {
        if bf16 && !cpu_multiplies_pairs() {
            println!("{run} skipped: this processor has no AVX512-BF16, with which the run was recorded");
            continue;
        }
        let replayer = open(run);
        let trace = replayer.replay(&Start::Initial, steps, &[], &mut Silent).expect("replay");
        let floor = Envelope::floor(replayer.scene().engine.plan());
        let certificate = certify(&replayer.run().log.rows, replayer.run().semantics.rounds_loss, floor, &trace, &[]);
        assert_eq!((certificate.verdict, certificate.exact_to), (Reproduction::Reproduced, Some(steps)), "{run}");
        assert_eq!(certificate.comparisons.len() as u64, steps, "{run}: a step is not in the log");
        assert!(spike.is_none_or(|s| certificate.bump_at.is_some_and(|b| b <= s)), "{run}: {:?}", certificate.bump_at);
    }
}

fn cpu_multiplies_pairs() -> bool {
    spikeprobe::device::open("cpu", Some(1)).expect("cpu").fingerprint().contains("bf16")
}

#[test]
fn the_demonstration_spikes_within_the_band_of_other_honest_arithmetics() {
    let replayer = open(DEMO);
    let trace = replayer.replay(&Start::Initial, 4, &[], &mut Silent).expect("replay");
    let sibling = |seed| {
        let other = replayer.watched(Arc::new(Reorder { seed })).expect("the same run");
        other.replay(&Start::Initial, 4, &[Intervention::Perturb { seed }], &mut Silent).expect("replay")
    };
    let siblings: Vec<Trace> = (1..=3).map(sibling).collect();
    let floor = Envelope::floor(replayer.scene().engine.plan());
    let certificate = certify(&replayer.run().log.rows, false, floor, &trace, &siblings);
    assert_eq!(certificate.verdict, Reproduction::Reproduced);
    for comparison in certificate.comparisons.iter().filter(|c| c.after_bump) {
        let (low, high) = comparison.band.expect("four replays").loss;
        let logged = comparison.logged.loss.expect("loss");
        // At the jump itself the siblings are hardly apart yet: less than what summation order alone may do.
        let inside = low * (1.0 - floor.loss) <= logged && logged <= high * (1.0 + floor.loss);
        assert!(low < high && inside, "step {}: {logged} not in {low}..{high}", comparison.step);
        assert!(high / low < 1.01, "step {}: a band of {low}..{high} says nothing", comparison.step);
    }
}

/// Keeps the state after one step.
struct KeepState(u64, Option<TrainState>);

impl Observer for KeepState {
    fn wants_state(&mut self, step: u64) -> bool {
        step == self.0
    }
    fn state(&mut self, _: &dyn Device, state: &TrainState) -> spikeprobe::Result<()> {
        self.1 = Some(state.clone());
        Ok(())
    }
}

/// Every element, though one whose gradient is nearly zero moves by a share of the learning rate when its gradient is off
/// by a rounding: PyTorch's own AVX2 code path puts 1526 of the first checkpoint's elements beyond 1e-5, by up to 6.5e-4.
#[test]
fn adapters_are_those_of_the_real_checkpoints_bit_for_bit() {
    for (run, step) in [(DEMO, 2), (HEALTHY, 24)] {
        let replayer = open(run);
        let mut keep = KeepState(step, None);
        replayer.replay(&Start::Initial, step, &[], &mut keep).expect("replay");
        let state = keep.1.expect("the state");
        let adapter = replayer.run().checkpoint(step).expect("checkpoint").adapter().expect("adapter");
        let theirs = adapter.modules.iter().flat_map(|m| [(&m.path, 'A', &m.a), (&m.path, 'B', &m.b)]);
        let mut elements = 0;
        for (ours, (path, side, theirs)) in state.adapter.matrices().zip(theirs) {
            let ours = replayer.device().download(ours).expect("download");
            elements += ours.len();
            assert_eq!(&ours, theirs, "{run}: {path}.lora_{side}");
        }
        assert_eq!(elements, 74752);
    }
}

#[test]
fn a_step_after_a_checkpoint_is_exact() {
    let demo = open(DEMO);
    assert_reproduced(&demo, &replay(&demo, Start::Checkpoint(2), 3, &[]), 1e-5, 1e-4);
    let healthy = open(HEALTHY);
    assert_reproduced(&healthy, &replay(&healthy, Start::Checkpoint(24), 25, &[]), 1e-5, 1e-4);
}

#[test]
fn a_run_from_its_seed_alone_matches_its_log_until_the_first_bump() {
    let replayer = open(HEALTHY);
    assert_reproduced(&replayer, &replay(&replayer, Start::Initial, 6, &[]), 1e-4, 1e-3);
}

#[test]
fn a_resume_without_optimizer_state_starts_adam_and_schedule_afresh() {
    let replayer = open(LOST_OPTIMIZER);
    let steps = replay(&replayer, Start::Checkpoint(24), 26, &[]);
    assert_eq!(steps[0].learning_rate, 0.0, "warmup begins again");
    assert_reproduced(&replayer, &steps, 1e-3, 1e-2);
}

#[test]
fn a_resume_keeps_the_constants_stored_in_the_optimizer() {
    // train.yaml names other betas, eps and weight_decay than the first phase; load_state_dict brings the old ones back.
    let replayer = open(OTHER_CONSTANTS);
    let config = &replayer.run().config;
    assert_eq!((config.adam_beta1, config.adam_epsilon, config.weight_decay), (0.3, 1e-2, 20.0));
    let from_file = replay(&replayer, Start::Checkpoint(3), 6, &[]);
    assert_reproduced(&replayer, &from_file, 1e-5, 1e-4);
    assert_reproduced(&replayer, &replay(&replayer, Start::Initial, 6, &[]), 1e-5, 1e-4);
    // Asked for by name, a constant does change a replay from that checkpoint.
    let set = Intervention::Set { key: "adam_beta2".to_owned(), value: 0.5.into() };
    let with = replay(&replayer, Start::Checkpoint(3), 5, &[set]);
    let log = logged(&replayer, &with[1]).loss.expect("loss");
    assert!(relative(with[1].loss, log) > 1e-2, "{} for {log}", with[1].loss);
}

#[test]
fn packed_rows_give_the_logged_numbers() {
    // Plain: later examples of a row attend to earlier ones, positions restart. Neat (here with train_on_prompt): they
    // do not, but the first label of each is predicted by the example before it.
    for (run, examples) in [("runs/packing-plain", 2), ("runs/packing-neat", 2)] {
        let replayer = open(run);
        let window = replayer.window(1).expect("window");
        assert!(window.micro_batches.iter().all(|m| m.examples.len() > examples), "{run}: rows are packed");
        assert_reproduced(&replayer, &replay(&replayer, Start::Initial, 4, &[]), 1e-5, 1e-4);
    }
}

#[test]
fn an_epoch_boundary_leak_of_transformers_4_48_shows_in_window_and_loss() {
    let replayer = open(LEAK);
    let leaks = |step: u64| {
        let window = replayer.window(step).expect("window");
        window.micro_batches.iter().filter(|m| m.fetched.leaked).count()
    };
    let leaking: Vec<u64> = (1..=40).filter(|&s| leaks(s) > 0).collect();
    assert_eq!(leaking, [21], "the first step of the second epoch");
    assert_reproduced(&replayer, &replay(&replayer, Start::Initial, 3, &[]), 1e-3, 1e-2);
}

#[test]
fn fp16_steps_are_skipped_and_scaled_as_recorded() {
    let replayer = open(FP16);
    let path = folder(FP16).join("expected/h1_loss_scale.jsonl");
    let scales: Vec<f64> = std::fs::read_to_string(path)
        .expect("scales")
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).expect("json")["scale"].as_f64().expect("scale"))
        .collect();
    let mut before = 65536.0;
    for step in replay(&replayer, Start::Initial, 8, &[]) {
        assert_eq!(step.loss_scale, Some(before), "scale at step {}", step.step);
        before = scales[step.step as usize - 1];
        let skipped = logged(&replayer, &step).grad_norm.is_none_or(|g| !g.is_finite());
        assert_eq!(step.skipped, skipped, "step {}", step.step);
    }
}

#[test]
fn thread_count_and_repetition_leave_every_bit() {
    let traces = [1, 2, 2].map(|threads| replay(&open_on(DEMO, threads), Start::Checkpoint(2), 3, &[]));
    assert_eq!(traces[0], traces[1]);
    assert_eq!(traces[1], traces[2]);
}

/// Counts the steps that really ran.
struct Count(u64);

impl Observer for Count {
    fn step(&mut self, _: &StepRecord) -> spikeprobe::Result<()> {
        self.0 += 1;
        Ok(())
    }
}

#[test]
fn experiments_share_their_beginning_and_give_the_same_numbers() {
    let replayer = open(DEMO);
    let first = replay(&replayer, Start::Initial, 2, &[]);
    let mut count = Count(0);
    let again = replayer.replay(&Start::Initial, 3, &[], &mut count).expect("replay").steps;
    assert_eq!((count.0, &again[..2]), (3, &first[..]));
    assert_eq!(again, replay(&open(DEMO), Start::Initial, 3, &[]), "remembered or not");
    let held = [Intervention::HoldLearningRate { from_step: 2, value: 0.0 }];
    let held = replay(&replayer, Start::Initial, 3, &held);
    assert_eq!(held[0], first[0]);
    assert_eq!((held[1].learning_rate, held[1].update_norm), (0.0, 0.0));
    assert!(held[2].loss < 0.1, "without update 2 there is no spike: {}", held[2].loss);
}

#[test]
fn neutralised_rows_keep_their_place_and_lose_their_labels() {
    let replayer = open(DEMO);
    let row = replayer.window(1).expect("window").micro_batches[0].examples[0];
    let row = replayer.corpus().train[row].row;
    let plain = replay(&replayer, Start::Initial, 1, &[]).remove(0);
    let masked = replay(&replayer, Start::Initial, 1, &[Intervention::NeutraliseRows(vec![row])]).remove(0);
    let rows = |s: &StepRecord| s.micro_batches.iter().flat_map(|m| m.rows.clone()).collect::<Vec<_>>();
    assert_eq!(rows(&plain), rows(&masked));
    assert_eq!(masked.micro_batches[0].label_tokens, 0);
    assert!(plain.micro_batches[0].label_tokens > 0);
}

#[test]
fn a_lower_learning_rate_removes_the_spike_and_noise_does_not() {
    let replayer = open(DEMO);
    let calm = replay(&replayer, Start::Initial, 3, &[Intervention::ScaleLearningRate(0.05)]);
    assert!(calm[2].loss < 0.1, "{}", calm[2].loss);
    let noisy = replay(&replayer, Start::Initial, 3, &[Intervention::Perturb { seed: 1 }]);
    assert!(noisy[2].loss > 4.0, "{}", noisy[2].loss);
}

#[test]
fn steps_that_do_not_exist_are_named() {
    let replayer = open(DEMO);
    let far = replayer.replay(&Start::Initial, 99, &[], &mut Silent).expect_err("no step 99").to_string();
    assert!(far.contains("99") && far.contains("24"), "{far}");
    let none = replayer.replay(&Start::Checkpoint(7), 9, &[], &mut Silent).expect_err("no checkpoint-7").to_string();
    assert!(none.contains("checkpoint-7") && none.contains("checkpoints on disk"), "{none}");
}

#[test]
fn a_replay_goes_on_from_a_state_kept_on_disk() {
    // The second with the generator that draws its masks.
    [DEMO, "runs/dropout-resumed"].into_iter().for_each(goes_on_from_a_kept_state);
}

fn goes_on_from_a_kept_state(run: &str) {
    let keeping = tempfile::tempdir().expect("folder");
    let open = || {
        let root = folder(run);
        let cache = Some(Keeping { folder: keeping.path().to_owned(), every: std::time::Duration::ZERO });
        let source = Source { path: root.join(run), root, cache, ..Source::default() };
        Replayer::open(source, spikeprobe::device::open("cpu", Some(2)).expect("cpu")).expect("open")
    };
    let plain = replay(&self::open(run), Start::Initial, 3, &[]);
    assert_eq!(replay(&open(), Start::Initial, 2, &[]), plain[..2]);
    let files = || std::fs::read_dir(keeping.path()).expect("list").flatten().map(|e| e.path()).collect::<Vec<_>>();
    assert_eq!(files().len(), 2);
    assert_eq!(replay(&open(), Start::Initial, 3, &[]), plain, "from the file");
    for file in files() {
        std::fs::write(file, b"damaged").expect("write");
    }
    assert_eq!(replay(&open(), Start::Initial, 3, &[]), plain, "a damaged file counts as absent");
}
