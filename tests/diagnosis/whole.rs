//! Whole diagnoses of recorded runs: cause, cost, and what the archive spares a second one.

use std::path::{Path, PathBuf};

use spikeprobe::Result;
use spikeprobe::diagnosis::archive::Archive;
use spikeprobe::diagnosis::diagnose::{Options, diagnose};
use spikeprobe::diagnosis::laboratory::{Laboratory, ReplayLaboratory, Subject};
use spikeprobe::diagnosis::remembering::Remembering;
use spikeprobe::diagnosis::{Cause, Diagnosis};
use spikeprobe::probe::Measurement;
use spikeprobe::replay::{BitFlip, FlipTarget, Intervention, Replayer, Silent, Source, Start, Trace};
use spikeprobe::run::AdapterWeights;

const LIMIT: u64 = 40;

fn open(root: &str, run: &str) -> Replayer {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(root);
    let source = Source { path: root.join("runs").join(run), root, ..Source::default() };
    Replayer::open(source, spikeprobe::device::open("cpu", Some(1)).expect("cpu")).expect("a run")
}

fn demo() -> Replayer {
    open("demo", "a8-lr-stage2-llama-fp32")
}

fn diagnosed(replayer: &Replayer, lab: &mut dyn Laboratory) -> Diagnosis {
    let subject = Subject::new(replayer.run(), *replayer.scene().engine.plan(), Some(replayer.corpus()));
    let vocab_size = Some(replayer.scene().engine.config().vocab);
    let options = Options { spike: None, windows: LIMIT, seconds: None, vocab_size };
    diagnose(&subject, lab, &options).expect("a diagnosis").diagnosis
}

/// The real laboratory, counting what it is asked; it breaks down after so many replays.
struct Counting<'a> {
    real: ReplayLaboratory<'a>,
    asked: usize,
    breaks_after: usize,
}

impl Counting<'_> {
    fn count(&mut self) -> Result<()> {
        self.asked += 1;
        if self.asked > self.breaks_after { Err(spikeprobe::Error::interrupted()) } else { Ok(()) }
    }
}

impl Laboratory for Counting<'_> {
    fn replay(&mut self, start: &Start, to: u64, changes: &[Intervention]) -> Result<Trace> {
        self.count()?;
        self.real.replay(start, to, changes)
    }
    fn adapter(&mut self, start: &Start, at: u64, changes: &[Intervention]) -> Result<AdapterWeights> {
        self.count()?;
        self.real.adapter(start, at, changes)
    }
    fn measure(&mut self, start: &Start, step: u64) -> Result<Vec<Measurement>> {
        self.count()?;
        self.real.measure(start, step)
    }
}

fn archived(replayer: &Replayer, folder: &Path, breaks_after: usize) -> (Option<Diagnosis>, usize, Vec<String>) {
    let mut counting = Counting { real: ReplayLaboratory { replayer }, asked: 0, breaks_after };
    let archive = Archive::new(folder);
    let mut lab = Remembering::new(&mut counting, &archive, replayer.identity().expect("an identity"));
    let subject = Subject::new(replayer.run(), *replayer.scene().engine.plan(), Some(replayer.corpus()));
    let options = Options { spike: None, windows: LIMIT, seconds: None, vocab_size: None };
    let diagnosis = diagnose(&subject, &mut lab, &options).ok().map(|answer| answer.diagnosis);
    (diagnosis, counting.asked, archive.notices())
}

/// Without what may differ between a first and a second diagnosis.
fn comparable(mut diagnosis: Diagnosis) -> String {
    diagnosis.cost.cached = 0;
    serde_json::to_string(&diagnosis).expect("json")
}

#[test]
fn a_learning_rate_that_is_too_high_is_named_within_the_windows_and_its_fix_is_proved() {
    let replayer = demo();
    let diagnosis = diagnosed(&replayer, &mut ReplayLaboratory { replayer: &replayer });
    assert_eq!(diagnosis.verdict.cause, Cause::LearningRate, "{}", diagnosis.verdict.summary);
    assert!(diagnosis.cost.experiments <= LIMIT, "{:?}", diagnosis.cost);
    assert_eq!(diagnosis.windows_replayed, diagnosis.cost.experiments);
    let fix = diagnosis.fix.expect("a fix");
    assert!(fix.height < 0.5 && fix.checked_steps >= 6 && diagnosis.cost.proof > 0, "{fix:?}");
    assert!(fix.changes["learning_rate"].as_f64().is_some_and(|rate| rate > 0.0));
}

#[test]
fn an_optimizer_state_lost_at_a_resume_is_named_where_the_log_itself_is_chaos() {
    let replayer = open("tests/fixtures/runs", "d1-noopt-llama-bf16");
    let diagnosis = diagnosed(&replayer, &mut ReplayLaboratory { replayer: &replayer });
    assert_eq!(diagnosis.verdict.cause, Cause::OptimizerState, "{}", diagnosis.verdict.summary);
    assert!(diagnosis.cost.experiments <= LIMIT, "{:?}", diagnosis.cost);
}

/// Plain cosine takes num_cycles for waves: with the restarts' own number it would rise again.
#[test]
fn a_schedule_that_restarts_is_replayed_as_one_cosine() {
    let replayer = open("tests/fixtures/runs", "e1-restarts-llama-bf16");
    let diagnosis = diagnosed(&replayer, &mut ReplayLaboratory { replayer: &replayer });
    assert_eq!(diagnosis.verdict.cause, Cause::Schedule, "{}", diagnosis.verdict.summary);
    let cosine = diagnosis.experiments.iter().find(|e| e.cause == Some(Cause::Schedule)).expect("the trial");
    assert_eq!(cosine.changes["lr_scheduler_type"], "cosine");
    assert_eq!(cosine.changes["lr_scheduler_kwargs"], serde_json::json!({}));
    assert!(cosine.height < 0.5, "what is left of the spike: {}", cosine.height);
}

/// The second diagnosis of a run replays nothing; one that was cut short goes on where it was; a damaged file is named
/// and made anew.
#[test]
fn a_diagnosis_is_not_repeated_and_one_that_was_cut_short_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let (cut, asked, _) = archived(&demo(), folder.path(), 3);
    assert!(cut.is_none() && asked == 4, "interrupted at the fourth");
    let (first, rest, notices) = archived(&demo(), folder.path(), usize::MAX);
    let first = first.expect("a diagnosis");
    assert_eq!((first.cost.cached, notices.len()), (3, 0));
    let (second, none, _) = archived(&demo(), folder.path(), 0);
    assert_eq!(none, 0, "everything was on disk");
    assert_eq!(comparable(second.expect("a diagnosis")), comparable(first.clone()));
    let file = std::fs::read_dir(folder.path()).expect("results").next().expect("a result").expect("an entry").path();
    std::fs::write(&file, b"cut off").expect("written");
    let (third, again, notices) = archived(&demo(), folder.path(), usize::MAX);
    assert_eq!((again, notices.len()), (1, 1), "{notices:?}");
    assert_eq!(comparable(third.expect("a diagnosis")), comparable(first));
    assert!(rest > 3);
}

#[test]
fn a_change_that_acts_later_leaves_the_steps_before_as_they_were() {
    let replayer = demo();
    let trace =
        |changes: &[Intervention]| replayer.replay(&Start::Initial, 5, changes, &mut Silent).expect("a trace").steps;
    let unchanged = trace(&[]);
    let scale = Intervention::ScaleLearningRate(0.1);
    let delayed = trace(&[scale.clone(), Intervention::After(2)]);
    assert_eq!(delayed[..2], unchanged[..2]);
    // Step 3 is measured before its own update.
    assert_eq!(delayed[2].loss_raw, unchanged[2].loss_raw);
    assert!(delayed[2].update_norm < 0.2 * unchanged[2].update_norm);
    assert_ne!(delayed[3].loss_raw, unchanged[3].loss_raw);
    assert_eq!(trace(&[scale.clone(), Intervention::After(0)]), trace(&[scale]));
    // A key of the configuration and the same as an intervention.
    let set =
        Intervention::Set { key: "learning_rate".into(), value: (0.1 * replayer.run().config.learning_rate).into() };
    let by_key = trace(&[set, Intervention::After(2)]);
    for (a, b) in by_key.iter().zip(&delayed) {
        assert!((a.learning_rate - b.learning_rate).abs() <= 1e-12 * b.learning_rate, "step {}", a.step);
        assert!((a.loss_raw - b.loss_raw).abs() <= 1e-5 * b.loss_raw, "step {}", a.step);
    }
}

/// Recorded (fixtures/runs/record_flip.py) with a bit flipped just before the checkpoint that is nearest to the spike.
#[test]
fn a_bit_that_flipped_is_found_though_dropout_drew_and_a_checkpoint_holds_the_damage() {
    let replayer = open("tests/fixtures/runs", "flip-before-checkpoint");
    let diagnosis = diagnosed(&replayer, &mut ReplayLaboratory { replayer: &replayer });
    assert_eq!(diagnosis.verdict.cause, Cause::Hardware, "{}", diagnosis.verdict.summary);
    let fault = diagnosis.fault.expect("a fault");
    assert!(fault.proved, "{}", fault.message);
    assert_eq!((fault.step, fault.target.as_str(), fault.bit), (16, "lora_B", Some(26)));
    assert_eq!(fault.tensor.as_deref(), Some("layers.1.mlp.down_proj"));
    let fix = diagnosis.fix.expect("a fix");
    let from = fix.changes["resume_from_checkpoint"].as_str().expect("a path");
    assert!(from.ends_with("checkpoint-8"), "{from}");
    assert!(diagnosis.shares.is_empty(), "nothing that was tried explains a fault: {:?}", diagnosis.shares);
}

/// The log of a healthy run, with what a small flip would have made of it.
fn with_a_small_flip(replayer: &Replayer, step: u64) -> Subject<'_> {
    let flip =
        BitFlip { step, target: FlipTarget::LoraB, tensor: "layers.1.mlp.down_proj".into(), element: 11, bit: 26 };
    let flips = [Intervention::FlipBit(flip)];
    let steps = replayer.replay(&Start::Checkpoint(24), 48, &flips, &mut Silent).expect("a trace").steps;
    let mut subject = Subject::new(replayer.run(), *replayer.scene().engine.plan(), Some(replayer.corpus()));
    for record in &steps {
        let row = subject.rows.iter_mut().find(|row| row.step == record.step).expect("a row");
        (row.loss, row.grad_norm) = (Some(record.loss), Some(record.grad_norm));
        let point = subject.points.iter_mut().find(|point| point.step == record.step).expect("a point");
        (point.loss, point.grad_norm) = (record.loss, record.grad_norm);
    }
    subject
}

#[test]
fn a_quiet_log_is_held_against_the_replay_and_a_fault_too_small_for_a_spike_is_told() {
    let replayer = open("tests/fixtures/runs", "k6-healthy-cos-qwen2-fp32");
    let options = Options { spike: None, windows: LIMIT, seconds: None, vocab_size: None };
    let told = |subject: &Subject<'_>| {
        diagnose(subject, &mut ReplayLaboratory { replayer: &replayer }, &options).expect("a diagnosis").diagnosis
    };
    let healthy = Subject::new(replayer.run(), *replayer.scene().engine.plan(), Some(replayer.corpus()));
    let healthy = told(&healthy);
    assert_eq!((healthy.verdict.cause, healthy.findings.len()), (Cause::None, 0));
    let certificate = healthy.certificate.expect("a certificate");
    assert_eq!((certificate.from, certificate.to, certificate.loss_max_rel), (25, 48, 0.0));
    let faulty = told(&with_a_small_flip(&replayer, 34));
    assert!(faulty.spikes.is_empty(), "{:?}", faulty.spikes);
    let finding = faulty.findings.iter().find(|f| f.code == "parts_exactly").expect("the finding");
    assert!(finding.place == "step 34" && finding.message.contains("up to step 33"), "{finding:?}");
    // No checkpoint after step 34 is kept that could name the bit.
    assert_eq!(faulty.verdict.cause, Cause::None);
    assert!(faulty.verdict.summary.contains("step 34"), "{}", faulty.verdict.summary);
}

/// Recorded: the flip moves the loss of its step by 3e-4.
#[test]
fn a_flip_that_moves_a_quiet_log_by_less_than_a_rounding_is_named_by_its_bits() {
    let replayer = open("tests/fixtures/runs", "flip-in-a-quiet-log");
    let diagnosis = diagnosed(&replayer, &mut ReplayLaboratory { replayer: &replayer });
    assert!(diagnosis.spikes.is_empty());
    assert_eq!(diagnosis.verdict.cause, Cause::Hardware, "{}", diagnosis.verdict.summary);
    let fault = diagnosis.fault.expect("a fault");
    assert_eq!((fault.step, fault.target.as_str(), fault.bit, fault.proved), (16, "lora_A", Some(26), true));
    assert_eq!(diagnosis.certificate.expect("a certificate").departs_at, Some(16));
    let fix = diagnosis.fix.expect("a fix");
    assert!(fix.changes["resume_from_checkpoint"].as_str().is_some_and(|from| from.ends_with("checkpoint-8")));
}
