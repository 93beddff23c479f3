//! One window, forward and backward, through a model of SmolLM2-135M's width (its thirty layers, its whole
//! vocabulary, random weights): eight micro-batches of one row of 91 tokens, rank 8 on every linear. All cores.
//!
//! What measuring everything costs, probes per site against probes off, is taken in turns.
//! `cargo bench --bench step -- [fp32|bf16]`; without a name, both.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
mod smollm2;

use smollm2::{UNITS, adapter, asked_for, compare, window, write_model};
use spikeprobe::device::{DType, Device, cpu::CpuDevice};
use spikeprobe::model::{BaseModel, Engine, Gradients, PassOptions, PrecisionPlan};
use spikeprobe::probe::Probes;

/// All of its layers: the share of lm_head in a step, and in what is measured, is the real one.
const LAYERS: usize = 30;
const TURNS: usize = 50;

fn steps(c: &mut Criterion) {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path(), LAYERS);
    let base = Arc::new(BaseModel::open(dir.path()).expect("a model"));
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(None).expect("threads"));
    let adapter = adapter(&*device, &base.config);
    let batch = window(base.config.vocab);
    let seeds = vec![1e-3; UNITS];
    let bf16 = PrecisionPlan { base: DType::BF16, autocast: Some(DType::BF16), ..PrecisionPlan::F32 };
    for (name, plan) in [("fp32", PrecisionPlan::F32), ("bf16", bf16)] {
        if !asked_for(name, &["fp32", "bf16"]) {
            continue;
        }
        let engine = Engine::new(Arc::clone(&device), Arc::clone(&base), plan).expect("an engine");
        let mut group = c.benchmark_group(format!("window of {} tokens, {name}", batch.tokens()));
        group.sample_size(10).measurement_time(Duration::from_secs(6)).warm_up_time(Duration::from_secs(1));
        group.throughput(Throughput::Elements(batch.tokens() as u64));
        let pass = |probes| {
            let options = PassOptions { probes, ..PassOptions::default() };
            let mut gradients = Gradients::zeros(&*device, &adapter).expect("gradients");
            black_box(engine.pass(&adapter, &batch, &seeds, &options, &mut gradients).expect("a pass"));
        };
        group.bench_function("probes off", |b| b.iter(|| pass(Probes::Off)));
        group.finish();
        compare(&format!("{name}, probes"), TURNS, &mut || pass(Probes::Off), &mut || pass(Probes::PerSite));
    }
}

criterion_group!(benches, steps);
criterion_main!(benches);
