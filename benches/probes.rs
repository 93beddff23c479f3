//! What measuring costs: statistics and norms of one activation, beside the operations it is measured around.
//! One thread.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use spikeprobe::device::{Compute, DType, Device, cpu::CpuDevice, noise};

const TOKENS: usize = 728;
const COLUMNS: usize = 1536;
const HIDDEN: usize = 576;

fn probes(c: &mut Criterion) {
    let device = CpuDevice::new(Some(1)).expect("one thread");
    let units: Vec<usize> = (0..=8).map(|i| i * 91).collect();
    let values: Vec<f32> = (0..TOKENS * COLUMNS).map(|i| noise::symmetric(1, 0, i as u64)).collect();
    // A tenth of a millionth: below fp16's normal range, which takes a second pass.
    let small: Vec<f32> = values.iter().map(|x| x * 1e-7).collect();
    let mut group = c.benchmark_group(format!("one activation {TOKENS}x{COLUMNS}"));
    group.throughput(Throughput::Bytes((TOKENS * COLUMNS * 4) as u64));
    for (name, values, dtype, range) in [
        ("ordinary", &values, DType::F32, DType::F32),
        ("bf16", &values, DType::BF16, DType::BF16),
        ("underflowing", &small, DType::F32, DType::F16),
    ] {
        let x = device.upload(values, &[TOKENS, COLUMNS], dtype).expect("upload");
        group.bench_function(format!("statistics, {name}"), |b| {
            b.iter(|| black_box(device.statistics(&x, &units, range)));
        });
        group.bench_function(format!("norms, {name}"), |b| b.iter(|| black_box(device.norms(&x, &units))));
    }
    let x = device.upload(&values, &[TOKENS, COLUMNS], DType::BF16).expect("upload");
    let w = device.upload(&values[..HIDDEN * COLUMNS], &[HIDDEN, COLUMNS], DType::BF16).expect("upload");
    group.bench_function("for comparison: copy", |b| b.iter(|| black_box(values.clone())));
    group.bench_function("for comparison: the linear that reads it", |b| {
        b.iter(|| black_box(device.linear(&x, &w, None, Compute::Bf16, DType::BF16)));
    });
    group.finish();
}

criterion_group!(benches, probes);
criterion_main!(benches);
