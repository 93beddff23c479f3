use spikeprobe::device::{DType, Device};

use super::compare::{close, same};
use super::reference::{half_ulp, round, upload, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    norm: rms_norm_and_its_gradient_cpu, rms_norm_and_its_gradient_cuda;
    norm_rows: a_row_does_not_see_its_neighbours_cpu, a_row_does_not_see_its_neighbours_cuda;
    rope: rope_rounds_three_times_cpu, rope_rounds_three_times_cuda;
    gate: gate_and_its_gradient_cpu, gate_and_its_gradient_cuda;
    loss: cross_entropy_and_its_gradient_cpu, cross_entropy_and_its_gradient_cuda;
    loss_nan: cross_entropy_of_nan_and_infinity_cpu, cross_entropy_of_nan_and_infinity_cuda;
}

/// Relative error of a chain of a few f32 operations.
const F32: f64 = 1e-6;

fn norm(device: &dyn Device) {
    for (rows, columns) in [(1, 1), (7, 5), (3, 32), (5, 65), (2, 300), (4, 1030)] {
        for (dtype, w_type, out) in [
            (DType::F32, DType::F32, DType::F32),
            (DType::BF16, DType::BF16, DType::BF16),
            (DType::F16, DType::F32, DType::F32),
        ] {
            let (x, xs) = upload(device, &values(rows * columns, 1), &[rows, columns], dtype);
            let (w, ws) = upload(device, &values(columns, 2), &[columns], w_type);
            let (dy, ds) = upload(device, &values(rows * columns, 3), &[rows, columns], out);
            let (y, r) = device.rms_norm(&x, &w, 1e-5, out).expect("norm");
            let dx = device.rms_norm_grad(&dy, &x, &w, &r, None).expect("norm grad");
            assert_eq!((y.dtype, dx.dtype, r.dtype), (out, dtype, DType::F32));
            let (mut scales, mut normed, mut gradient, mut size) = (vec![], vec![], vec![], vec![]);
            for row in 0..rows {
                let x = &xs[row * columns..][..columns];
                let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / columns as f64 + 1e-5f32 as f64).sqrt();
                let g: Vec<f64> =
                    (0..columns).map(|c| round((ds[row * columns + c] as f32) * ws[c] as f32, dtype) as f64).collect();
                let along: f64 = g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>() / columns as f64;
                let sizes: f64 = g.iter().zip(x).map(|(g, x)| (g * x).abs()).sum::<f64>() / columns as f64;
                scales.push(scale);
                for c in 0..columns {
                    normed.push(ws[c] * round((x[c] * scale) as f32, dtype) as f64);
                    gradient.push(scale * g[c] - x[c] * scale.powi(3) * along);
                    size.push(scale * g[c].abs() + (x[c] * scale.powi(3)).abs() * sizes);
                }
            }
            close("r", &download(device, &r), &scales, DType::F32, |i| F32 * scales[i]);
            // The inner rounding may fall the other way where x·r lies near a tie: one ulp of it.
            let inner =
                |i: usize| 2.0 * half_ulp(normed[i] / ws[i % columns].abs().max(1e-9), dtype) * ws[i % columns].abs();
            close("y", &download(device, &y), &normed, out, |i| {
                F32 * normed[i].abs() + if dtype == DType::F32 { 0.0 } else { inner(i) }
            });
            close("dx", &download(device, &dx), &gradient, dtype, |i| 2.0 * F32 * size[i]);

            let (before, befores) = upload(device, &values(rows * columns, 4), &[rows, columns], dtype);
            let onto = device.rms_norm_grad(&dy, &x, &w, &r, Some(&before)).expect("norm grad");
            if dtype.is_half() {
                let whole = device.add(&before, &dx, dtype).expect("add");
                assert_eq!(download(device, &onto), download(device, &whole), "{dtype:?}");
            } else {
                let sums: Vec<f64> = befores.iter().zip(&gradient).map(|(b, g)| b + g).collect();
                close("onto", &download(device, &onto), &sums, dtype, |i| 2.0 * F32 * (befores[i].abs() + size[i]));
            }
        }
    }
}

fn norm_rows(device: &dyn Device) {
    let mut x = values(5 * 96, 4);
    let alone = x[2 * 96..3 * 96].to_vec();
    (x[96], x[3 * 96 + 5]) = (f32::NAN, f32::INFINITY);
    let (w, _) = upload(device, &values(96, 5), &[96], DType::F32);
    let (all, _) = upload(device, &x, &[5, 96], DType::BF16);
    let (one, _) = upload(device, &alone, &[1, 96], DType::BF16);
    let (y, _) = device.rms_norm(&all, &w, 1e-6, DType::F32).expect("norm");
    let (z, _) = device.rms_norm(&one, &w, 1e-6, DType::F32).expect("norm");
    let y = download(device, &y);
    same("row 2", &y[2 * 96..3 * 96], &download(device, &z));
    assert!(y[96..2 * 96].iter().all(|x| x.is_nan()), "a NaN reaches its whole row");
    assert!(y[3 * 96 + 5].is_nan(), "Inf·0 is NaN");
    assert!(y[4 * 96..].iter().all(|x| x.is_finite()));
}

fn rope(device: &dyn Device) {
    let (n, heads, dim) = (9, 3, 10);
    let half = dim / 2;
    for (dtype, table, out) in [
        (DType::F32, DType::F32, DType::F32),
        (DType::BF16, DType::BF16, DType::BF16),
        (DType::F16, DType::F32, DType::F16),
    ] {
        let (x, xs) = upload(device, &values(n * heads * dim, 1), &[n, heads * dim], dtype);
        let (cos, cs) = upload(device, &values(12 * half, 2), &[12, half], table);
        let (sin, ss) = upload(device, &values(12 * half, 3), &[12, half], table);
        let positions: Vec<u32> = vec![0, 1, 2, 11, 4, 0, 1, 2, 3];
        for inverse in [false, true] {
            let y = device.rope(&x, &positions, &cos, &sin, heads, inverse, out).expect("rope");
            let want: Vec<f32> = (0..n * heads * dim)
                .map(|i| {
                    let (d, p) = (i % dim, positions[i / (heads * dim)] as usize);
                    let at = p * half + d % half;
                    let other = if d < half { -xs[i + half] } else { xs[i - half] } * if inverse { -1.0 } else { 1.0 };
                    let part = |a: f64, b: f64| round(a as f32 * b as f32, out);
                    round(part(xs[i], cs[at]) + part(other, ss[at]), out)
                })
                .collect();
            // −0 against 0 where a product vanishes
            let plus_zero = |x: Vec<f32>| x.into_iter().map(|x| x + 0.0).collect::<Vec<_>>();
            same(&format!("rope {dtype:?} {inverse}"), &plus_zero(download(device, &y)), &plus_zero(want));
        }
    }
    let (x, _) = upload(device, &[0.0; 10], &[1, 10], DType::F32);
    let (table, _) = upload(device, &[0.0; 5], &[1, 5], DType::F32);
    assert!(device.rope(&x, &[1], &table, &table, 1, false, DType::F32).is_err(), "a position beyond the table");
}

fn gate(device: &dyn Device) {
    for n in [1, 7, 33, 2050] {
        for dtype in DTYPES {
            let mut g = values(n, 1);
            for (i, x) in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 80.0, -80.0, 0.0, 1e-45, -1e-40]
                .iter()
                .enumerate()
                .take(n - 1)
            {
                g[i] = *x;
            }
            let (gate, gs) = upload(device, &g, &[n], dtype);
            let (up, us) = upload(device, &values(n, 2), &[n], dtype);
            let (d, ds) = upload(device, &values(n, 3), &[n], dtype);
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let act: Vec<f64> = gs.iter().map(|&g| round((g / (1.0 + (-g).exp())) as f32, dtype) as f64).collect();
            let slope: Vec<f64> = gs.iter().map(|&g| sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g)))).collect();
            let want: Vec<f64> = act.iter().zip(&us).map(|(a, u)| a * u).collect();
            // One ulp of the activation, which may round the other way.
            let ulp = |x: f64, by: f64| 2.0 * half_ulp(x, dtype) * by.abs() + 4.0 * F32 * (x * by).abs();
            let y = device.gate(&gate, &up).expect("gate");
            close(&format!("gate {dtype:?}"), &download(device, &y), &want, dtype, |i| ulp(act[i], us[i]));
            let (dg, du) = device.gate_grad(&d, &gate, &up).expect("gate_grad");
            let d_up: Vec<f64> = act.iter().zip(&ds).map(|(a, d)| a * d).collect();
            close(&format!("d_up {dtype:?}"), &download(device, &du), &d_up, dtype, |i| ulp(act[i], ds[i]));
            let d_act: Vec<f64> = ds.iter().zip(&us).map(|(d, u)| round((d * u) as f32, dtype) as f64).collect();
            let d_gate: Vec<f64> = d_act.iter().zip(&slope).map(|(a, s)| a * s).collect();
            close(&format!("d_gate {dtype:?}"), &download(device, &dg), &d_gate, dtype, |i| 8.0 * F32 * d_act[i].abs());
        }
    }
}

fn loss(device: &dyn Device) {
    for (rows, vocabulary) in [(1, 1), (3, 7), (5, 257), (2, 2049)] {
        for dtype in DTYPES {
            let logits: Vec<f32> = values(rows * vocabulary, 1).iter().map(|x| x * 5.0).collect();
            let (x, xs) = upload(device, &logits, &[rows, vocabulary], dtype);
            let labels: Vec<u32> = (0..rows).map(|i| ((i * 31) % vocabulary) as u32).collect();
            let seed = values(rows, 2);
            let (losses, d) = device.cross_entropy(&x, &labels, &seed).expect("loss");
            assert_eq!(d.dtype, dtype);
            let (mut want, mut gradient) = (vec![], vec![]);
            for (row, &label) in labels.iter().enumerate() {
                let x = &xs[row * vocabulary..][..vocabulary];
                let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = most + x.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
                want.push(lse - x[label as usize]);
                gradient.extend(
                    (0..vocabulary).map(|c| ((x[c] - lse).exp() - f64::from(c == label as usize)) * seed[row] as f64),
                );
            }
            close("loss", &losses, &want, DType::F32, |i| 20.0 * F32 * (1.0 + want[i].abs()));
            let bound = |i: usize| 20.0 * F32 * gradient[i].abs().max(seed[i / vocabulary].abs() as f64 * 1e-2);
            close(&format!("d {dtype:?}"), &download(device, &d), &gradient, dtype, bound);
        }
    }
    let (x, _) = upload(device, &[0.0; 4], &[1, 4], DType::F32);
    assert!(device.cross_entropy(&x, &[4], &[1.0]).is_err(), "a label beyond the vocabulary");
}

fn loss_nan(device: &dyn Device) {
    let mut x = values(4 * 300, 1);
    (x[5], x[300 + 7], x[600 + 9]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let (logits, _) = upload(device, &x, &[4, 300], DType::F32);
    let (losses, d) = device.cross_entropy(&logits, &[0, 0, 0, 0], &[1.0; 4]).expect("loss");
    let d = download(device, &d);
    assert!(losses[0].is_nan() && losses[1].is_nan() && losses[2].is_finite() && losses[3].is_finite(), "{losses:?}");
    assert!(d[..600].iter().all(|x| x.is_nan()), "the whole row is lost, as log_softmax has it");
    assert!(d[600..].iter().all(|x| x.is_finite()) && d[600 + 9] == 0.0, "−Inf has probability 0");
}
