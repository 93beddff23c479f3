//! Matrix products at the shapes of a SmolLM2-135M step (8 rows of 91 tokens), side by side with the gemm crate.
//! One thread: rates are per core.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use spikeprobe::device::{Compute, DType, Device, cpu::CpuDevice, noise};

const TOKENS: usize = 728;
/// (name, out, in): the projections, the vocabulary on labelled rows, a LoRA pair.
const SHAPES: [(&str, usize, usize); 6] =
    [("q", 576, 576), ("k", 192, 576), ("up", 1536, 576), ("down", 576, 1536), ("lora A", 8, 576), ("lora B", 576, 8)];

fn draw(n: usize, seed: u64) -> Vec<f32> {
    (0..n).map(|i| noise::symmetric(seed, 0, i as u64)).collect()
}

fn products(c: &mut Criterion) {
    let device = CpuDevice::new(Some(1)).expect("one thread");
    for (name, out, input) in SHAPES {
        let mut group = c.benchmark_group(format!("{name} {TOKENS}x{out}x{input}"));
        group.throughput(Throughput::Elements((2 * TOKENS * out * input) as u64));
        let (x, w) = (draw(TOKENS * input, 1), draw(out * input, 2));
        let mut y = vec![0f32; TOKENS * out];
        group.bench_function("gemm crate f32", |b| b.iter(|| library(&x, &w, &mut y, (TOKENS, out, input))));
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let compute = Compute::of(dtype);
            let x = device.upload(&x, &[TOKENS, input], dtype).expect("upload");
            let w = device.upload(&w, &[out, input], dtype).expect("upload");
            let dy = device.upload(&draw(TOKENS * out, 3), &[TOKENS, out], dtype).expect("upload");
            group.bench_function(format!("linear {dtype:?}"), |b| {
                b.iter(|| black_box(device.linear(&x, &w, None, compute, dtype)));
            });
            group.bench_function(format!("input gradient {dtype:?}"), |b| {
                b.iter(|| black_box(device.linear_input_grad(&dy, &w, compute, dtype)));
            });
        }
        group.finish();
    }
}

/// y = x · wᵀ by the gemm crate, all row-major.
fn library(x: &[f32], w: &[f32], y: &mut [f32], (m, n, k): (usize, usize, usize)) {
    assert!(x.len() == m * k && w.len() == n * k && y.len() == m * n);
    let (row_x, row_w, row_y) = (k as isize, k as isize, n as isize);
    // SAFETY: the strides stay inside the slices, whose lengths were just checked; y overlaps neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            row_y,
            false,
            x.as_ptr(),
            1,
            row_x,
            w.as_ptr(),
            row_w,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
