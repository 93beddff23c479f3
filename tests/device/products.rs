use spikeprobe::device::{Compute, DType, Device};

use super::compare::close;
use super::reference::{operand, round, upload, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    linear: linear_is_x_times_w_transposed_cpu, linear_is_x_times_w_transposed_cuda;
    gradients: gradients_of_linear_by_unit_cpu, gradients_of_linear_by_unit_cuda;
    nonfinite: nan_and_infinity_pass_through_products_cpu, nan_and_infinity_pass_through_products_cuda;
}

const COMPUTES: [Compute; 4] = [Compute::F32, Compute::Tf32, Compute::Bf16, Compute::F16];
/// (n, in, out): one, odd, around tiles.
const SHAPES: [(usize, usize, usize); 4] = [(1, 1, 1), (7, 5, 3), (33, 65, 17), (64, 128, 40)];

/// Σ a·b and the bound of an f32 sum of k products in any order: k·2^-24·Σ|a·b|.
fn dot(pairs: impl Iterator<Item = (f32, f32)>) -> (f64, f64) {
    let (mut sum, mut size, mut k) = (0f64, 0f64, 0f64);
    for (a, b) in pairs {
        let product = a as f64 * b as f64;
        sum += product;
        size += product.abs();
        k += 1.0;
    }
    (sum, k * 2f64.powi(-24) * size)
}

fn linear(device: &dyn Device) {
    for (n, inner, width) in SHAPES {
        for compute in COMPUTES {
            for (i, dtype) in DTYPES.into_iter().enumerate() {
                let out = DTYPES[(i + 1) % 3];
                let (x, xs) = upload(device, &values(n * inner, 1), &[n, inner], dtype);
                let (w, ws) = upload(device, &values(width * inner, 2), &[width, inner], DTYPES[(i + 2) % 3]);
                let (bias, bs) = upload(device, &values(width, 3), &[width], dtype);
                let cast = |x: f64| operand(x as f32, compute);
                let plain: Vec<(f64, f64)> = (0..n * width)
                    .map(|at| {
                        let (r, c) = (at / width, at % width);
                        dot((0..inner).map(|k| (cast(xs[r * inner + k]), cast(ws[c * inner + k]))))
                    })
                    .collect();
                let want: Vec<f64> = plain.iter().map(|p| p.0).collect();
                for out in [dtype, out] {
                    let y = device.linear(&x, &w, None, compute, out).expect("linear");
                    assert_eq!((y.shape.as_slice(), y.dtype), ([n, width].as_slice(), out));
                    close(&format!("linear {compute:?} {dtype:?} {out:?}"), &download(device, &y), &want, out, |i| {
                        plain[i].1
                    });
                    let with: Vec<f64> = want.iter().enumerate().map(|(i, y)| y + bs[i % width]).collect();
                    let y = device.linear(&x, &w, Some(&bias), compute, out).expect("linear");
                    let bound = |i: usize| plain[i].1 + with[i].abs() * 2f64.powi(-23);
                    close(&format!("addmm {compute:?} {dtype:?} {out:?}"), &download(device, &y), &with, out, bound);
                }
            }
        }
    }
}

fn gradients(device: &dyn Device) {
    for (n, inner, width) in SHAPES {
        for (compute, out) in [
            (Compute::F32, DType::F32),
            (Compute::Bf16, DType::BF16),
            (Compute::F16, DType::F16),
            (Compute::Bf16, DType::F32),
            (Compute::Tf32, DType::F32),
        ] {
            let (dy, ds) = upload(device, &values(n * width, 4), &[n, width], out);
            let (x, xs) = upload(device, &values(n * inner, 5), &[n, inner], DType::F32);
            let (w, ws) = upload(device, &values(width * inner, 6), &[width, inner], DType::BF16);
            let cast = |x: f64| operand(x as f32, compute);
            let plain: Vec<(f64, f64)> = (0..n * inner)
                .map(|at| {
                    let (r, c) = (at / inner, at % inner);
                    dot((0..width).map(|k| (cast(ds[r * width + k]), cast(ws[k * inner + c]))))
                })
                .collect();
            let want: Vec<f64> = plain.iter().map(|p| p.0).collect();
            let dx = device.linear_input_grad(&dy, &w, compute, out).expect("input grad");
            close(&format!("dx {compute:?}"), &download(device, &dx), &want, out, |i| plain[i].1);

            let units = [0, n / 3, n / 3, n]; // the second unit is empty
            let plain: Vec<(f64, f64)> = (0..3 * width * inner)
                .map(|at| {
                    let (u, r, c) = (at / (width * inner), at / inner % width, at % inner);
                    dot((units[u]..units[u + 1]).map(|k| (cast(ds[k * width + r]), cast(xs[k * inner + c]))))
                })
                .collect();
            let want: Vec<f64> = plain.iter().map(|p| p.0).collect();
            let dw = device.linear_weight_grad(&dy, &x, &units, compute, out).expect("weight grad");
            assert_eq!(dw.shape, [3, width, inner]);
            close(&format!("dw {compute:?}"), &download(device, &dw), &want, out, |i| plain[i].1);
        }
    }
}

fn nonfinite(device: &dyn Device) {
    let mut x = values(3 * 8, 7);
    (x[3], x[8 + 2]) = (f32::NAN, f32::INFINITY);
    let (x, _) = upload(device, &x, &[3, 8], DType::F16);
    let (w, _) = upload(device, &[1.0; 8 * 2], &[2, 8], DType::F16);
    let y = download(device, &device.linear(&x, &w, None, Compute::F16, DType::F16).expect("linear"));
    assert!(y[0].is_nan() && y[1].is_nan(), "{y:?}");
    assert_eq!((y[2], y[3]), (f32::INFINITY, f32::INFINITY));
    assert!(y[4].is_finite() && y[5].is_finite());
    // 8 · 100 · 100 = 80000 is beyond f16, not beyond the accumulator.
    let (big, _) = upload(device, &[100.0; 8], &[1, 8], DType::F16);
    let half = download(device, &device.linear(&big, &big, None, Compute::F16, DType::F16).expect("linear"));
    let wide = download(device, &device.linear(&big, &big, None, Compute::F16, DType::F32).expect("linear"));
    assert_eq!((half[0], wide[0]), (f32::INFINITY, 80_000.0));
    // An f16 accumulator would stop at 2048: 2048 + 1 = 2048.
    let (ones, _) = upload(device, &[1.0; 4096], &[1, 4096], DType::F16);
    let sum = download(device, &device.linear(&ones, &ones, None, Compute::F16, DType::F16).expect("linear"));
    assert_eq!(sum[0], round(4096.0, DType::F16));
}
