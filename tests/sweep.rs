//! Grids, folders, shards, merging and suggestions on a scripted trainer; and on recorded runs.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use spikeprobe::diagnosis::detect;
use spikeprobe::replay::{Replayer, Source, StepRecord};
use spikeprobe::report::terminal::Style;
use spikeprobe::sweep::folder::{Folder, Manifest, file_name};
use spikeprobe::sweep::grid::{Axis, Base, Grid, Keep};
use spikeprobe::sweep::present::Sweep;
use spikeprobe::sweep::queue::{self, Shard};
use spikeprobe::sweep::replayed::{self, Replayed};
use spikeprobe::sweep::{Cell, SWEEP_SCHEMA, Trainer};
use spikeprobe::{Error, Result};

/// Stable while learning rate / accumulation stays below 2e-4; diverges at half time above.
#[derive(Default)]
struct Scripted {
    trained: AtomicUsize,
    /// Fails at this many cells.
    fails_after: Option<usize>,
    /// Decides how many cells are run together.
    parameters: u64,
}

impl Trainer for Scripted {
    fn train(&self, cells: &[&Cell], watch: &mut dyn FnMut(usize, &StepRecord) -> ControlFlow<()>) -> Result<()> {
        cells.iter().enumerate().try_for_each(|(index, cell)| self.one(cell, &mut |record| watch(index, record)))
    }
    fn parameters(&self, _: &Cell) -> Result<u64> {
        Ok(self.parameters)
    }
    fn machine(&self) -> String {
        "scripted".into()
    }
}

impl Scripted {
    fn one(&self, cell: &Cell, watch: &mut dyn FnMut(&StepRecord) -> ControlFlow<()>) -> Result<()> {
        if self.fails_after.is_some_and(|n| self.trained.load(Ordering::SeqCst) >= n) {
            return Err(Error::device("out of memory"));
        }
        self.trained.fetch_add(1, Ordering::SeqCst);
        let number = |key: &str, default: f64| cell.axes.get(key).and_then(Value::as_f64).unwrap_or(default);
        let heat = number("learning_rate", 1e-3) / number("gradient_accumulation_steps", 8.0);
        let diverges = heat > 2e-4;
        for step in 1..=cell.steps {
            let progress = step as f64 / cell.steps as f64;
            let healthy = 0.05 + 3.0 * (-progress * heat * 5e4).exp();
            let loss = if diverges && progress > 0.5 { 6.0 } else { healthy };
            if watch(&record(step, loss)).is_break() {
                break;
            }
        }
        Ok(())
    }
}

fn record(step: u64, loss: f64) -> StepRecord {
    StepRecord {
        step,
        attempt: 0,
        epoch: 0.0,
        learning_rate: 1e-3,
        learning_rate_logged: 1e-3,
        loss,
        loss_raw: loss,
        loss_logged: None,
        grad_norm: 0.5,
        clip_coefficient: 1.0,
        update_norm: 0.1,
        loss_scale: None,
        skipped: false,
        nonfinite: 0,
        micro_batches: vec![],
    }
}

fn manifest(axes: &[&str]) -> Manifest {
    let base = Base { learning_rate: 1e-3, batch: 1, accumulation: 8, world_size: 1, max_steps: -1, steps: 48 };
    let axes: Vec<Axis> = axes.iter().map(|a| Axis::parse(a, &base).expect("axis")).collect();
    let grid = Grid { axes: axes.clone(), keep: Keep::MicroBatch, from: "initial".into() };
    Manifest {
        schema: SWEEP_SCHEMA.into(),
        run: "runs/x/train.yaml".into(),
        root: ".".into(),
        fingerprint: "f".repeat(32),
        cells: grid.cells(&base).expect("cells"),
        axes,
        keep: Keep::MicroBatch,
        own: [("learning_rate".into(), json!(1e-3)), ("gradient_accumulation_steps".into(), json!(8))].into(),
    }
}

const LADDER: [&str; 2] = ["lr=1e-4,3e-4,1e-3,3e-3", "accumulation=1,2,8"];

fn sweep(dir: &Path, manifest: &Manifest, shard: Shard, trainer: &Scripted) -> Result<queue::Done> {
    let folder = Folder::create(dir)?;
    folder.set_manifest(manifest)?;
    queue::run(&folder, manifest, shard, 2, trainer, detect::Context::default(), &|_, _| ())
}

/// File name → text without what time and place may change.
fn contents(dir: &Path) -> Vec<(String, Value)> {
    let mut files: Vec<(String, Value)> = std::fs::read_dir(dir.join("cells"))
        .expect("cells")
        .map(|entry| {
            let path = entry.expect("entry").path();
            let mut value: Value = serde_json::from_slice(&std::fs::read(&path).expect("file")).expect("JSON");
            value.as_object_mut().expect("object").remove("seconds");
            (path.file_name().expect("name").to_string_lossy().into_owned(), value)
        })
        .collect();
    files.sort_by(|a, b| a.0.cmp(&b.0));
    files
}

#[test]
fn a_stopped_sweep_goes_on_and_computes_nothing_twice() {
    let (dir, manifest) = (tempfile::tempdir().expect("dir"), manifest(&LADDER));
    // So many parameters that every cell runs alone.
    let alone = |fails_after| Scripted { fails_after, parameters: 1 << 40, ..Scripted::default() };
    let first = alone(Some(5));
    let error = sweep(dir.path(), &manifest, Shard::ALL, &first).expect_err("out of memory");
    assert!(error.to_string().contains("learning_rate"), "{error}");
    // What a kill -9 leaves behind: a temporary file, never half a result.
    std::fs::write(dir.path().join("cells/.spikeprobe-1234"), "{\"schema\":\"spi").expect("write");
    let second = alone(None);
    let done = sweep(dir.path(), &manifest, Shard::ALL, &second).expect("goes on");
    assert_eq!((done.kept, done.computed), (5, 7));
    assert_eq!(second.trained.load(Ordering::SeqCst), 7);
    std::fs::remove_file(dir.path().join("cells/.spikeprobe-1234")).expect("remove");
    let whole = tempfile::tempdir().expect("dir");
    sweep(whole.path(), &manifest, Shard::ALL, &alone(None)).expect("whole");
    assert_eq!(contents(dir.path()), contents(whole.path()));
}

#[test]
fn cells_that_run_together_are_kept_together_and_a_failure_costs_their_bunch() {
    let (dir, manifest) = (tempfile::tempdir().expect("dir"), manifest(&LADDER));
    let first = Scripted { fails_after: Some(5), ..Scripted::default() };
    sweep(dir.path(), &manifest, Shard::ALL, &first).expect_err("out of memory");
    // Three bunches of four learning rates, two of them at once.
    let second = Scripted::default();
    let done = sweep(dir.path(), &manifest, Shard::ALL, &second).expect("goes on");
    assert!(done.kept == 0 || done.kept == 4, "{done:?}");
    assert_eq!((done.kept + done.computed, second.trained.load(Ordering::SeqCst)), (12, done.computed));
    let whole = tempfile::tempdir().expect("dir");
    sweep(whole.path(), &manifest, Shard::ALL, &Scripted::default()).expect("whole");
    assert_eq!(contents(dir.path()), contents(whole.path()));
}

#[test]
fn cells_that_share_passes_get_every_bit_of_their_single_replays() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runs");
    let source = Source { path: root.join("runs/k6-healthy-cos-qwen2-fp32"), root, ..Source::default() };
    let device = spikeprobe::device::open("cpu", Some(1)).expect("cpu");
    let base = replayed::base(&Replayer::open(source.clone(), Arc::clone(&device)).expect("run"), "initial", Some(1));
    // Rates at which adapters part, and one at which a cell ends early; clipping that acts and that does not.
    let typed = ["lr=x0.3,x3,x1000", "clip=0.1,0", "precision=fp32,bf16,fp16", "accumulation=1,4"];
    let base = base.expect("base");
    let axes = typed.iter().map(|axis| Axis::parse(axis, &base).expect("axis")).collect();
    let cells = Grid { axes, keep: Keep::MicroBatch, from: "initial".into() }.cells(&base).expect("cells");
    let groups = |cell: &Cell| (cell.steps, cell.precision().map(str::to_owned));
    let mut sorted: Vec<&Cell> = cells.iter().collect();
    sorted.sort_by_key(|cell| groups(cell));
    for bunch in sorted.chunk_by(|a, b| groups(a) == groups(b)) {
        assert_eq!(bunch.len(), 6);
        let train = |cells: &[&Cell]| {
            let replayer = Replayer::open(source.clone(), Arc::clone(&device)).expect("run");
            let mut records = vec![Vec::new(); cells.len()];
            let mut watch = |index: usize, record: &StepRecord| {
                // Debug writes every bit of a float, NaN included.
                records[index].push(format!("{record:?}"));
                if record.loss_raw.is_nan() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            Replayed::new(&replayer).train(cells, &mut watch).expect("trains");
            records
        };
        let together = train(bunch);
        assert!(together.iter().any(|records| *records != together[0]));
        for (cell, records) in bunch.iter().zip(&together) {
            assert!(!records.is_empty());
            assert_eq!(*records, train(&[cell])[0], "{}", queue::name(cell));
        }
    }
}

#[test]
fn two_shards_merged_equal_one_run() {
    let manifest = manifest(&LADDER);
    let dirs: Vec<tempfile::TempDir> = (0..3).map(|_| tempfile::tempdir().expect("dir")).collect();
    for (index, dir) in dirs.iter().take(2).enumerate() {
        sweep(dir.path(), &manifest, Shard { index, count: 2 }, &Scripted::default()).expect("shard");
    }
    sweep(dirs[2].path(), &manifest, Shard::ALL, &Scripted::default()).expect("whole");
    let (folder, read) = Folder::open(dirs[0].path()).expect("manifest");
    assert_eq!(read, manifest);
    assert_eq!(folder.absorb(dirs[1].path(), &read).expect("merge"), 6);
    assert_eq!(contents(dirs[0].path()), contents(dirs[2].path()));
}

#[test]
fn shards_are_disjoint_and_complete() {
    for count in 1..7 {
        for cell in 0..20 {
            assert_eq!((0..count).filter(|index| Shard { index: *index, count }.holds(cell)).count(), 1);
        }
    }
    assert_eq!(Shard::parse("0/4"), Ok(Shard { index: 0, count: 4 }));
    for wrong in ["4/4", "1", "a/b", "-1/2", "0/0"] {
        assert!(Shard::parse(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_result_file_is_named_by_what_determines_it_and_by_nothing_else() {
    let manifest = manifest(&LADDER);
    let mut names: Vec<String> = manifest.cells.iter().map(|c| file_name(c, "a")).collect();
    assert!(names[0].starts_with("1-1e-4-") || names[0].starts_with("1-0.0001-"), "{}", names[0]);
    names.push(file_name(&manifest.cells[0], "b"));
    let mut longer = manifest.cells[0].clone();
    longer.steps += 1;
    names.push(file_name(&longer, "a"));
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn a_damaged_result_is_named_and_never_taken_for_one() {
    let (dir, manifest) = (tempfile::tempdir().expect("dir"), manifest(&["lr=1e-4,3e-4"]));
    sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect("sweep");
    let path = dir.path().join("cells").join(file_name(&manifest.cells[1], &manifest.fingerprint));
    std::fs::write(&path, "{").expect("write");
    let error = sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect_err("damaged");
    assert!(error.to_string().contains("remove the file"), "{error}");
}

#[test]
fn a_folder_of_another_run_is_refused() {
    let (dir, manifest) = (tempfile::tempdir().expect("dir"), manifest(&["lr=1e-4,3e-4"]));
    sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect("sweep");
    let other = Manifest { fingerprint: "0".repeat(32), ..manifest };
    assert!(sweep(dir.path(), &other, Shard::ALL, &Scripted::default()).is_err());
}

#[test]
fn the_suggestion_keeps_away_from_the_frontier() {
    let (dir, manifest) = (tempfile::tempdir().expect("dir"), manifest(&LADDER));
    sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect("sweep");
    let results = Folder::open(dir.path()).expect("folder").0.results(&manifest).expect("results");
    let sweep = Sweep::new(&manifest, &results);
    let frontier = |accumulation: u64| {
        let held =
            |f: &&spikeprobe::sweep::suggest::Frontier| f.held["gradient_accumulation_steps"] == json!(accumulation);
        sweep.frontiers.iter().find(held).map(|f| (f.stable_to, f.unstable_from)).expect("frontier")
    };
    // lr / accumulation ≤ 2e-4 is stable.
    assert_eq!(frontier(1), (Some(1e-4), Some(3e-4)));
    assert_eq!(frontier(2), (Some(3e-4), Some(1e-3)));
    assert_eq!(frontier(8), (Some(1e-3), Some(3e-3)));
    let suggestion = sweep.suggestion.as_ref().expect("suggestion");
    let (rate, accumulation) =
        (suggestion.axes["learning_rate"].as_f64(), suggestion.axes["gradient_accumulation_steps"].as_u64());
    let edge = [(Some(1e-4), Some(1)), (Some(3e-4), Some(2)), (Some(1e-3), Some(8))];
    assert!(!edge.contains(&(rate, accumulation)), "{suggestion:?}");
    assert!(results[suggestion.cell].as_ref().is_some_and(|r| r.outcome.stable));
}

#[test]
fn diverged_cells_stop_early_and_are_shown_as_such() {
    let (dir, manifest) = (tempfile::tempdir().expect("dir"), manifest(&LADDER));
    sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect("sweep");
    let results = Folder::open(dir.path()).expect("folder").0.results(&manifest).expect("results");
    let hottest = manifest.cells.iter().position(|c| c.axes["learning_rate"] == json!(3e-3)).expect("cell");
    let outcome = &results[hottest].as_ref().expect("result").outcome;
    assert!(outcome.stopped.is_some() && outcome.steps < manifest.cells[hottest].steps, "{outcome:?}");
    let sweep = Sweep::new(&manifest, &results);
    let text = sweep.terminal(Style::plain(100));
    println!("{text}");
    assert!(text.contains("diverged") && text.contains("→") && text.contains("*"), "{text}");
    let csv = sweep.csv().expect("csv");
    assert_eq!(csv.lines().count(), 13);
    assert!(csv.starts_with("learning_rate,gradient_accumulation_steps,stable,"));
    assert_eq!(sweep.json().expect("json")["cells"].as_array().map(Vec::len), Some(12));
}

#[test]
fn the_page_of_a_large_sweep_is_small_and_asks_the_network_for_nothing() {
    let rates: Vec<String> = (1..=25).map(|i| format!("{}e-5", i * 3)).collect();
    let axes =
        [format!("lr={}", rates.join(",")), "accumulation=1,2,4,8,16".into(), "precision=bf16,fp16,fp32,tf32".into()];
    let manifest = manifest(&axes.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(manifest.cells.len(), 500);
    let dir = tempfile::tempdir().expect("dir");
    sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect("sweep");
    let results = Folder::open(dir.path()).expect("folder").0.results(&manifest).expect("results");
    let html = Sweep::new(&manifest, &results).html();
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sweep.html");
    std::fs::write(path, &html).expect("temporary folder");
    assert!(html.len() < 1_500_000, "{}", html.len());
    assert!(!html.contains("<script") && !html.contains("src=") && !html.contains("href="));
}

/// `spikeprobe sweep` of a fixture, eight cells of two steps, one cell at a time.
fn program(out: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_spikeprobe"));
    command.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runs"));
    command.args(["sweep", "runs/k6-healthy-cos-qwen2-fp32", "--device", "cpu", "-q", "--jobs", "1", "--steps", "2"]);
    command.args(["--lr", "x0.1,x0.3,x1,x3", "--grid", "max_grad_norm=0.5,1", "--out"]).arg(out);
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    command
}

/// Finished cells: file name → when it was written.
fn finished(dir: &Path) -> std::collections::BTreeMap<String, std::time::SystemTime> {
    let entries = std::fs::read_dir(dir.join("cells")).into_iter().flatten().flatten();
    let named = entries.map(|e| (e.file_name().to_string_lossy().into_owned(), e));
    let whole = named.filter(|(name, _)| name.ends_with(".json"));
    whole.filter_map(|(name, e)| Some((name, e.metadata().ok()?.modified().ok()?))).collect()
}

#[test]
fn a_sweep_killed_at_any_moment_loses_and_repeats_nothing_but_the_cell_in_flight() {
    let (killed, whole) = (tempfile::tempdir().expect("dir"), tempfile::tempdir().expect("dir"));
    for wait in [3, 40, 90, 160] {
        let before = finished(killed.path());
        let mut child = program(killed.path()).spawn().expect("starts");
        std::thread::sleep(std::time::Duration::from_millis(wait));
        child.kill().expect("SIGKILL");
        child.wait().expect("ends");
        let after = finished(killed.path());
        assert!(before.iter().all(|(name, time)| after.get(name) == Some(time)), "a result was lost or written again");
    }
    let before = finished(killed.path());
    let ends = |dir: &Path| {
        let done = program(dir).output().expect("starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    };
    ends(killed.path());
    ends(whole.path());
    let after = finished(killed.path());
    assert!(before.iter().all(|(name, time)| after.get(name) == Some(time)), "a result was written again");
    std::fs::read_dir(killed.path().join("cells"))
        .expect("cells")
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_none_or(|e| e != "json"))
        .for_each(|half| std::fs::remove_file(half).expect("what a kill left half written"));
    assert_eq!(contents(killed.path()), contents(whole.path()));
}

#[test]
fn two_shards_of_a_recorded_run_equal_one_sweep_of_it_bit_for_bit() {
    let dirs: Vec<tempfile::TempDir> = (0..3).map(|_| tempfile::tempdir().expect("dir")).collect();
    for (dir, shard) in dirs.iter().zip(["0/2", "1/2", "0/1"]) {
        let done = program(dir.path()).args(["--shard", shard]).output().expect("starts");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }
    let mut merge = std::process::Command::new(env!("CARGO_BIN_EXE_spikeprobe"));
    let done = merge.args(["sweep", "merge", "-q"]).args([dirs[0].path(), dirs[1].path()]).output().expect("starts");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    // Without the suggestion's check, which only a whole sweep makes.
    let named = |dir: &Path| contents(dir).into_iter().filter(|(name, _)| !name.contains("-43-")).collect::<Vec<_>>();
    assert_eq!(named(dirs[0].path()).len(), 8);
    assert_eq!(named(dirs[0].path()), named(dirs[2].path()));
}

#[test]
fn a_neighbour_that_hardly_trains_is_no_reserve() {
    let manifest = manifest(&["lr=1e-4,3e-4,1e-3"]);
    let dir = tempfile::tempdir().expect("dir");
    sweep(dir.path(), &manifest, Shard::ALL, &Scripted::default()).expect("sweep");
    let mut results = Folder::open(dir.path()).expect("folder").0.results(&manifest).expect("results");
    for (result, loss) in results.iter_mut().flatten().zip([0.07, 0.05, 1.4]) {
        assert!(result.outcome.stable);
        result.outcome.final_loss = loss;
    }
    let suggested = Sweep::new(&manifest, &results).suggestion.expect("suggestion");
    assert_eq!(suggested.axes["learning_rate"], json!(1e-4), "{suggested:?}");
}
