//! What must not reach anything else: a NaN, the rows beside, the number of threads.

use spikeprobe::device::{AttentionShape, Compute, DType, Device, Keep, Tensor, cpu::CpuDevice};

use super::compare::same;
use super::reference::{upload, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    nonfinite: nonfinite_inputs_stay_visible_cpu, nonfinite_inputs_stay_visible_cuda;
    cuts: a_row_does_not_depend_on_the_rows_beside_it_cpu, a_row_does_not_depend_on_the_rows_beside_it_cuda;
}

fn drawn(device: &dyn Device, shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    upload(device, &values(shape.iter().product(), seed), shape, dtype).0
}

/// A NaN or infinity anywhere reaches the results that depend on it, and no others.
fn nonfinite(device: &dyn Device) {
    for dtype in DTYPES {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = values(4 * 40, 6);
            values[40 + 3] = bad;
            let x = device.upload(&values, &[4, 40], dtype).expect("upload");
            let w = drawn(device, &[5, 40], dtype, 7);
            let norm_w = drawn(device, &[40], dtype, 8);
            let y = download(device, &device.linear(&x, &w, None, Compute::of(dtype), dtype).expect("linear"));
            let (normed, _) = device.rms_norm(&x, &norm_w, 1e-5, dtype).expect("rms_norm");
            let normed = download(device, &normed);
            let (losses, d) = device.cross_entropy(&x, &[1, 1, 1, 1], &[1.0; 4]).expect("cross_entropy");
            let d = download(device, &d);
            for row in 0..4 {
                let finite = row != 1;
                assert_eq!(y[row * 5..][..5].iter().all(|x| x.is_finite()), finite, "linear, row {row}, {bad}");
                assert_eq!(normed[row * 40 + 3].is_finite(), finite, "norm, row {row}, {bad}");
                let expected = finite || bad == f32::NEG_INFINITY; // a logit of −∞ is a probability of 0
                assert_eq!(losses[row].is_finite(), expected, "loss, row {row}, {bad}");
                assert_eq!(d[row * 40..][..40].iter().all(|x| x.is_finite()), expected, "d_logits, row {row}, {bad}");
            }
        }
    }
}

/// Everything row-wise on a window of three sequences, and on each of them alone.
fn cuts(device: &dyn Device) {
    let rows = [0usize, 13, 14, 79];
    let shape =
        AttentionShape { heads: 2, kv_heads: 1, head_dim: 16, scale: 0.25, window: None, padded: &[], grouped: &[] };
    for dtype in DTYPES {
        let whole = pass(device, 0..79, &rows, &shape, dtype);
        for span in rows.windows(2) {
            let part = pass(device, span[0]..span[1], &[0, span[1] - span[0]], &shape, dtype);
            for ((name, whole), (_, part)) in whole.iter().zip(&part) {
                // cuBLAS chooses its kernel, and with it the order of sums, by the number of rows.
                if name.contains("linear") && device.name() != "cpu" {
                    continue;
                }
                let columns = whole.len() / 79;
                same(&format!("{name} {dtype:?}"), part, &whole[span[0] * columns..span[1] * columns]);
            }
        }
    }
}

fn pass(
    device: &dyn Device,
    span: std::ops::Range<usize>,
    rows: &[usize],
    shape: &AttentionShape,
    dtype: DType,
) -> Vec<(&'static str, Vec<f32>)> {
    let compute = Compute::of(dtype);
    let cut = |columns: usize, seed: u64| -> Tensor {
        let all = values(79 * columns, seed);
        device.upload(&all[span.start * columns..span.end * columns], &[span.len(), columns], dtype).expect("upload")
    };
    let x = cut(96, 1);
    let w = drawn(device, &[70, 96], dtype, 2);
    let a = drawn(device, &[8, 96], dtype, 3);
    let norm_w = drawn(device, &[96], dtype, 4);
    let (q, k, v, d_o) = (cut(32, 5), cut(16, 6), cut(16, 7), cut(32, 8));
    let y = device.linear(&x, &w, None, compute, dtype).expect("linear");
    let (normed, r) = device.rms_norm(&x, &norm_w, 1e-5, dtype).expect("rms_norm");
    let (o, lse) = device.attention(&q, &k, &v, rows, shape, compute).expect("attention");
    let (dq, dk, dv) = device.attention_grad(&d_o, &q, &k, &v, &o, &lse, rows, shape, compute).expect("attention_grad");
    let labels: Vec<u32> = span.clone().map(|i| (i % 96) as u32).collect();
    let (losses, d_logits) = device.cross_entropy(&x, &labels, &vec![0.1; span.len()]).expect("cross_entropy");
    let tensors = [
        ("linear", device.linear_input_grad(&y, &w, compute, dtype).expect("linear_input_grad")),
        ("narrow linear", device.linear(&x, &a, None, compute, dtype).expect("linear")),
        ("linear forward", y),
        ("norm gradient", device.rms_norm_grad(&x, &x, &norm_w, &r, Some(&x)).expect("rms_norm_grad")),
        ("norm", normed),
        ("gate", device.gate(&x, &x).expect("gate")),
        ("o", o),
        ("lse", lse),
        ("dq", dq),
        ("dk", dk),
        ("dv", dv),
        ("d_logits", d_logits),
    ];
    let mut results: Vec<_> = tensors.iter().map(|(name, t)| (*name, download(device, t))).collect();
    results.push(("loss", losses));
    results
}

#[test]
fn one_thread_and_four_give_the_same_bits_cpu() {
    let one = CpuDevice::new(Some(1)).expect("one thread");
    let four = CpuDevice::new(Some(4)).expect("four threads");
    let shape =
        AttentionShape { heads: 6, kv_heads: 3, head_dim: 32, scale: 0.2, window: Some(50), padded: &[], grouped: &[] };
    for dtype in DTYPES {
        let results: Vec<Vec<Vec<f32>>> =
            [&one as &dyn Device, &four].map(|device| wide_pass(device, &shape, dtype)).into();
        for (i, (a, b)) in results[0].iter().zip(&results[1]).enumerate() {
            same(&format!("result {i} {dtype:?}"), b, a);
        }
    }
}

/// Tensors large enough to be shared between threads.
fn wide_pass(device: &dyn Device, shape: &AttentionShape, dtype: DType) -> Vec<Vec<f32>> {
    let compute = Compute::of(dtype);
    let rows = [0usize, 100, 333, 400];
    let x = drawn(device, &[400, 192], dtype, 1);
    let k = drawn(device, &[400, 96], dtype, 2);
    let w = drawn(device, &[500, 192], dtype, 3);
    let y = device.linear(&x, &w, None, compute, dtype).expect("linear");
    let (o, lse) = device.attention(&x, &k, &k, &rows, shape, compute).expect("attention");
    let (dq, dk, dv) = device.attention_grad(&x, &x, &k, &k, &o, &lse, &rows, shape, compute).expect("attention_grad");
    let statistics = device.statistics(&x, &rows, DType::F16).expect("statistics");
    let norms = device.norms(&x, &rows).expect("norms");
    let mut results = [
        device.linear_input_grad(&y, &w, compute, dtype).expect("linear_input_grad"),
        device.linear_weight_grad(&y, &x, &rows, compute, dtype).expect("linear_weight_grad"),
        device.perturb(&x, 1, 2, DType::BF16).expect("perturb"),
        device.dropout(&x, 0.1, Keep::Drawn { seed: 1, stream: 2 }).expect("dropout"),
        device.gate(&y, &y).expect("gate"),
        o,
        dq,
        dk,
        dv,
    ]
    .iter()
    .map(|t| download(device, t))
    .collect::<Vec<_>>();
    results.push(norms.iter().map(|n| n.0).collect());
    results.push(statistics.iter().map(|s| s.sum_squares as f32).collect());
    results
}
