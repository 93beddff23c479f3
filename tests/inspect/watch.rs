//! A live log: growing, cut, replaced; evidence kept; what the terminal shows; what GPUs report.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use spikeprobe::device::nvml::{Nvml, Reading, Report};
use spikeprobe::report::terminal::Style;
use spikeprobe::run::state_file::{FileRow, TrainerState};
use spikeprobe::watch::screen::{View, render};
use spikeprobe::watch::{Event, Keeper, Tail, Watch, changes};

use crate::run::{fixture, log_lines};

/// A trainer's log as it grows.
fn append(path: &std::path::Path, text: &str) {
    use std::io::Write;
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn a_watched_log_warns_within_a_line_and_survives_truncation_and_rotation() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trainer_log.jsonl");
    let (mut tail, mut watch) = (Tail::new(&path), Watch::default());
    assert_eq!(tail.read().unwrap().lines.len(), 0, "not there yet");
    let smooth: Vec<_> = (1..=30).map(|s| (s, 99, 2.0 - 0.02 * s as f64, 1)).collect();
    append(&path, &log_lines(&smooth));
    assert_eq!(watch.lines(&tail.read().unwrap().lines), []);
    // Half a line is not read; its second half completes it, and the spike is told at once.
    let spike = log_lines(&[(31, 99, 6.5, 2)]);
    append(&path, &spike[..20]);
    assert_eq!(tail.read().unwrap().lines.len(), 0);
    append(&path, &spike[20..]);
    let events = watch.lines(&tail.read().unwrap().lines);
    assert!(matches!(events.as_slice(), [Event::Spike { step: 31, .. }]), "{events:?}");
    append(&path, &log_lines(&[(32, 99, 6.0, 2)]));
    assert_eq!(watch.lines(&tail.read().unwrap().lines), [], "told once");
    // Truncated, then replaced by another file.
    std::fs::write(&path, log_lines(&[(1, 99, 2.0, 1)])).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 1);
    std::fs::write(folder.path().join("new"), log_lines(&[(1, 9, 2.0, 1), (2, 9, 1.9, 1)])).unwrap();
    std::fs::rename(folder.path().join("new"), &path).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 2);
    // Truncated, and grown beyond its old length before anybody looked.
    std::fs::write(&path, log_lines(&[(1, 9, 2.5, 1), (2, 9, 2.4, 1), (3, 9, 2.3, 1)])).unwrap();
    let news = tail.read().unwrap();
    assert!(news.restarted && news.lines.len() == 3, "{news:?}");
}

fn save(out: &Path, step: u64) {
    let dir = out.join(format!("checkpoint-{step}"));
    std::fs::create_dir_all(dir.join("global_step")).unwrap();
    std::fs::write(dir.join("trainer_state.json"), "{}").unwrap();
    std::fs::write(dir.join("global_step/states.pt"), [7; 9]).unwrap();
}

#[test]
fn evidence_is_kept_whole_and_frozen_by_a_spike() {
    let folder = tempfile::tempdir().unwrap();
    let (out, keep) = (folder.path().join("out"), folder.path().join("keep"));
    std::fs::create_dir(&out).unwrap();
    let mut keeper = Keeper::new(&out, &keep).unwrap();
    save(&out, 10);
    assert!(keeper.look().unwrap().is_empty(), "it may still be written");
    assert_eq!(keeper.look().unwrap(), ["checkpoint-10"]);
    let twice = |keeper: &mut Keeper, step| {
        save(&out, step);
        keeper.look().unwrap();
        keeper.look().unwrap();
    };
    for step in [20, 30] {
        twice(&mut keeper, step);
    }
    assert!(!keep.join("checkpoint-10").exists() && keep.join("checkpoint-30/trainer_state.json").exists());
    assert_eq!(std::fs::read(keep.join("checkpoint-30/global_step/states.pt")).unwrap(), [7; 9], "folders within, too");
    keeper.freeze();
    for step in [40, 50, 60] {
        twice(&mut keeper, step);
    }
    let kept = |step: u64| keep.join(format!("checkpoint-{step}")).exists();
    assert!(kept(20) && kept(30) && kept(40) && kept(50), "two before, two after");
    assert!(!kept(60), "a disk is not endless");
    // A later watch neither copies nor deletes what an earlier one kept; the trainer's own folder is refused.
    let mut later = Keeper::new(&out, &keep).unwrap();
    later.look().unwrap();
    assert_eq!(later.look().unwrap(), ["checkpoint-60"]);
    assert!(!kept(10) && kept(20) && kept(50));
    assert!(Keeper::new(&out, &out).unwrap_err().to_string().contains("another folder"));
}

fn followed(losses: impl Iterator<Item = f64>) -> Watch {
    let mut watch = Watch::default();
    let rows: Vec<_> = losses.enumerate().map(|(i, loss)| (i as u64 + 1, 99, loss, 1)).collect();
    let lines: Vec<String> = log_lines(&rows).lines().map(str::to_owned).collect();
    watch.lines(&lines);
    watch
}

#[test]
fn norms_come_with_a_checkpoint_and_tell_of_skipped_steps() {
    let mut watch = followed((0..20).map(|i| 2.0 - 0.01 * f64::from(i) + 1e-7));
    let row = |step| FileRow { step, grad_norm: Some(if step == 12 { f64::NAN } else { 1.0 }), ..FileRow::default() };
    let state = TrainerState { global_step: 20, rows: (1..=20).map(row).collect(), ..TrainerState::default() };
    let events = watch.norms(&state, true);
    assert!(matches!(events.as_slice(), [Event::Spike { step: 12, kind, .. }] if kind == "skipped_step"), "{events:?}");
    assert_eq!(watch.norms(&state, true), [], "told once");
    assert_eq!(watch.normed(), 20);
}

#[test]
fn a_loss_of_zero_is_nan_in_a_log_that_does_not_round_and_may_be_small_in_one_that_does() {
    let zero = |before: f64| {
        let mut watch = followed((0..12).map(|_| before));
        let line = log_lines(&[(13, 99, 0.0, 1)]);
        watch.lines(&[line.trim().to_owned()])
    };
    assert!(matches!(zero(0.000_312_345).as_slice(), [Event::Spike { kind, .. }] if kind == "masked_nan"));
    assert_eq!(zero(0.0003), []);
}

#[test]
fn the_screen_fits_its_terminal_and_shows_the_curve() {
    let watch = followed((0..60).map(|i| if i == 50 { 6.5 } else { 2.0 * (-0.05 * f64::from(i)).exp() }));
    let events = [
        Event::Spike { step: 51, kind: "jump".into(), before: Some(0.18), at: "6.5".into() },
        Event::Kept { checkpoint: "checkpoint-40".into() },
    ];
    let gpu = reading();
    for width in [40, 80, 120] {
        let view = View {
            title: "/a/run/with a long name/out",
            watch: &watch,
            events: &events,
            gpus: std::slice::from_ref(&gpu),
        };
        let text = render(&view, Style::plain(width));
        assert!(text.lines().all(|l| l.chars().count() <= width), "{width}:\n{text}");
        assert!(text.lines().count() <= 20, "{text}");
        assert!(text.contains("6.5000 │") && text.contains("step 60 of 99"), "{text}");
        // The peak stands alone in the top row.
        let top = text.lines().find(|l| l.contains("6.5000 │")).unwrap();
        let dots = top.chars().filter(|c| ('\u{2801}'..='\u{28ff}').contains(c)).count();
        assert!((1..=2).contains(&dots), "{text}");
        assert!(text.contains("spike at step 51"), "{text}");
    }
    let empty = render(&View { title: "out", watch: &Watch::default(), events: &[], gpus: &[] }, Style::plain(80));
    assert!(empty.contains("no line"), "{empty}");
    let mut broken = Watch::default();
    broken.lines(&[r#"{"current_steps": 1, "loss": NaN}"#.to_owned()]);
    let text = render(&View { title: "out", watch: &broken, events: &[], gpus: &[] }, Style::plain(80));
    assert!(text.contains("no finite loss"), "{text}");
}

fn reading() -> Reading {
    Reading {
        index: 0,
        name: "a GPU".into(),
        memory: Some((3 << 30, 8 << 30)),
        clock: Some(1500),
        temperature: Some(60),
        slowed: Some(false),
        ecc_uncorrected: Some(0),
    }
}

#[test]
fn faults_of_a_gpu_are_told_once() {
    let (quiet, loud) = (reading(), Reading { ecc_uncorrected: Some(2), slowed: Some(true), ..reading() });
    assert_eq!(changes(&[], std::slice::from_ref(&loud), &[]), [], "what was before the watch is no news");
    assert_eq!(changes(std::slice::from_ref(&quiet), std::slice::from_ref(&quiet), &[]), []);
    let told = changes(&[quiet], std::slice::from_ref(&loud), &[(0, Report::Xid(79))]);
    let text = format!("{told:?}");
    assert!(told.len() == 3 && text.contains("fallen off") && text.contains("2 more uncorrected"), "{text}");
    assert_eq!(changes(std::slice::from_ref(&loud), std::slice::from_ref(&loud), &[]), []);
}

/// The bindings against a library with nvml.h's functions, compiled here.
#[test]
fn readings_come_through_the_library_and_its_absence_is_silence() {
    let folder = tempfile::tempdir().unwrap();
    assert!(Nvml::open_at(&folder.path().join("nowhere.so")).is_none());
    let (source, library) = (fixture("inspect/nvml.c"), folder.path().join("libnvidia-ml.so.1"));
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).status();
    if !compiled.is_ok_and(|status| status.success()) {
        assert!(std::env::var_os("SPIKEPROBE_REQUIRE_ALL").is_none(), "no C compiler");
        eprintln!("skipped: no C compiler to build the stand-in for NVML");
        return;
    }
    let nvml = Nvml::open_at(&library).expect("two devices");
    let all = nvml.read();
    assert_eq!(all.len(), 2);
    let expected = Reading { name: "Stand-in 0".into(), clock: Some(1200), ..reading() };
    assert_eq!(all[0], expected);
    assert_eq!((all[1].slowed, all[1].ecc_uncorrected), (Some(true), None), "not supported is not zero");
    assert_eq!(nvml.reports(), [(1, Report::Xid(79)), (0, Report::DoubleBitEcc)]);
    assert_eq!(nvml.reports(), []);
}

/// A scripted trainer beside the real program: log lines in halves, a truncation, checkpoints that go away.
#[test]
fn a_trainer_is_followed_by_the_program_itself() {
    let folder = tempfile::tempdir().unwrap();
    let (out, keep, mark) = (folder.path().join("out"), folder.path().join("keep"), folder.path().join("mark"));
    std::fs::create_dir(&out).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_spikeprobe"))
        .args(["watch", "--every", "1", "--json", "-", "--exec"])
        .arg(format!("echo $SPIKEPROBE_STEP $SPIKEPROBE_KIND > '{}'", mark.display()))
        .arg("--keep-evidence")
        .args([&keep, &out])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let log = out.join("trainer_log.jsonl");
    let smooth: Vec<_> = (1..=30).map(|s| (s, 99, 2.0 - 0.02 * s as f64, 1)).collect();
    append(&log, &log_lines(&smooth));
    save(&out, 30);
    wait_for(|| keep.join("checkpoint-30").exists());
    let spike = log_lines(&[(31, 99, 6.5, 2)]);
    append(&log, &spike[..20]);
    std::fs::remove_dir_all(out.join("checkpoint-30")).unwrap();
    append(&log, &spike[20..]);
    wait_for(|| mark.exists());
    std::fs::write(&log, log_lines(&[(1, 9, 2.0, 0)])).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    child.kill().unwrap();
    let output = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
    let events: Vec<Value> = output.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let names: Vec<&str> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!(names, ["kept", "spike", "restarted"], "{output}");
    assert_eq!(std::fs::read_to_string(mark).unwrap(), "31 jump\n");
    assert!(keep.join("checkpoint-30/trainer_state.json").exists(), "the trainer deleted it, the copy stayed");
}

#[track_caller]
fn wait_for(mut true_now: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !true_now() {
        assert!(std::time::Instant::now() < end, "it did not happen within a minute");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
