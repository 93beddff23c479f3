use spikeprobe::device::{AdamW, DType, Device, Tensor, Update, UpdateRule};

use super::compare::same;
use super::reference::{round, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    accumulate: gradients_accumulate_in_their_dtype_cpu, gradients_accumulate_in_their_dtype_cuda;
    shared: a_clone_keeps_its_values_cpu, a_clone_keeps_its_values_cuda;
    adamw: adamw_rounds_where_pytorch_does_cpu, adamw_rounds_where_pytorch_does_cuda;
    sgd: sgd_rounds_where_pytorch_does_cpu, sgd_rounds_where_pytorch_does_cuda;
    together: many_tensors_update_as_one_by_one_cpu, many_tensors_update_as_one_by_one_cuda;
    nonfinite: a_gradient_that_is_no_number_spoils_its_own_element_cpu, a_gradient_that_is_no_number_spoils_its_own_element_cuda;
    norms_of: norms_see_the_unscaled_gradient_cpu, norms_see_the_unscaled_gradient_cuda;
}

fn accumulate(device: &dyn Device) {
    for n in [1, 7, 65, 3000] {
        for dtype in DTYPES {
            let mut acc = device.upload(&values(n, 1), &[n], dtype).expect("acc");
            let g = device.upload(&values(n, 2), &[n], DType::BF16).expect("g");
            let (a, b) = (download(device, &acc), download(device, &g));
            device.accumulate(&mut acc, &g).expect("accumulate");
            let sum: Vec<f32> = a.iter().zip(&b).map(|(a, b)| round(a + b, dtype)).collect();
            same("accumulate", &download(device, &acc), &sum);
            device.scale_in_place(&mut acc, 1.0 / 3.0).expect("scale");
            let scaled: Vec<f32> = sum.iter().map(|x| round(x * (1.0 / 3.0), dtype)).collect();
            same("scale_in_place", &download(device, &acc), &scaled);
        }
    }
}

fn shared(device: &dyn Device) {
    let mut x = device.upload(&[1.0, 2.0, 3.0], &[3], DType::F32).expect("upload");
    let snapshot = x.clone();
    device.scale_in_place(&mut x, 2.0).expect("scale");
    assert_eq!(download(device, &snapshot), [1.0, 2.0, 3.0]);
    assert_eq!(download(device, &x), [2.0, 4.0, 6.0]);
}

/// One element of the update, in the order of PyTorch's single-tensor loop; `each` rounds after every op.
fn adamw_element([p, g, m, v]: [f32; 4], epsilon: f32, with: &AdamW, dtype: DType) -> (f32, f32, f32) {
    let each = |x: f32| if with.fused { x } else { round(x, dtype) };
    let last = |x: f32| round(x, dtype);
    let (c1, c2) = (1.0 - with.beta1.powf(with.step), 1.0 - with.beta2.powf(with.step));
    let p = if with.weight_decay == 0.0 { p } else { each(p * (1.0 - with.learning_rate * with.weight_decay) as f32) };
    // Fused multiply-adds where aten's kernels contract to them.
    let m = each(((1.0 - with.beta1) as f32).mul_add(g - m, m));
    let v = each(((1.0 - with.beta2) as f32 * g).mul_add(g, each(v * with.beta2 as f32)));
    let root = each(each(v.sqrt()) / c2.sqrt() as f32);
    let denominator = each(root + epsilon);
    (last(p + -(with.learning_rate / c1) as f32 * m / denominator), last(m), last(v))
}

fn adamw(device: &dyn Device) {
    for n in [1, 33, 4097] {
        for dtype in DTYPES {
            for (fused, weight_decay) in [(false, 0.0), (true, 0.0), (true, 0.1), (false, 0.1)] {
                if dtype == DType::F32 && !fused && device.name() == "cpu" {
                    continue; // there the root is MKL's: bits.rs
                }
                let mut with = AdamW {
                    learning_rate: 3e-3,
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay,
                    step: 1.0,
                    fused,
                };
                let mut p = device.upload(&values(n, 1), &[n], dtype).expect("p");
                let (mut m, mut v) = (device.zeros(&[n], dtype).expect("m"), device.zeros(&[n], dtype).expect("v"));
                for step in 1..4 {
                    with.step = step as f64;
                    let g = device.upload(&values(n, 10 + step), &[n], DType::F32).expect("g");
                    let (before, gs) = (download(device, &p), download(device, &g));
                    let (ms, vs) = (download(device, &m), download(device, &v));
                    device.adamw(&mut p, &g, &mut m, &mut v, &with).expect("adamw");
                    // On the CPU aten's loop rounds the scalar it adds, on a GPU it does not.
                    let loops = !fused && device.name() == "cpu";
                    let epsilon = if loops { round(with.epsilon as f32, dtype) } else { with.epsilon as f32 };
                    let element = |i| adamw_element([before[i], gs[i], ms[i], vs[i]], epsilon, &with, dtype);
                    let want: Vec<_> = (0..n).map(element).collect();
                    let what = format!("{dtype:?} fused {fused} step {step}");
                    same(&format!("m {what}"), &download(device, &m), &want.iter().map(|w| w.1).collect::<Vec<_>>());
                    same(&format!("v {what}"), &download(device, &v), &want.iter().map(|w| w.2).collect::<Vec<_>>());
                    same(&format!("p {what}"), &download(device, &p), &want.iter().map(|w| w.0).collect::<Vec<_>>());
                }
            }
        }
    }
}

fn sgd(device: &dyn Device) {
    for dtype in DTYPES {
        for decay in [0.0, 0.01] {
            let mut p = device.upload(&values(70, 1), &[70], dtype).expect("p");
            let g = device.upload(&values(70, 2), &[70], dtype).expect("g");
            let (before, gs) = (download(device, &p), download(device, &g));
            device.sgd(&mut p, &g, 0.05, decay).expect("sgd");
            let want: Vec<f32> = before
                .iter()
                .zip(&gs)
                .map(|(&p, &g)| {
                    let d = if decay == 0.0 { g } else { round(round(decay as f32, dtype).mul_add(p, g), dtype) };
                    round(round(-0.05, dtype).mul_add(d, p), dtype)
                })
                .collect();
            same("sgd", &download(device, &p), &want);
        }
    }
}

/// ε does not vanish in f16: a denominator of 0 is `nonfinite`'s business.
const WITH: AdamW =
    AdamW { learning_rate: 3e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-4, weight_decay: 0.1, step: 2.0, fused: false };

/// Sizes around the runs of 4096 elements that a block takes, dtypes of weight and gradient in every mix.
fn parameters(device: &dyn Device) -> Vec<[Tensor; 4]> {
    [1, 7, 4095, 4096, 4097, 9001, 33, 250, 3, 12_288]
        .into_iter()
        .enumerate()
        .map(|(i, n)| {
            let (dtype, g) = (DTYPES[i % 3], DTYPES[i / 3 % 3]);
            let make = |seed: u64, dtype| device.upload(&values(n, seed + 10 * i as u64), &[n], dtype).expect("upload");
            let positive: Vec<f32> = values(n, 3).iter().map(|x| x * x).collect();
            [make(0, dtype), make(1, g), make(2, dtype), device.upload(&positive, &[n], dtype).expect("upload")]
        })
        .collect()
}

fn together(device: &dyn Device) {
    for (unscale, clip) in [(1.0, 1.0), (1.0 / 1024.0, 1.0), (1.0, 0.37), (1.0 / 1024.0, 0.37)] {
        let (mut all, mut single) = (parameters(device), parameters(device));
        let before: Vec<Vec<f32>> = all.iter().map(|x| download(device, &x[0])).collect();
        let gradients: Vec<Vec<f32>> = all.iter().map(|x| download(device, &x[1])).collect();
        let updates = all.iter_mut().enumerate().map(|(i, [p, g, m, v])| {
            // Every fourth is SGD's.
            let rule = if i % 4 == 3 {
                UpdateRule::Sgd { learning_rate: 0.05, weight_decay: 0.01 }
            } else {
                UpdateRule::AdamW { m, v, with: AdamW { fused: i % 2 == 0, ..WITH } }
            };
            Update { p, g, rule }
        });
        let moved = device.update(&mut updates.collect::<Vec<_>>(), [unscale, clip]).expect("update");
        let mut squares = 0.0;
        for (i, [p, g, m, v]) in single.iter_mut().enumerate() {
            for factor in [unscale, clip] {
                device.scale_in_place(g, factor).expect("scale");
            }
            if i % 4 == 3 {
                device.sgd(p, g, 0.05, 0.01).expect("sgd");
            } else {
                device.adamw(p, g, m, v, &AdamW { fused: i % 2 == 0, ..WITH }).expect("adamw");
            }
            for (name, at) in [("p", 0), ("m", 2), ("v", 3)] {
                let what = format!("{name} of tensor {i}, factors {unscale} {clip}");
                same(&what, &download(device, &all[i][at]), &download(device, [&*p, &*p, &*m, &*v][at]));
            }
            same("gradients stay", &download(device, &all[i][1]), &gradients[i]);
            let after = download(device, p);
            squares += after.iter().zip(&before[i]).map(|(a, b)| ((a - b) as f64).powi(2)).sum::<f64>();
        }
        // Norms of single tensors are f32 sums in eight chains on the CPU.
        let longest = before.iter().map(Vec::len).max().expect("tensors");
        let most = (longest / 8 + 9) as f64 * 2f64.powi(-25);
        assert!((moved - squares.sqrt()).abs() <= most * squares.sqrt(), "{moved} against {}", squares.sqrt());
        assert!(moved > 0.0);
    }
}

fn nonfinite(device: &dyn Device) {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut g = values(300, 2);
        g[299] = bad;
        let (start, g) = (values(300, 1), device.upload(&g, &[300], DType::F32).expect("g"));
        let mut p = device.upload(&start, &[300], DType::F32).expect("p");
        let (mut m, mut v) =
            (device.zeros(&[300], DType::F32).expect("m"), device.zeros(&[300], DType::F32).expect("v"));
        let rule = UpdateRule::AdamW { m: &mut m, v: &mut v, with: WITH };
        let moved = device.update(&mut [Update { p: &mut p, g: &g, rule }], [0.5, 1.0]).expect("update");
        let p = download(device, &p);
        assert!(moved.is_nan() && p[299].is_nan() && p[..299].iter().all(|x| x.is_finite()), "{bad}: {moved}");
        let mut p = device.upload(&start, &[300], DType::F32).expect("p");
        let rule = UpdateRule::Sgd { learning_rate: 0.1, weight_decay: 0.0 };
        let moved = device.update(&mut [Update { p: &mut p, g: &g, rule }], [1.0, 1.0]).expect("update");
        assert_eq!((moved.is_nan(), moved.is_infinite()), (bad.is_nan(), bad.is_infinite()), "{bad}: {moved}");
    }
}

fn norms_of(device: &dyn Device) {
    let tensors: Vec<Tensor> = parameters(device).into_iter().map(|[_, g, _, _]| g).collect();
    for factor in [1.0, 1.0 / 65536.0, 1e6] {
        let got = device.norms_of(&tensors, factor).expect("norms");
        for (i, (x, got)) in tensors.iter().zip(got).enumerate() {
            let scaled = device.scale(x, factor, x.dtype).expect("scale");
            let pending = device.queue_norms(&scaled, &[0, scaled.rows()]).expect("queue");
            let want = device.finish_norms(pending).expect("finish")[0];
            assert_eq!(
                (got.0.to_bits(), got.1),
                (want.0.to_bits(), want.1),
                "tensor {i}, factor {factor}: {got:?} {want:?}"
            );
            assert_eq!(device.norms(&scaled, &[0, scaled.rows()]).expect("norms")[0], want);
        }
    }
}
