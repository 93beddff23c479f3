//! What must hold to the bit: casts, counts, row selection, determinism.

use spikeprobe::device::{AttentionShape, Compute, DType, Device, Statistics, Tensor, cpu::CpuDevice, noise};

use super::compare::identical;
use super::reference::{draw, tensor};
use super::{DTYPES, download, on_devices};

on_devices! {
    every_half => every_half_survives_a_round_trip_cpu;
    rounding => rounding_is_to_nearest_even_everywhere_cpu;
    rows => gather_and_scatter_move_rows_cpu;
    statistics => statistics_count_exactly_cpu;
    norms => norms_overflow_and_count_like_pytorchs_cpu;
    nonfinite => nonfinite_inputs_stay_visible_cpu;
    cuts => a_row_does_not_depend_on_the_rows_beside_it_cpu;
    random => noise_and_dropout_are_functions_of_their_key_cpu;
}

fn widen(bits: u16, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => half::bf16::from_bits(bits).to_f32(),
        _ => half::f16::from_bits(bits).to_f32(),
    }
}

fn narrow(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        DType::F16 => half::f16::from_f32(x).to_f32(),
    }
}

fn every_half(device: &dyn Device) {
    for dtype in [DType::BF16, DType::F16] {
        let all: Vec<f32> = (0..=u16::MAX).map(|bits| widen(bits, dtype)).collect();
        let x = device.upload(&all, &[all.len()], dtype).expect("upload");
        identical(&format!("{dtype:?} uploaded"), &download(device, &x), &all);
        let wide = device.cast(&x, DType::F32).expect("cast");
        identical(&format!("{dtype:?} widened"), &download(device, &wide), &all);
        let back = device.cast(&wide, dtype).expect("cast");
        identical(&format!("{dtype:?} narrowed"), &download(device, &back), &all);
        for other in DTYPES {
            let want: Vec<f32> = all.iter().map(|&x| narrow(x, other)).collect();
            let got = device.cast(&x, other).expect("cast");
            identical(&format!("{dtype:?} as {other:?}"), &download(device, &got), &want);
        }
    }
}

/// Every half, the midpoints between neighbours and their f32 neighbours; subnormals, infinities, NaN.
fn rounding(device: &dyn Device) {
    for dtype in [DType::BF16, DType::F16] {
        let mut values = vec![0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45, -1e-45];
        for bits in (0..0x7c00u16).step_by(7) {
            let (low, high) = (widen(bits, dtype), widen(bits + 1, dtype));
            let middle = ((low as f64 + high as f64) / 2.0) as f32;
            for x in [low, middle, f32::from_bits(middle.to_bits() + 1), f32::from_bits(middle.to_bits().max(1) - 1)] {
                values.extend([x, -x]);
            }
        }
        values.extend([65504.0, 65519.996, 65520.0, 65536.0, 3.3895314e38, 3.3961775e38]);
        let want: Vec<f32> = values.iter().map(|&x| narrow(x, dtype)).collect();
        let x = device.upload(&values, &[values.len()], DType::F32).expect("upload");
        identical(&format!("cast {dtype:?}"), &download(device, &device.cast(&x, dtype).expect("cast")), &want);
        let scaled = device.scale(&x, 1.0, dtype).expect("scale");
        identical(&format!("scale by 1 to {dtype:?}"), &download(device, &scaled), &want);
    }
}

fn rows(device: &dyn Device) {
    for dtype in DTYPES {
        let (x, _) = tensor(device, &[9, 7], dtype, 1);
        let all = download(device, &x);
        let index = [8u32, 0, 3];
        let picked = device.gather_rows(&x, &index).expect("gather_rows");
        let want: Vec<f32> = index.iter().flat_map(|&i| all[i as usize * 7..][..7].to_vec()).collect();
        identical("gathered", &download(device, &picked), &want);
        let spread = download(device, &device.scatter_rows(&picked, &index, 9).expect("scatter_rows"));
        for row in 0..9 {
            let want = if index.contains(&(row as u32)) { all[row * 7..][..7].to_vec() } else { vec![0.0; 7] };
            identical("scattered", &spread[row * 7..][..7], &want);
        }
        let looked_up = device.embedding(&x, &[3, 3, 8], DType::F32).expect("embedding");
        assert_eq!((looked_up.shape, looked_up.dtype), (vec![3, 7], DType::F32));
        assert!(device.gather_rows(&x, &[9]).is_err(), "row 9 of 9");
        assert!(device.scatter_rows(&picked, &[0, 1, 9], 9).is_err(), "row 9 of 9");
    }
}

/// Counts straight from the definitions, with the half crate's rounding.
fn count(values: &[f32], target: DType) -> Statistics {
    let mut s = Statistics { elements: values.len() as u64, ..Statistics::default() };
    let smallest_normal = if target == DType::F16 { 2f32.powi(-14) } else { f32::MIN_POSITIVE };
    for &x in values {
        s.nan += x.is_nan() as u64;
        s.pos_inf += (x == f32::INFINITY) as u64;
        s.neg_inf += (x == f32::NEG_INFINITY) as u64;
        s.zero += (x == 0.0) as u64;
        s.subnormal += (x != 0.0 && x.abs() < smallest_normal) as u64;
        s.underflow += (x != 0.0 && narrow(x, target) == 0.0) as u64;
        s.overflow += (x.is_finite() && narrow(x, target).is_infinite()) as u64;
        if x.is_finite() {
            s.max_abs = s.max_abs.max(x.abs());
            s.sum += x as f64;
            s.sum_squares += x as f64 * x as f64;
            if x != 0.0 && (s.min_abs == 0.0 || x.abs() < s.min_abs) {
                s.min_abs = x.abs();
            }
        }
    }
    s
}

fn statistics(device: &dyn Device) {
    let awkward = [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        1e-45,
        1e-40,
        -1e-39,
        2f32.powi(-134),
        1.0000001 * 2f32.powi(-134),
        2f32.powi(-133),
        2f32.powi(-25),
        1.0000001 * 2f32.powi(-25),
        2f32.powi(-24),
        2f32.powi(-14),
        65504.0,
        65519.996,
        65520.0,
        f32::MAX,
        3.3895314e38,
        3.3961775e38,
        f32::MIN_POSITIVE,
        1.0,
        -3.0,
    ];
    let ordinary = draw(20_000, 5, 3.0);
    for n in [1usize, 7, 32, 65, 5000] {
        let mut values: Vec<f32> = ordinary.iter().cycle().take(3 * n).cloned().collect();
        // The second unit is awkward, the others are not (the CPU takes a shorter path there).
        for (i, x) in values[n..2 * n].iter_mut().enumerate() {
            if i % 3 == 0 {
                *x = awkward[(i / 3) % awkward.len()];
            }
        }
        values[0] = 0.0;
        let x = device.upload(&values, &[3 * n, 1], DType::F32).expect("upload");
        for target in DTYPES {
            let got = device.statistics(&x, &[0, n, n, 2 * n, 3 * n], target).expect("statistics");
            assert_eq!(got[1], Statistics::default(), "an empty unit");
            for (unit, part) in [(0, 0..n), (2, n..2 * n), (3, 2 * n..3 * n)] {
                let want = count(&values[part], target);
                let close = |a: f64, b: f64, size: f64| (a - b).abs() <= 1e-12 * size;
                let scale = want.sum_squares.max(f64::MIN_POSITIVE);
                assert!(close(got[unit].sum_squares, want.sum_squares, scale), "{:?} {want:?}", got[unit]);
                let size = want.max_abs as f64 * want.elements as f64;
                assert!(close(got[unit].sum, want.sum, size.max(1e-300)), "{:?} {want:?}", got[unit]);
                let exact = |s: &Statistics| Statistics { sum: 0.0, sum_squares: 0.0, ..*s };
                assert_eq!(exact(&got[unit]), exact(&want), "{n} elements for {target:?}");
            }
        }
    }
}

fn norms(device: &dyn Device) {
    let values = [3.0, 4.0, 1e30, 1e30, f32::NAN, 1.0, f32::INFINITY, -2.0, 0.0, 0.0];
    let x = device.upload(&values, &[10, 1], DType::F32).expect("upload");
    let got = device.norms(&x, &[0, 2, 4, 6, 8, 10]).expect("norms");
    assert_eq!(got[0], (5.0, 0));
    assert_eq!(got[1], (f32::INFINITY, 0), "the sum of squares overflows f32, as PyTorch's does");
    assert!(got[2].0.is_nan() && got[2].1 == 1);
    assert_eq!(got[3], (f32::INFINITY, 1));
    assert_eq!(got[4], (0.0, 0));
}

/// A NaN or infinity anywhere reaches the results that depend on it, and no others.
fn nonfinite(device: &dyn Device) {
    for dtype in DTYPES {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = draw(4 * 40, 6, 1.0);
            values[40 + 3] = bad;
            let x = device.upload(&values, &[4, 40], dtype).expect("upload");
            let w = tensor(device, &[5, 40], dtype, 7).0;
            let norm_w = tensor(device, &[40], dtype, 8).0;
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
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16, scale: 0.25, window: None };
    for dtype in DTYPES {
        let whole = pass(device, 0..79, &rows, &shape, dtype);
        for span in rows.windows(2) {
            let part = pass(device, span[0]..span[1], &[0, span[1] - span[0]], &shape, dtype);
            for ((name, whole), (_, part)) in whole.iter().zip(&part) {
                let columns = whole.len() / 79;
                identical(&format!("{name} {dtype:?}"), part, &whole[span[0] * columns..span[1] * columns]);
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
        let all = draw(79 * columns, seed, 2.0);
        device.upload(&all[span.start * columns..span.end * columns], &[span.len(), columns], dtype).expect("upload")
    };
    let x = cut(96, 1);
    let w = tensor(device, &[70, 96], dtype, 2).0;
    let a = tensor(device, &[8, 96], dtype, 3).0;
    let norm_w = tensor(device, &[96], dtype, 4).0;
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
        ("norm gradient", device.rms_norm_grad(&x, &x, &norm_w, &r).expect("rms_norm_grad")),
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
    let shape = AttentionShape { heads: 6, kv_heads: 3, head_dim: 32, scale: 0.2, window: Some(50) };
    for dtype in DTYPES {
        let results: Vec<Vec<Vec<f32>>> =
            [&one as &dyn Device, &four].map(|device| wide_pass(device, &shape, dtype)).into();
        for (i, (a, b)) in results[0].iter().zip(&results[1]).enumerate() {
            identical(&format!("result {i} {dtype:?}"), b, a);
        }
    }
}

/// Tensors large enough to be shared between threads.
fn wide_pass(device: &dyn Device, shape: &AttentionShape, dtype: DType) -> Vec<Vec<f32>> {
    let compute = Compute::of(dtype);
    let rows = [0usize, 100, 333, 400];
    let x = tensor(device, &[400, 192], dtype, 1).0;
    let k = tensor(device, &[400, 96], dtype, 2).0;
    let w = tensor(device, &[500, 192], dtype, 3).0;
    let y = device.linear(&x, &w, None, compute, dtype).expect("linear");
    let (o, lse) = device.attention(&x, &k, &k, &rows, shape, compute).expect("attention");
    let (dq, dk, dv) = device.attention_grad(&x, &x, &k, &k, &o, &lse, &rows, shape, compute).expect("attention_grad");
    let statistics = device.statistics(&x, &rows, DType::F16).expect("statistics");
    let norms = device.norms(&x, &rows).expect("norms");
    let mut results = [
        device.linear_input_grad(&y, &w, compute, dtype).expect("linear_input_grad"),
        device.linear_weight_grad(&y, &x, &rows, compute, dtype).expect("linear_weight_grad"),
        device.perturb(&x, 1, 2, DType::BF16).expect("perturb"),
        device.dropout(&x, 0.1, 1, 2).expect("dropout"),
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

fn random(device: &dyn Device) {
    let ones = device.upload(&vec![1.0; 100_000], &[100_000], DType::F32).expect("upload");
    let dropped = download(device, &device.dropout(&ones, 0.25, 7, 1).expect("dropout"));
    for (i, &x) in dropped.iter().enumerate() {
        let kept = noise::unit(7, 1, i as u64) >= 0.25;
        assert_eq!(x, if kept { 1.0 / 0.75 } else { 0.0 }, "element {i}");
    }
    let kept = dropped.iter().filter(|&&x| x > 0.0).count() as f64 / 1e5;
    // Five standard deviations of a binomial share.
    assert!((kept - 0.75).abs() < 5.0 * (0.75f64 * 0.25 / 1e5).sqrt(), "{kept} kept");
    let other = download(device, &device.dropout(&ones, 0.25, 7, 2).expect("dropout"));
    assert_ne!(dropped, other, "streams differ");
    let noisy = download(device, &device.perturb(&ones, 7, 1, DType::BF16).expect("perturb"));
    let sum: f64 = noisy.iter().map(|&x| x as f64 - 1.0).sum();
    assert!(noisy.iter().all(|&x| (x - 1.0).abs() <= 1.0 / 256.0) && noisy.iter().any(|&x| x > 1.003));
    assert!(sum.abs() < 5.0 * (1e5f64 / 3.0).sqrt() / 256.0, "the noise has no mean: {sum}");
}
