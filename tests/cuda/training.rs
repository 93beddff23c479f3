use spikeprobe::device::{AdamW, DType, Device};

use super::on_every_device;
use super::reference::{DTYPES, download, round, same, values};

on_every_device! {
    accumulate: gradients_accumulate_in_their_dtype_cpu, gradients_accumulate_in_their_dtype_cuda;
    shared: a_clone_keeps_its_values_cpu, a_clone_keeps_its_values_cuda;
    adamw: adamw_rounds_where_pytorch_does_cpu, adamw_rounds_where_pytorch_does_cuda;
    sgd: sgd_rounds_where_pytorch_does_cpu, sgd_rounds_where_pytorch_does_cuda;
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
fn adamw_element(p: f32, g: f32, m: f32, v: f32, with: &AdamW, dtype: DType) -> (f32, f32, f32) {
    let each = |x: f32| if with.fused { x } else { round(x, dtype) };
    let last = |x: f32| round(x, dtype);
    let (c1, c2) = (1.0 - with.beta1.powf(with.step), 1.0 - with.beta2.powf(with.step));
    let p = if with.weight_decay == 0.0 { p } else { each(p * (1.0 - with.learning_rate * with.weight_decay) as f32) };
    // Fused multiply-adds where aten's kernels contract to them.
    let m = each(((1.0 - with.beta1) as f32).mul_add(g - m, m));
    let v = each(((1.0 - with.beta2) as f32 * g).mul_add(g, each(v * with.beta2 as f32)));
    let root = each(each(v.sqrt()) / c2.sqrt() as f32);
    let denominator = each(root + with.epsilon as f32);
    (last(p + -(with.learning_rate / c1) as f32 * m / denominator), last(m), last(v))
}

fn adamw(device: &dyn Device) {
    for n in [1, 33, 2000] {
        for dtype in DTYPES {
            for (fused, weight_decay) in [(false, 0.0), (true, 0.1), (false, 0.1)] {
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
                    let want: Vec<_> =
                        (0..n).map(|i| adamw_element(before[i], gs[i], ms[i], vs[i], &with, dtype)).collect();
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
