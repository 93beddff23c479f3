//! What checking costs: the products of a linear alone and with their checksums. One thread.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use spikeprobe::device::hooked::{Hook, Hooked};
use spikeprobe::device::{Compute, DType, Device, cpu::CpuDevice, noise};
use spikeprobe::numerics::Checksums;

/// Tokens of a window, hidden and feed-forward size of SmolLM2-135M.
const N: usize = 728;
const IN: usize = 576;
const OUT: usize = 1536;

fn checksums(c: &mut Criterion) {
    let plain: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1)).expect("one thread"));
    let checked: Arc<dyn Device> =
        Arc::new(Hooked { inner: Arc::clone(&plain), hook: Arc::new(Checksums::default()) as Arc<dyn Hook> });
    let mut group = c.benchmark_group(format!("a linear {N}x{IN} to {OUT}"));
    for (name, compute, dtype) in [("f32", Compute::F32, DType::F32), ("bf16", Compute::Bf16, DType::BF16)] {
        let random = |stream: u64, rows: usize, columns: usize| {
            let values: Vec<f32> = (0..(rows * columns) as u64).map(|k| noise::symmetric(1, stream, k)).collect();
            plain.upload(&values, &[rows, columns], dtype).expect("upload")
        };
        let (x, w, dy) = (random(0, N, IN), random(1, OUT, IN), random(2, N, OUT));
        for (how, device) in [("alone", &plain), ("with checksums", &checked)] {
            group.bench_function(format!("{name} forward {how}"), |b| {
                b.iter(|| black_box(device.linear(&x, &w, None, compute, dtype)));
            });
            group.bench_function(format!("{name} backward {how}"), |b| {
                b.iter(|| black_box(device.linear_input_grad(&dy, &w, compute, dtype)));
            });
        }
    }
    group.finish();
}

criterion_group!(benches, checksums);
criterion_main!(benches);
