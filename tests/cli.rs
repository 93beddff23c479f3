//! The program as a user types it: exit codes, messages, files.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spikeprobe"));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["--root", "demo", "--device", "cpu"]);
    command
}

const RUN: &str = "demo/runs/a8-lr-stage2-llama-fp32";

fn output(arguments: &[&str]) -> Output {
    program().args(arguments).output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn replay_prints_a_table_and_writes_the_documented_json() {
    let folder = tempfile::tempdir().expect("folder");
    let (json, trace) = (folder.path().join("out.json"), folder.path().join("trace.jsonl"));
    let paths = [json.to_str().expect("path"), trace.to_str().expect("path")];
    let done = output(&["replay", RUN, "--to", "3", "--json", paths[0], "--trace", paths[1]]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(text(&done.stdout).contains("the log is reproduced"), "{}", text(&done.stdout));
    let value: Value = serde_json::from_str(&std::fs::read_to_string(&json).expect("json")).expect("valid");
    assert_eq!(value["schema"], "spikeprobe.replay/1");
    assert_eq!(value["start"]["kind"], "initial");
    assert_eq!(value["certificate"]["verdict"], "reproduced");
    let step = &value["steps"][2];
    for key in [
        "step",
        "epoch",
        "learning_rate",
        "learning_rate_logged",
        "loss",
        "loss_raw",
        "grad_norm",
        "clip_coefficient",
        "update_norm",
        "loss_scale",
        "skipped",
        "nonfinite",
        "micro_batches",
        "logged",
    ] {
        assert!(step.get(key).is_some(), "{key} is missing in {step}");
    }
    let micro = &step["micro_batches"][0];
    for key in ["rows", "tokens", "label_tokens", "loss", "mean_loss", "grad_norm", "nonfinite"] {
        assert!(micro.get(key).is_some(), "{key} is missing in {micro}");
    }
    assert_eq!(micro["rows"][0]["dataset"], "train");
    let lines = std::fs::read_to_string(&trace).expect("trace");
    let last: Value = serde_json::from_str(lines.lines().last().expect("a line")).expect("valid");
    assert_eq!((lines.lines().count(), &last["step"]), (3, &Value::from(3)));
}

#[test]
fn json_on_standard_output_comes_alone() {
    let done = output(&["replay", RUN, "--to", "1", "--json", "-"]);
    let value: Value = serde_json::from_slice(&done.stdout).expect("nothing but JSON");
    assert_eq!(value["steps"].as_array().map(Vec::len), Some(1));
}

#[test]
fn wrong_usage_is_2_and_bad_input_is_1_with_the_place_and_a_remedy() {
    assert_eq!(output(&["replay", RUN, "--device", "gpu"]).status.code(), Some(2));
    assert_eq!(output(&["replay", RUN, "--to", "soon"]).status.code(), Some(2));
    let cases: [(&[&str], &[&str]); 5] = [
        (&["replay", "no/such/run"], &["no/such/run", "try:"]),
        (&["replay", RUN, "--from", "7"], &["checkpoint-7", "checkpoints on disk: 2"]),
        (&["replay", RUN, "--to", "999"], &["999", "24"]),
        (&["replay", RUN, "--set", "no_such_key=1"], &["no_such_key"]),
        (&["replay", RUN, "--set", "optim=adafactor", "--to", "1"], &["adafactor", "optim"]),
    ];
    for (arguments, expected) in cases {
        let done = output(arguments);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{arguments:?}: {said}");
        for word in expected {
            assert!(said.contains(word), "{arguments:?}: {word} is not in: {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
    }
    let done = output(&["replay", RUN, "--neutralise-rows", "nothing:1", "--to", "1"]);
    assert_eq!(done.status.code(), Some(2), "{}", text(&done.stderr));
    assert!(text(&done.stderr).contains("it has train"), "{}", text(&done.stderr));
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = program()
        .args(["replay", RUN, "--to", "1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start");
    drop(child.stdout.take());
    let done = child.wait_with_output().expect("end");
    assert!(done.status.success(), "{}", text(&done.stderr));
}

#[test]
fn results_that_cannot_be_written_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("missing/out.json");
    let done = output(&["replay", RUN, "--to", "1", "--json", file.to_str().expect("path")]);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("out.json"), "{}", text(&done.stderr));
    assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 0);
}

#[test]
fn results_that_cannot_be_written_are_refused_before_the_work() {
    let folder = tempfile::tempdir().expect("folder");
    let place = folder.path().to_str().expect("path");
    let lost = folder.path().join("missing/x.html");
    // Nothing is replayed first: these runs do not exist.
    for (command, option, path) in [
        ("replay", "--json", place),
        ("replay", "--trace", place),
        ("diagnose", "--html", lost.to_str().expect("path")),
        ("diagnose", "--fix", place),
        ("eval", "--html", place),
        ("bench", "--html", place),
        ("inspect", "--json", place),
        ("preflight", "--json", place),
    ] {
        let done = output(&[command, "no/such/run", option, path]);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{command}: {said}");
        assert!(said.contains(path) && said.contains("try:") && !said.contains("no/such/run"), "{command}: {said}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("list").count(), 0);
}

#[test]
fn values_that_no_clock_and_no_machine_has_are_wrong_usage() {
    for arguments in [
        ["diagnose", RUN, "--seconds", "nan"],
        ["diagnose", RUN, "--seconds", "1e30"],
        ["replay", RUN, "--threads", "60000"],
        ["replay", RUN, "--set", "=1"],
    ] {
        let done = output(&arguments);
        assert_eq!(done.status.code(), Some(2), "{arguments:?}: {}", text(&done.stderr));
        assert!(!text(&done.stderr).contains("panicked"), "{}", text(&done.stderr));
    }
}

/// The demonstration's run with its files in `folder`, its root.
fn copied(folder: &Path) -> std::path::PathBuf {
    for file in spikeprobe::cli::demo::FILES {
        let path = folder.join(file.path);
        std::fs::create_dir_all(path.parent().expect("parent")).expect("folder");
        std::fs::write(path, file.content).expect("file");
    }
    folder.join(spikeprobe::cli::demo::RUN)
}

fn output_in(root: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_spikeprobe"));
    command.current_dir(root).args(["--device", "cpu", "--no-cache"]).args(arguments).output().expect("the program")
}

#[test]
fn what_was_left_out_of_the_log_is_said_and_a_log_without_a_loss_is_no_quiet_log() {
    let folder = tempfile::tempdir().expect("folder");
    let run = copied(folder.path());
    let log = run.join("out/trainer_log.jsonl");
    let mut lines = std::fs::read_to_string(&log).expect("log");
    lines.push_str("{\"current_steps\": 25, \"los");
    std::fs::write(&log, lines).expect("log");
    std::fs::write(run.join("out/trainer_state.json"), "{").expect("state");
    let said = text(&output_in(folder.path(), &["replay", run.to_str().expect("path"), "--to", "1"]).stderr);
    assert!(said.contains("out/trainer_log.jsonl:") && said.contains("trainer_state.json"), "{said}");

    std::fs::remove_dir_all(run.join("out")).expect("removed");
    let done = output_in(folder.path(), &["diagnose", run.to_str().expect("path"), "--json", "-"]);
    let value: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!(value["verdict"]["cause"], "undetermined");
    assert!(value["verdict"]["summary"].as_str().is_some_and(|s| s.contains("no log") && s.contains("output_dir")));

    // A folder of the log's name is not a run without a log.
    std::fs::create_dir_all(&log).expect("folder");
    let done = output_in(folder.path(), &["diagnose", run.to_str().expect("path")]);
    let said = text(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{said}");
    assert!(said.contains("trainer_log.jsonl") && said.contains("try:"), "{said}");
}

#[test]
fn a_damaged_checkpoint_leaves_the_evaluations_before_it() {
    let folder = tempfile::tempdir().expect("folder");
    let run = copied(folder.path());
    let later = run.join("out/checkpoint-4");
    std::fs::create_dir(&later).expect("folder");
    // The trainer was killed while it saved: what the damaged one is not needed for goes on.
    std::fs::write(later.join("adapter_model.safetensors"), "half").expect("file");
    let replay = output_in(folder.path(), &["replay", run.to_str().expect("path"), "--to", "1", "-v"]);
    let said = text(&replay.stderr);
    assert!(replay.status.success() && said.contains("checkpoint-4 is damaged"), "{said}");
    let arguments = ["eval", run.to_str().expect("path"), "--set", "eval_dataset=train", "--json", "-"];
    let done = output_in(folder.path(), &arguments);
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("checkpoint-4"), "{}", text(&done.stderr));
    let value: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!((&value["interrupted"], &value["sets"][0]["evaluations"][0]["step"]), (&true.into(), &2.into()));
}

#[test]
fn a_cell_that_fails_leaves_the_cells_before_it() {
    let folder = tempfile::tempdir().expect("folder");
    let out = folder.path().join("sweep");
    let arguments = ["sweep", RUN, "--grid", "rank=8,4000000", "--steps", "1", "--jobs", "1", "--json", "-"];
    let done = program().args(arguments).args(["--out", out.to_str().expect("path")]).output().expect("the program");
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done.stderr).contains("lora_rank") && text(&done.stderr).contains("try:"), "{}", text(&done.stderr));
    let value: Value = serde_json::from_slice(&done.stdout).expect("JSON");
    assert_eq!((&value["missing"], &value["cells"][0]["outcome"]["steps"]), (&1.into(), &1.into()));
}

#[test]
fn a_spike_that_was_asked_for_and_is_not_there_is_said() {
    let said = text(&output(&["diagnose", RUN, "--no-cache", "--windows", "0", "--spike", "999"]).stderr);
    assert!(said.contains("no spike at step 999") && said.contains("step 3"), "{said}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_named_and_a_device_stays_a_device() {
    use std::os::unix::fs::FileTypeExt;
    for (path, code) in [("/dev/full", 1), ("/dev/null", 0)] {
        let done = output(&["replay", RUN, "--to", "1", "--json", path]);
        let said = text(&done.stderr);
        assert_eq!(done.status.code(), Some(code), "{said}");
        assert!(
            code == 0 || (said.contains(path) && said.contains("No space left") && said.contains("try:")),
            "{said}"
        );
        assert!(std::fs::metadata(path).expect(path).file_type().is_char_device(), "{path} was replaced by a file");
    }
}

#[test]
#[cfg(unix)]
fn ctrl_c_and_a_scheduler_keep_what_is_done_and_exit_with_130() {
    for signal in ["-INT", "-TERM"] {
        let folder = tempfile::tempdir().expect("folder");
        let json = folder.path().join("out.json");
        // More siblings than anybody waits for.
        let child = program()
            .args(["replay", RUN, "--envelope", "100000", "--json", json.to_str().expect("path")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start");
        std::thread::sleep(std::time::Duration::from_millis(1500));
        let killed = Command::new("kill").args([signal, &child.id().to_string()]).status().expect("kill");
        assert!(killed.success());
        let done = child.wait_with_output().expect("end");
        assert_eq!(done.status.code(), Some(130), "{}", text(&done.stderr));
        // On a slow machine not even the first step was done.
        if json.exists() {
            let value: Value = serde_json::from_str(&std::fs::read_to_string(&json).expect("json")).expect("whole");
            assert_eq!(value["interrupted"], true);
        }
        let left: Vec<_> = std::fs::read_dir(folder.path()).expect("list").flatten().map(|e| e.path()).collect();
        assert!(left.iter().all(|p| p.as_path() == Path::new(&json)), "{left:?}");
    }
}

#[test]
#[cfg(unix)]
fn a_result_written_through_a_link_leaves_the_link() {
    let folder = tempfile::tempdir().expect("folder");
    let (file, link) = (folder.path().join("real.json"), folder.path().join("link.json"));
    std::fs::write(&file, "old").expect("write");
    std::os::unix::fs::symlink(&file, &link).expect("link");
    let done = output(&["replay", RUN, "--to", "1", "--json", link.to_str().expect("path")]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    assert!(std::fs::symlink_metadata(&link).expect("link").is_symlink());
    assert!(std::fs::read_to_string(&file).expect("file").contains("spikeprobe.replay/1"));
}

#[test]
fn the_demonstration_carries_every_file_of_its_folder() {
    fn walk(folder: &Path, into: &mut Vec<std::path::PathBuf>) {
        for entry in std::fs::read_dir(folder).expect("list").flatten() {
            if entry.path().is_dir() { walk(&entry.path(), into) } else { into.push(entry.path()) }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
    let mut on_disk = Vec::new();
    walk(&root, &mut on_disk);
    let mut on_disk: Vec<_> = on_disk.iter().map(|p| p.strip_prefix(&root).expect("inside").to_owned()).collect();
    on_disk.sort();
    let mut embedded: Vec<_> = spikeprobe::cli::demo::FILES.iter().map(|f| std::path::PathBuf::from(f.path)).collect();
    embedded.sort();
    assert_eq!(on_disk, embedded);
}

#[test]
fn numerics_describes_the_device_and_marks_what_no_gpu_confirmed() {
    let done = output(&["numerics", "--device", "cpu", "--json", "-"]);
    assert!(done.status.success(), "{}", text(&done.stderr));
    let json: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(json["schema"], "spikeprobe.numerics/1");
    assert_eq!(json["products"]["f32"]["accumulator_bits"], 24);
    let published = json["published"].as_array().unwrap();
    assert!(
        published.iter().all(|p| p["confirmed"] == false
            && p["source"].as_str().is_some_and(|s| s.contains("arXiv") || s.contains("PeerJ")))
    );
}

#[test]
fn triage_finds_a_planted_fault_and_exits_with_1() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/runs");
    let run = "runs/k6-healthy-cos-qwen2-fp32";
    let triage = |inject: &[&str]| {
        let common = ["numerics", "--triage", run, "--root", root, "--step", "2", "--device", "cpu", "--json", "-"];
        Command::new(env!("CARGO_BIN_EXE_spikeprobe")).current_dir(root).args(common).args(inject).output().unwrap()
    };
    let clean = triage(&[]);
    assert_eq!((clean.status.code(), state(&clean).as_str()), (Some(0), "correct"), "{}", text(&clean.stderr));
    let faulty = triage(&["--inject", "142:0:900:flip=20"]);
    assert_eq!((faulty.status.code(), state(&faulty).as_str()), (Some(1), "persistent"));
    assert!(text(&faulty.stderr).contains("layers.3.self_attn.v_proj") && text(&faulty.stderr).contains("try:"));
    let once = triage(&["--inject", "142:0:900:flip=20:once"]);
    assert_eq!((once.status.code(), state(&once).as_str()), (Some(1), "transient"));
    assert_eq!(triage(&["--inject", "x"]).status.code(), Some(2));
}

fn state(done: &Output) -> String {
    let json: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap_or_default();
    json["state"].as_str().unwrap_or_default().to_owned()
}
