//! A whole replay of a tiny run, from opening its files to the last logged step: what diagnosing costs dozens of.
//! All cores. The runs are the tests' fixtures.

use std::hint::black_box;
use std::path::PathBuf;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use spikeprobe::replay::{Replayer, Silent, Source, Start};

const RUNS: [&str; 3] = ["k6-healthy-cos-qwen2-fp32", "d1-noopt-llama-bf16", "h1-fp16-llama-rare"];

fn replays(c: &mut Criterion) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/runs");
    let device = spikeprobe::device::open("cpu", None).expect("cpu");
    for run in RUNS {
        let open = || {
            let source = Source { path: root.join("runs").join(run), root: root.clone(), ..Source::default() };
            Replayer::open(source, device.clone()).expect("a run")
        };
        let last = open().run().log.rows.iter().map(|row| row.step).max().expect("logged steps");
        let mut group = c.benchmark_group(run);
        group.sample_size(10).measurement_time(Duration::from_secs(8)).warm_up_time(Duration::from_secs(1));
        group.bench_function(format!("open and {last} steps"), |b| {
            b.iter(|| black_box(open().replay(&Start::Initial, last, &[], &mut Silent).expect("a replay")));
        });
        group.finish();
    }
}

criterion_group!(benches, replays);
criterion_main!(benches);
