use spikeprobe::device::cpu::CpuDevice;
use spikeprobe::device::{Compute, DType, Device, LowRank, Statistics, Tensor};

use super::reference::{round, upload, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    statistics: statistics_count_exactly_by_unit_cpu, statistics_count_exactly_by_unit_cuda;
    extremes: sums_of_squares_survive_extremes_cpu, sums_of_squares_survive_extremes_cuda;
    norms: norms_by_micro_batch_cpu, norms_by_micro_batch_cuda;
    announced: announced_statistics_are_those_of_the_result_cpu, announced_statistics_are_those_of_the_result_cuda;
    stale: announced_statistics_do_not_outlive_the_elements_cpu, announced_statistics_do_not_outlive_the_elements_cuda;
}

/// Around every border that is counted: non-numbers, zeros, subnormals, ties to zero and to infinity of each dtype.
const AWKWARD: [f32; 26] = [
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    0.0,
    -0.0,
    1e-45,
    1e-40,
    -1e-39,
    f32::from_bits(0x8000), // 2^-134, half of bf16's smallest, the next float, and that smallest
    f32::from_bits(0x8001),
    f32::from_bits(0x1_0000),
    2.980_232_2e-8, // 2^-25, half of f16's smallest, and above it
    2.980_232_6e-8,
    5.960_464_5e-8,
    6.103_515_6e-5,
    6.2e-5,
    65504.0,
    65519.996,
    65520.0,
    f32::MAX,
    3.389_531_4e38,
    3.396_177_5e38,
    f32::MIN_POSITIVE,
    1.0,
    -3.0,
    -65520.0,
];

/// (smallest normal, rounds to 0, rounds to infinity) of a magnitude, asked of the half crate.
fn classes(x: f32, target: DType) -> (bool, bool, bool) {
    let normal = match target {
        DType::F32 | DType::BF16 => f32::MIN_POSITIVE,
        DType::F16 => 2f32.powi(-14),
    };
    let rounded = round(x, target);
    (x.abs() < normal, rounded == 0.0, rounded.is_infinite())
}

fn plain(x: &[f32], target: DType) -> Statistics {
    let mut s = Statistics { elements: x.len() as u64, ..Statistics::default() };
    for &x in x {
        s.nan += x.is_nan() as u64;
        s.pos_inf += (x == f32::INFINITY) as u64;
        s.neg_inf += (x == f32::NEG_INFINITY) as u64;
        if !x.is_finite() {
            continue;
        }
        if x == 0.0 {
            s.zero += 1;
            continue;
        }
        let (subnormal, underflow, overflow) = classes(x, target);
        s.subnormal += subnormal as u64;
        s.underflow += underflow as u64;
        s.overflow += overflow as u64;
        s.max_abs = s.max_abs.max(x.abs());
        s.min_abs = if s.min_abs == 0.0 { x.abs() } else { s.min_abs.min(x.abs()) };
        s.sum_squares += x as f64 * x as f64;
    }
    s
}

/// `dtype`: of the elements.
fn check(got: &Statistics, x: &[f32], dtype: DType, target: DType) {
    let want = plain(x, target);
    // The squares of eight neighbours are added in f32, of bf16 sixteen; the rest in f64 or compensated.
    let roundings = if dtype == DType::BF16 { 16.0 } else { 8.0 };
    let bound = roundings * 2f64.powi(-24) + 1e-11;
    assert!((got.sum_squares - want.sum_squares).abs() <= bound * want.sum_squares, "{got:?} against {want:?}");
    assert_eq!(Statistics { sum_squares: want.sum_squares, ..*got }, want, "{dtype:?} against {target:?}");
}

fn statistics(device: &dyn Device) {
    for (rows, columns) in [(1, 1), (5, 7), (33, 65), (9, 5000)] {
        for dtype in DTYPES {
            // Without numbers whose squares leave f32's range, elements take the CPU's short way.
            for most in [f32::INFINITY, 1e6] {
                let mut x = values(rows * columns, 1);
                for (i, s) in
                    AWKWARD.iter().enumerate().filter(|(_, s)| rows > 1 && (s.abs() <= most || most.is_infinite()))
                {
                    x[(i * 17) % (rows * columns)] = *s;
                }
                let tensor = device.upload(&x, &[rows, columns], dtype).expect("upload");
                let stored = download(device, &tensor);
                let units = [0, rows / 2, rows / 2, rows]; // the second is empty
                for target in DTYPES {
                    let got = device.statistics(&tensor, &units, target).expect("statistics");
                    assert_eq!(got.len(), 3);
                    for (u, got) in got.iter().enumerate() {
                        check(got, &stored[units[u] * columns..units[u + 1] * columns], dtype, target);
                    }
                }
            }
        }
    }
}

fn extremes(device: &dyn Device) {
    // 8e-16 and 1.2e18 lie beside the ends of the magnitudes whose squares the CPU adds in f32 (2^-50 and 2^60).
    for magnitude in [1e-45f32, 1e-30, 8e-16, 1.0, 1e15, 1.2e18, 3e38] {
        let x = vec![magnitude; 20_000];
        let tensor = device.upload(&x, &[20, 1000], DType::F32).expect("upload");
        check(&device.statistics(&tensor, &[0, 20], DType::F32).expect("statistics")[0], &x, DType::F32, DType::F32);
    }
    // 2^20 ones: an accumulator in bf16 would stop at 256.
    let ones = device.upload(&vec![1.0; 1 << 20], &[1 << 10, 1 << 10], DType::BF16).expect("upload");
    assert_eq!(
        device.statistics(&ones, &[0, 1 << 10], DType::BF16).expect("statistics")[0].sum_squares,
        (1 << 20) as f64
    );
}

fn norms(device: &dyn Device) {
    let (rows, columns) = (40, 613);
    for dtype in DTYPES {
        let mut x = values(rows * columns, 2);
        (x[30 * columns], x[31 * columns], x[35 * columns + 1]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let tensor = device.upload(&x, &[rows, columns], dtype).expect("upload");
        let stored = download(device, &tensor);
        let units = [0, 1, 17, 30, 34, 40];
        let got = device.norms(&tensor, &units).expect("norms");
        for (u, &(norm, nonfinite)) in got.iter().enumerate() {
            let unit = &stored[units[u] * columns..units[u + 1] * columns];
            let want = unit.iter().map(|&x| x as f64 * x as f64).sum::<f64>().sqrt();
            assert_eq!(nonfinite, unit.iter().filter(|x| !x.is_finite()).count() as u64, "unit {u}");
            // The CPU adds eight chains in f32, as torch does: half the error of the longest one.
            let most = if device.name() == "cpu" { (unit.len() / 8 + 9) as f64 * 2f64.powi(-25) } else { 3e-7 };
            let fits = if want.is_finite() {
                (norm as f64 - want).abs() <= most * want
            } else {
                norm.is_nan() == want.is_nan() && norm.is_infinite() == want.is_infinite()
            };
            assert!(fits, "unit {u}: {norm} against {want}");
        }
    }
    let x = [3.0, 4.0, 1e30, 1e30, f32::NAN, 1.0, f32::INFINITY, -2.0, 0.0, 0.0];
    let x = device.upload(&x, &[10, 1], DType::F32).expect("upload");
    let got = device.norms(&x, &[0, 2, 4, 6, 8, 10]).expect("norms");
    assert_eq!((got[0], got[1], got[3], got[4]), ((5.0, 0), (f32::INFINITY, 0), (f32::INFINITY, 1), (0.0, 0)));
    assert!(got[2].0.is_nan() && got[2].1 == 1);
    // The sum overflows f32 as PyTorch's does.
    let large = device.upload(&[1e20; 4], &[1, 4], DType::F32).expect("upload");
    assert_eq!(device.norms(&large, &[0, 1]).expect("norms"), [(f32::INFINITY, 0)]);
}

/// A tensor of `dtype` with numbers around every border in it, and NaN and infinities if `broken`.
fn awkward(device: &dyn Device, shape: [usize; 2], dtype: DType, seed: u64, broken: bool) -> Tensor {
    let mut x = values(shape[0] * shape[1], seed);
    let n = x.len();
    for (i, &s) in AWKWARD.iter().enumerate().filter(|(_, s)| broken || s.is_finite()) {
        x[(i * 37 + 5) % n] = s;
    }
    upload(device, &x, &shape, dtype).0
}

/// The results of every operation that may measure while it computes, [n, columns] each.
fn made(device: &dyn Device, n: usize, columns: usize, dtype: DType, broken: bool) -> Vec<(&'static str, Tensor)> {
    let drawn = |seed| awkward(device, [n, columns], dtype, seed, broken);
    let (a, b, d) = (drawn(1), drawn(2), drawn(3));
    let row = upload(device, &values(columns, 4), &[columns], dtype).0;
    let square = upload(device, &values(columns * columns, 5), &[columns, columns], dtype).0;
    let low = (
        upload(device, &values(n * 3, 6), &[n, 3], dtype).0,
        upload(device, &values(columns * 3, 7), &[columns, 3], dtype).0,
        upload(device, &values(columns * 3, 8), &[3, columns], dtype).0,
    );
    let compute = Compute::of(dtype);
    let forward = LowRank { x: &low.0, w: &low.1, compute, dtype };
    let backward = LowRank { x: &low.0, w: &low.2, compute, dtype };
    let table = upload(device, &values(n * columns / 2, 9), &[n, columns / 2], dtype).0;
    let positions: Vec<u32> = (0..n as u32).rev().collect();
    let adapted = device.linear_adapted(&a, &square, None, compute, dtype, &forward, 0.5);
    let onto = device.linear_input_grad_onto(Some(d.clone()), Some(&backward), &b, &square, compute, dtype, dtype);
    let (d_gate, d_up) = device.gate_grad(&d, &a, &b).expect("gate_grad");
    vec![
        ("add", device.add(&a, &b, dtype).expect("add")),
        ("add to f32", device.add(&a, &b, DType::F32).expect("add")),
        ("rms_norm", device.rms_norm(&a, &row, 1e-5, dtype).expect("rms_norm").0),
        ("rope", device.rope(&a, &positions, &table, &table, 1, false, dtype).expect("rope")),
        ("gate", device.gate(&a, &b).expect("gate")),
        ("d_gate", d_gate),
        ("d_up", d_up),
        ("linear_adapted", adapted.expect("linear_adapted")),
        ("linear_input_grad_onto", onto.expect("linear_input_grad_onto")),
    ]
}

fn announced(device: &dyn Device) {
    for (n, columns, units) in [(1, 2, vec![0, 1]), (9, 66, vec![0, 4, 4, 9]), (40, 520, vec![0, 17, 40])] {
        for (dtype, target, broken) in [
            (DType::F32, None, true),
            (DType::BF16, None, false),
            (DType::BF16, Some(DType::F16), false),
            (DType::F16, Some(DType::F16), true),
        ] {
            device.expect_statistics(Some((&units, target)));
            for (name, x) in made(device, n, columns, dtype, broken) {
                let against = target.unwrap_or(x.dtype);
                let got = device.queue_statistics(&x, &units, against).expect("queue");
                let got = device.finish_statistics(got).expect("statistics");
                let stored = download(device, &x);
                for (unit, got) in units.windows(2).zip(&got) {
                    println!("{name} [{n}, {columns}] {dtype:?} {target:?} {unit:?}");
                    check(got, &stored[unit[0] * columns..unit[1] * columns], x.dtype, against);
                }
                // Other units and another range than announced are measured all the same.
                let whole = device.statistics(&x, &[0, n], DType::F16).expect("statistics");
                check(&whole[0], &stored, x.dtype, DType::F16);
            }
            device.expect_statistics(None);
        }
    }
}

fn stale(device: &dyn Device) {
    let units = [0, 3, 8];
    device.expect_statistics(Some((&units, None)));
    let (a, b) = (awkward(device, [8, 70], DType::F32, 1, false), awkward(device, [8, 70], DType::F32, 2, false));
    let mut sum = device.add(&a, &b, DType::F32).expect("add");
    let same_memory = Tensor { shape: vec![8, 70], ..sum.clone() };
    device.scale_in_place(&mut sum, 3.0).expect("scale");
    for x in [&sum, &same_memory] {
        let stored = download(device, x);
        let got = device.statistics(x, &units, DType::F32).expect("statistics");
        for (unit, got) in units.windows(2).zip(&got) {
            check(got, &stored[unit[0] * 70..unit[1] * 70], DType::F32, DType::F32);
        }
    }
    drop(same_memory);
    device.accumulate(&mut sum, &a).expect("accumulate");
    let stored = download(device, &sum);
    check(&device.statistics(&sum, &units, DType::F32).expect("statistics")[1], &stored[210..], DType::F32, DType::F32);
    // The gradient takes the memory of the logits.
    let logits = device.add(&a, &b, DType::F32).expect("add");
    device.statistics(&logits, &units, DType::F32).expect("statistics");
    let (_, gradient) = device.cross_entropy_owned(logits, &[0; 8], &[1.0; 8]).expect("cross_entropy");
    let stored = download(device, &gradient);
    check(
        &device.statistics(&gradient, &units, DType::F32).expect("statistics")[1],
        &stored[210..],
        DType::F32,
        DType::F32,
    );
    // The memory of a result that is gone, in other hands.
    drop(device.add(&a, &b, DType::F32).expect("add"));
    let next = awkward(device, [8, 70], DType::F32, 3, true);
    let stored = download(device, &next);
    check(
        &device.statistics(&next, &units, DType::F32).expect("statistics")[1],
        &stored[210..],
        DType::F32,
        DType::F32,
    );
    // One row less than announced: not the pass's own tensor.
    let fewer = device.gather_rows(&a, &[0, 1, 2, 3, 4, 5, 6]).expect("gather");
    let fewer = device.add(&fewer, &fewer, DType::F32).expect("add");
    let got = device.statistics(&fewer, &[0, 7], DType::F32).expect("statistics");
    device.expect_statistics(None);
    check(&got[0], &download(device, &fewer), DType::F32, DType::F32);
}

/// Pieces are cut and added up alike, whoever takes them; the tensors are large enough to be shared out.
#[test]
fn announced_statistics_do_not_depend_on_the_number_of_threads_cpu() {
    for (n, columns, units) in [(260, 64, vec![0, 130, 130, 260]), (131, 200, vec![0, 131]), (90, 416, vec![0, 7, 90])]
    {
        for (dtype, broken) in [(DType::F32, false), (DType::BF16, false), (DType::BF16, true)] {
            let measured = |threads| {
                let device = CpuDevice::new(Some(threads)).expect("threads");
                device.expect_statistics(Some((&units, None)));
                let made = made(&device, n, columns, dtype, broken).into_iter().map(|(name, x)| {
                    let got = device.statistics(&x, &units, x.dtype).expect("statistics");
                    for (unit, got) in units.windows(2).zip(&got) {
                        check(got, &download(&device, &x)[unit[0] * columns..unit[1] * columns], x.dtype, x.dtype);
                    }
                    (name, got)
                });
                made.collect::<Vec<_>>()
            };
            let alone = measured(1);
            for threads in [2, 3, 7] {
                assert_eq!(measured(threads), alone, "[{n}, {columns}] {dtype:?}, {threads} threads");
            }
        }
    }
}

/// What is made while the announcement pauses, or on another thread's behalf, is measured when it is asked for.
#[test]
fn unannounced_results_are_measured_all_the_same_cpu() {
    let device = CpuDevice::new(Some(2)).expect("threads");
    let units = [0, 3, 8];
    device.expect_statistics(Some((&units, None)));
    let (a, b) = (awkward(&device, [8, 70], DType::F32, 1, true), awkward(&device, [8, 70], DType::F32, 2, false));
    device.pause_statistics(true);
    let paused = device.add(&a, &b, DType::F32).expect("add");
    device.pause_statistics(false);
    let elsewhere =
        std::thread::scope(|scope| scope.spawn(|| device.gate(&a, &b).expect("gate")).join().expect("a gate"));
    for x in [paused, elsewhere] {
        let got = device.statistics(&x, &units, DType::F32).expect("statistics");
        check(&got[1], &download(&device, &x)[210..], DType::F32, DType::F32);
    }
}
