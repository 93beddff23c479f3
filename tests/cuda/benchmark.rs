//! How fast each kernel is: bytes it must move, flops, and the time it takes. On the emulator and in ordinary test runs a
//! smoke test with small tensors; scripts/gpu-check sets SPIKEPROBE_BENCHMARK=1 and reads the lines.
//!
//! Bytes and flops of kernels/PERFORMANCE.md come from the same formulas (`paper`).

use std::time::Instant;

use spikeprobe::Result;
use spikeprobe::device::cuda::CudaDevice;
use spikeprobe::device::{AdamW, AttentionShape, Compute, DType, Device, LowRank, Tensor, Update, UpdateRule};

use crate::device::reference::values;

/// The tensors of one layer and one step.
pub struct Size {
    /// Tokens, in rows of `row`.
    pub n: usize,
    row: usize,
    pub hidden: usize,
    pub wide: usize,
    heads: usize,
    dim: usize,
    vocabulary: usize,
    labelled: usize,
    /// LoRA parameters, in `matrices` tensors.
    parameters: usize,
    matrices: usize,
}

/// One layer of a 7B Llama, bf16, rank 8 on every linear.
pub const FULL: Size = Size {
    n: 8192,
    row: 2048,
    hidden: 4096,
    wide: 11_008,
    heads: 32,
    dim: 128,
    vocabulary: 32_000,
    labelled: 1000,
    parameters: 20_000_000,
    matrices: 448,
};
const SMALL: Size = Size {
    n: 24,
    row: 12,
    hidden: 64,
    wide: 96,
    heads: 2,
    dim: 32,
    vocabulary: 100,
    labelled: 5,
    parameters: 9000,
    matrices: 4,
};

/// Flops that measuring an element takes where its eight neighbours are ordinary (kernels/measure.cuh).
pub const TALLY: f64 = 11.0;

/// (name, bytes from and to memory, flops) of each case, by the names that [`Inputs::run`] knows.
pub fn costs(s: &Size) -> Vec<(&'static str, f64, f64)> {
    let (h, w) = ((s.n * s.hidden) as f64, (s.n * s.wide) as f64);
    let pairs = (s.heads * s.n) as f64 * (s.row + 1) as f64 / 2.0 * s.dim as f64;
    let logits = (s.labelled * s.vocabulary) as f64;
    let p = s.parameters as f64;
    vec![
        ("copy", 4.0 * w, 0.0),
        ("cast f32 to bf16", 6.0 * h, 0.0),
        ("gather_rows", 4.0 * h, 0.0),
        ("add", 6.0 * h, h),
        ("scale", 4.0 * h, h),
        ("rms_norm", 4.0 * h, 4.0 * h),
        ("rms_norm_grad", 8.0 * h, 9.0 * h),
        ("rope", 4.0 * h, 3.0 * h),
        ("gate", 6.0 * w, 20.0 * w),
        ("gate_grad", 10.0 * w, 40.0 * w),
        ("attention", 8.0 * h, 4.0 * pairs),
        // delta, dq, dk and dv: 2 + 6 + 8 flops a pair and column.
        ("attention_grad", 22.0 * h, 14.0 * pairs),
        ("cross_entropy", 4.0 * logits, 30.0 * logits),
        // Both products of depth 8 written, then add_scaled (read both, write one), or add_in_turn (read three).
        ("linear_adapted, depth 8", 10.0 * h, (32.0 + 2.0) * h),
        ("input_grad_onto, depth 8", 12.0 * h, (32.0 + 2.0) * h),
        ("accumulate_units, 8 of rank 8", 4.0 * (8.0 + 2.0) * 8.0 * s.hidden as f64, 8.0 * 8.0 * s.hidden as f64),
        ("statistics, hidden", 2.0 * h, TALLY * h),
        ("statistics, gate", 2.0 * w, TALLY * w),
        ("add, measured", 6.0 * h, (1.0 + TALLY) * h),
        ("rms_norm, measured", 4.0 * h, (4.0 + TALLY) * h),
        ("rope, measured", 4.0 * h, (3.0 + TALLY) * h),
        ("gate, measured", 6.0 * w, (20.0 + TALLY) * w),
        ("gate_grad, measured", 10.0 * w, (40.0 + 2.0 * TALLY) * w),
        ("norms of all gradients", 4.0 * p, 40.0 * p),
        ("adamw of all matrices", 28.0 * p, 25.0 * p),
        ("sgd of all matrices", 12.0 * p, 12.0 * p),
    ]
}

/// What the cases work on, on the device.
struct Inputs {
    rows: Vec<usize>,
    positions: Vec<u32>,
    index: Vec<u32>,
    shape: AttentionShape<'static>,
    /// [n, hidden] in bf16, and the first in f32.
    x: Tensor,
    y: Tensor,
    x32: Tensor,
    /// [n, intermediate].
    wide: Tensor,
    up: Tensor,
    norm_weight: Tensor,
    r: Tensor,
    table: Tensor,
    o: Tensor,
    lse: Tensor,
    logits: Tensor,
    /// [n, 8] and [hidden, 8], for products that cost little but their result.
    thin: Tensor,
    narrow: Tensor,
    /// [8, hidden].
    low: Tensor,
    /// Gradients of 8 micro-batches, and their sum.
    units: Tensor,
    sum: Tensor,
    /// p, g, m, v of every matrix.
    matrices: Vec<[Tensor; 4]>,
    gradients: Vec<Tensor>,
}

impl Inputs {
    fn new(device: &CudaDevice, s: &Size) -> Self {
        let make = |rows: usize, columns: usize, dtype: DType| -> Tensor {
            let pattern = values((rows * columns).min(1 << 16), 1);
            let all: Vec<f32> = pattern.iter().map(|x| x.abs()).cycle().take(rows * columns).collect();
            device.upload(&all, &[rows, columns], dtype).expect("upload")
        };
        let half = DType::BF16;
        let (x, y) = (make(s.n, s.hidden, half), make(s.n, s.hidden, half));
        let rows: Vec<usize> = (0..=s.n / s.row).map(|i| i * s.row).collect();
        let scale = (s.dim as f32).powf(-0.5);
        let shape = AttentionShape {
            heads: s.heads,
            kv_heads: s.heads,
            head_dim: s.dim,
            scale,
            window: None,
            padded: &[],
            grouped: &[],
        };
        let (o, lse) = device.attention(&x, &y, &x, &rows, &shape, Compute::Bf16).expect("attention");
        let matrix = |_| [(); 4].map(|()| make(1, s.parameters / s.matrices, DType::F32));
        let matrices: Vec<[Tensor; 4]> = (0..s.matrices).map(matrix).collect();
        Self {
            rows,
            positions: (0..s.n as u32).map(|i| i % s.row as u32).collect(),
            index: (0..s.n as u32).rev().collect(),
            shape,
            x,
            y,
            x32: make(s.n, s.hidden, DType::F32),
            wide: make(s.n, s.wide, half),
            up: make(s.n, s.wide, half),
            norm_weight: make(1, s.hidden, half),
            r: make(1, s.n, DType::F32),
            table: make(s.row, s.dim / 2, half),
            o,
            lse,
            logits: make(s.labelled, s.vocabulary, half),
            thin: make(s.n, 8, half),
            narrow: make(s.hidden, 8, half),
            low: make(8, s.hidden, half),
            units: Tensor { shape: vec![8, 8, s.hidden], ..make(64, s.hidden, DType::F32) },
            sum: make(8, s.hidden, DType::F32),
            gradients: matrices.iter().map(|m| m[1].clone()).collect(),
            matrices,
        }
    }

    /// Queues one case.
    fn run(&mut self, d: &CudaDevice, case: &str) -> Result<()> {
        let (half, n, shape) = (DType::BF16, self.x.rows(), self.shape);
        let low = |w| LowRank { x: &self.thin, w, compute: Compute::Bf16, dtype: half };
        if let Some(case) = case.strip_suffix(", measured") {
            d.expect_statistics(Some((&[0, n], None)));
            let done = self.run(d, case);
            d.expect_statistics(None);
            return done;
        }
        match case {
            "linear_adapted, depth 8" => {
                let (x, w, branch) = (&self.thin, &self.narrow, low(&self.narrow));
                d.linear_adapted(x, w, None, Compute::Bf16, half, &branch, 2.0).map(drop)
            }
            "input_grad_onto, depth 8" => {
                let (dy, w, branch) = (&self.thin, &self.low, low(&self.low));
                let so_far = Some(self.y.clone());
                d.linear_input_grad_onto(so_far, Some(&branch), dy, w, Compute::Bf16, half, half).map(drop)
            }
            "accumulate_units, 8 of rank 8" => d.accumulate_units(&mut self.sum, &self.units),
            "copy" => d.copy(&self.wide).map(drop),
            "cast f32 to bf16" => d.cast(&self.x32, half).map(drop),
            "gather_rows" => d.gather_rows(&self.x, &self.index).map(drop),
            "add" => d.add(&self.x, &self.y, half).map(drop),
            "scale" => d.scale(&self.x, 0.5, half).map(drop),
            "rms_norm" => d.rms_norm(&self.x, &self.norm_weight, 1e-5, half).map(drop),
            "rms_norm_grad" => d.rms_norm_grad(&self.y, &self.x, &self.norm_weight, &self.r, Some(&self.y)).map(drop),
            "rope" => d.rope(&self.x, &self.positions, &self.table, &self.table, shape.heads, false, half).map(drop),
            "gate" => d.gate(&self.wide, &self.up).map(drop),
            "gate_grad" => d.gate_grad(&self.wide, &self.wide, &self.up).map(drop),
            "attention" => d.attention(&self.x, &self.y, &self.x, &self.rows, &shape, Compute::Bf16).map(drop),
            "attention_grad" => {
                let (x, y, o, lse) = (&self.x, &self.y, &self.o, &self.lse);
                d.attention_grad(y, x, y, x, o, lse, &self.rows, &shape, Compute::Bf16).map(drop)
            }
            "cross_entropy" => {
                let m = self.logits.rows();
                d.cross_entropy(&self.logits, &vec![1; m], &vec![1.0; m]).map(drop)
            }
            "statistics, hidden" => d.statistics(&self.x, &self.rows, half).map(drop),
            "statistics, gate" => d.statistics(&self.wide, &[0, n], half).map(drop),
            "norms of all gradients" => d.norms_of(&self.gradients, 1.0).map(drop),
            "adamw of all matrices" | "sgd of all matrices" => {
                let updates = self.matrices.iter_mut().map(|[p, g, m, v]| {
                    let rule = if case.starts_with("sgd") {
                        UpdateRule::Sgd { learning_rate: 1e-4, weight_decay: 0.0 }
                    } else {
                        UpdateRule::AdamW { m, v, with: ADAMW }
                    };
                    Update { p, g, rule }
                });
                d.update(&mut updates.collect::<Vec<_>>(), [1.0, 0.5]).map(drop)
            }
            other => panic!("no case {other}"),
        }
    }
}

const ADAMW: AdamW =
    AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, step: 9.0, fused: true };

/// Prints one JSON line a case: seconds a call, GB/s, share of the copy's GB/s.
#[test]
fn every_kernel_has_a_benchmark_cuda() {
    if crate::device::cuda().is_none() {
        return;
    }
    let full = std::env::var_os("SPIKEPROBE_BENCHMARK").is_some();
    let (size, repeats) = if full { (FULL, 20) } else { (SMALL, 1) };
    let device = CudaDevice::open(0).expect("cuda:0");
    let mut inputs = Inputs::new(&device, &size);
    let mut copy = None;
    for (case, bytes, flops) in costs(&size) {
        inputs.run(&device, case).expect(case);
        device.synchronize().expect(case);
        let began = Instant::now();
        for _ in 0..repeats {
            inputs.run(&device, case).expect(case);
        }
        device.synchronize().expect(case);
        let seconds = began.elapsed().as_secs_f64() / f64::from(repeats);
        let rate = bytes / seconds / 1e9;
        let share = rate / *copy.get_or_insert(rate);
        assert!(seconds > 0.0 && share.is_finite(), "{case}: {seconds} s");
        println!(
            r#"benchmark {{"kernel": "{case}", "seconds": {seconds:e}, "bytes": {bytes:e}, "flops": {flops:e}, "gb_per_s": {rate:.3}, "share_of_copy": {share:.4}}}"#
        );
    }
}
