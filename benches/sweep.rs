//! A grid of eight cells over a tiny run: as a sweep, whose cells share opened files and run side by side, against the
//! same cells one after another, each opened anew. All cores. The run is the tests' fixture.

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use spikeprobe::device::Device;
use spikeprobe::replay::{Replayer, Source};
use spikeprobe::sweep::folder::{Folder, Manifest};
use spikeprobe::sweep::grid::{Axis, Grid, Keep};
use spikeprobe::sweep::queue::{self, Shard};
use spikeprobe::sweep::replayed::{self, Replayed};
use spikeprobe::sweep::{Cell, SWEEP_SCHEMA};

/// Steps of every cell.
const STEPS: u64 = 12;

fn open(device: &Arc<dyn Device>) -> Replayer {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runs");
    let source = Source { path: root.join("runs/k6-healthy-cos-qwen2-fp32"), root, ..Source::default() };
    Replayer::open(source, Arc::clone(device)).expect("a run")
}

fn manifest(replayer: &Replayer) -> Manifest {
    let base = replayed::base(replayer, "initial", Some(STEPS)).expect("base");
    let typed = ["lr=x0.1,x0.3,x1,x3", "precision=fp32,bf16"];
    let axes: Vec<Axis> = typed.iter().map(|axis| Axis::parse(axis, &base).expect("axis")).collect();
    let grid = Grid { axes: axes.clone(), keep: Keep::MicroBatch, from: "initial".into() };
    Manifest {
        schema: SWEEP_SCHEMA.into(),
        run: "k6".into(),
        root: ".".into(),
        fingerprint: replayed::run_fingerprint(replayer, "initial").expect("fingerprint"),
        cells: grid.cells(&base).expect("cells"),
        axes,
        keep: grid.keep,
        own: replayed::own(replayer),
    }
}

/// Opens the run and computes every cell of the grid, as `spikeprobe sweep` does.
fn together(device: &Arc<dyn Device>, workers: usize) {
    let folder = tempfile::tempdir().expect("a folder");
    let replayer = open(device);
    let manifest = manifest(&replayer);
    let folder = Folder::create(folder.path()).expect("a folder");
    let context = replayed::context(&replayer);
    let trainer = Replayed::new(&replayer);
    let done = queue::run(&folder, &manifest, Shard::ALL, workers, &trainer, context, &|_, _| ()).expect("a sweep");
    assert_eq!(done.computed, manifest.cells.len());
}

/// Opens the run for one cell and computes it, with every core.
fn alone(device: &Arc<dyn Device>, cell: &Cell) {
    let replayer = open(device);
    let context = replayed::context(&replayer);
    black_box(queue::several(&[cell], "", &Replayed::new(&replayer), context).expect("a cell"));
}

fn sweeps(c: &mut Criterion) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let one = spikeprobe::device::open("cpu", Some(1)).expect("cpu");
    let all = spikeprobe::device::open("cpu", None).expect("cpu");
    let cells = manifest(&open(&one)).cells;
    let mut group = c.benchmark_group(format!("{} cells of {STEPS} steps", cells.len()));
    group.sample_size(10).measurement_time(Duration::from_secs(12)).warm_up_time(Duration::from_secs(1));
    group.bench_function("sweep", |b| b.iter(|| together(&one, cores)));
    group.bench_function("one by one", |b| b.iter(|| cells.iter().for_each(|cell| alone(&all, cell))));
    group.finish();
}

criterion_group!(benches, sweeps);
criterion_main!(benches);
