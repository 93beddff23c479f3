//! Against f64, with bounds from the analysis of each operation, at awkward sizes and in every dtype.
//!
//! u is half an ulp of the output's dtype, e half an ulp of f32. A sum of k products in f32 is off by at most
//! k·e·Σ|a·b| (Higham, section 3.1, to first order), and rounding the result adds u·|result|.

use spikeprobe::device::{AttentionShape, Compute, DType, Device};

use super::compare::within;
use super::reference::{self, Head, half_ulp, product, tensor};
use super::{DTYPES, download, on_devices};

on_devices! {
    products => products_are_within_their_error_bound_cpu;
    weight_gradients => weight_gradients_stay_separate_per_unit_cpu;
    norm => norm_and_gradient_are_within_their_error_bound_cpu;
    attention => attention_and_gradient_are_within_their_error_bound_cpu;
    loss => cross_entropy_is_within_its_error_bound_cpu;
    elementwise => elementwise_operations_round_once_cpu;
}

const SIZES: [usize; 4] = [1, 7, 32, 65];
const E: f64 = 5.960_464_477_539_063e-8;

/// |error| ≤ k·e·Σ|a·b| + u·|c|, and what f32 and the dtype cannot represent at all.
fn bound(k: usize, size: &[f64], c: &[f64], out: DType) -> Vec<f64> {
    let smallest = if out == DType::F16 { 2f64.powi(-24) } else { 2f64.powi(-130) };
    size.iter().zip(c).map(|(s, c)| (k + 1) as f64 * E * s + half_ulp(out) * c.abs() * 1.01 + smallest).collect()
}

fn products(device: &dyn Device) {
    for (i, &m) in SIZES.iter().enumerate() {
        for (j, &n) in SIZES.iter().enumerate() {
            for k in [1, 7, 32, 65, 900] {
                for dtype in DTYPES {
                    let seed = (i * 10 + j) as u64;
                    let (x, xs) = tensor(device, &[m, k], dtype, seed);
                    let (w, ws) = tensor(device, &[n, k], dtype, seed + 100);
                    let (b, bs) = tensor(device, &[n], dtype, seed + 200);
                    let (dy, dys) = tensor(device, &[m, n], dtype, seed + 300);
                    let compute = Compute::of(dtype);
                    let what = format!("{m}×{n}×{k} {dtype:?}");

                    let (c, size) = product((m, n, k), |i, p| xs[i * k + p], |p, j| ws[j * k + p]);
                    let y = device.linear(&x, &w, None, compute, dtype).expect("linear");
                    within(&format!("linear {what}"), &download(device, &y), &c, &bound(k, &size, &c, dtype));

                    let with_bias: Vec<f64> = c.iter().enumerate().map(|(i, c)| c + bs[i % n]).collect();
                    let size: Vec<f64> = size.iter().enumerate().map(|(i, s)| s + bs[i % n].abs()).collect();
                    let y = device.linear(&x, &w, Some(&b), compute, DType::F32).expect("linear");
                    let most = bound(k + 1, &size, &with_bias, DType::F32);
                    within(&format!("linear with bias {what}"), &download(device, &y), &with_bias, &most);

                    let (c, size) = product((m, k, n), |i, p| dys[i * n + p], |p, j| ws[p * k + j]);
                    let dx = device.linear_input_grad(&dy, &w, compute, dtype).expect("linear_input_grad");
                    within(&format!("input gradient {what}"), &download(device, &dx), &c, &bound(n, &size, &c, dtype));
                }
            }
        }
    }
}

fn weight_gradients(device: &dyn Device) {
    let units = [0, 1, 8, 8, 40, 105];
    for dtype in DTYPES {
        let (dy, dys) = tensor(device, &[105, 7], dtype, 1);
        let (x, xs) = tensor(device, &[105, 33], dtype, 2);
        let dw = device.linear_weight_grad(&dy, &x, &units, Compute::of(dtype), dtype).expect("linear_weight_grad");
        assert_eq!(dw.shape, [5, 7, 33]);
        let got = download(device, &dw);
        for (unit, pair) in units.windows(2).enumerate() {
            let rows = pair[1] - pair[0];
            let (c, size) =
                product((7, 33, rows), |i, p| dys[(pair[0] + p) * 7 + i], |p, j| xs[(pair[0] + p) * 33 + j]);
            let most = bound(rows, &size, &c, dtype);
            within(&format!("unit {unit} {dtype:?}"), &got[unit * 231..][..231], &c, &most);
        }
    }
}

fn norm(device: &dyn Device) {
    for rows in SIZES {
        for columns in SIZES {
            for dtype in DTYPES {
                let (x, xs) = tensor(device, &[rows, columns], dtype, 3);
                let (w, ws) = tensor(device, &[columns], dtype, 4);
                let (dy, dys) = tensor(device, &[rows, columns], dtype, 5);
                let (y, r) = device.rms_norm(&x, &w, 1e-5, dtype).expect("rms_norm");
                let dx = device.rms_norm_grad(&dy, &x, &w, &r).expect("rms_norm_grad");
                let (u, n) = (half_ulp(dtype), columns as f64);
                let (mut want, mut most, mut want_dx, mut most_dx) = (vec![], vec![], vec![], vec![]);
                for (x, dy) in xs.chunks(columns).zip(dys.chunks(columns)) {
                    let r = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n + 1e-5f32 as f64).sqrt();
                    let g: Vec<f64> = dy.iter().zip(&ws).map(|(d, w)| d * w).collect();
                    let mean = g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>() / n;
                    let size = g.iter().zip(x).map(|(g, x)| (g * x).abs()).sum::<f64>() / n;
                    for j in 0..columns {
                        want.push(x[j] * r * ws[j]);
                        // Two roundings, and r itself in f32.
                        most.push((x[j] * r * ws[j]).abs() * (2.02 * u + (n + 8.0) * E) + 1e-7 * u);
                        want_dx.push(r * (g[j] - x[j] * r * r * mean));
                        // g is rounded before use, in the term of its own and in the mean.
                        let scale = r * (g[j].abs() + x[j].abs() * r * r * size);
                        most_dx.push(scale * (2.02 * u + (3.0 * n + 16.0) * E) + 1e-7 * u);
                    }
                }
                let what = format!("{rows}×{columns} {dtype:?}");
                within(&format!("norm {what}"), &download(device, &y), &want, &most);
                within(&format!("norm gradient {what}"), &download(device, &dx), &want_dx, &most_dx);
            }
        }
    }
}

/// Rows `rows` of head h of x [n, heads·hd].
fn rows_of(x: &[f64], (heads, hd): (usize, usize), h: usize, rows: std::ops::Range<usize>) -> Vec<Vec<f64>> {
    rows.map(|i| x[(i * heads + h) * hd..][..hd].to_vec()).collect()
}

fn attention(device: &dyn Device) {
    let rows = [0usize, 1, 8, 40, 105];
    let (heads, kv_heads, hd) = (4, 2, 20);
    for window in [None, Some(5)] {
        let shape = AttentionShape { heads, kv_heads, head_dim: hd, scale: 1.0 / (hd as f32).sqrt(), window };
        for dtype in DTYPES {
            let (q, qs) = tensor(device, &[105, heads * hd], dtype, 6);
            let (k, ks) = tensor(device, &[105, kv_heads * hd], dtype, 7);
            let (v, vs) = tensor(device, &[105, kv_heads * hd], dtype, 8);
            let (d_o, d_os) = tensor(device, &[105, heads * hd], dtype, 9);
            let compute = Compute::of(dtype);
            let (o, lse) = device.attention(&q, &k, &v, &rows, &shape, compute).expect("attention");
            let (dq, dk, dv) =
                device.attention_grad(&d_o, &q, &k, &v, &o, &lse, &rows, &shape, compute).expect("attention_grad");
            let got = [&o, &lse, &dq, &dk, &dv].map(|t| download(device, t));
            let mut want = got.clone().map(|t| vec![0f64; t.len()]);
            for span in rows.windows(2) {
                let span = span[0]..span[1];
                for h in 0..heads {
                    let kv = h * kv_heads / heads;
                    let head = Head {
                        q: rows_of(&qs, (heads, hd), h, span.clone()),
                        k: rows_of(&ks, (kv_heads, hd), kv, span.clone()),
                        v: rows_of(&vs, (kv_heads, hd), kv, span.clone()),
                        d_o: rows_of(&d_os, (heads, hd), h, span.clone()),
                    };
                    let r = reference::attention(&head, &shape);
                    for (row, i) in span.clone().enumerate() {
                        want[1][i * heads + h] = r.lse[row];
                        for d in 0..hd {
                            want[0][(i * heads + h) * hd + d] = r.o[row][d];
                            want[2][(i * heads + h) * hd + d] = r.dq[row][d];
                            want[3][(i * kv_heads + kv) * hd + d] += r.dk[row][d];
                            want[4][(i * kv_heads + kv) * hd + d] += r.dv[row][d];
                        }
                    }
                }
            }
            // Operands reach 2 and scores 18: a score is off by up to 18·hd·e, a probability by as much relatively,
            // besides the exponential's own error. o is a mean of values of v (≤ 2) and is rounded once more.
            let u = half_ulp(dtype);
            let exponential = if dtype == DType::F32 { 48.0 * E } else { 1.1e-4 };
            let relative = 2.0 * u + 18.0 * hd as f64 * E + exponential;
            let lse = 20.0 * E * (hd as f64 + 1.0) + exponential;
            for (i, name) in ["o", "lse", "dq", "dk", "dv"].iter().enumerate() {
                // ds = p·(dp − delta) takes the difference of two sums of hd products, each rounded once or twice, of
                // up to the size of the largest gradient times the condition 1/(1 − max p): bounded by 20 here.
                let largest = want[i].iter().fold(0f64, |m, x| m.max(x.abs()));
                let most = [4.0 * relative, 2.0 * lse, 20.0 * relative * largest][i.min(2)];
                let most = vec![most; want[i].len()];
                within(&format!("{name} {dtype:?} window {window:?}"), &got[i], &want[i], &most);
            }
        }
    }
}

fn loss(device: &dyn Device) {
    for rows in SIZES {
        for vocabulary in [1, 7, 65, 1000] {
            for dtype in DTYPES {
                let (logits, xs) = tensor(device, &[rows, vocabulary], dtype, 10);
                let labels: Vec<u32> = (0..rows).map(|i| (i * 31 % vocabulary) as u32).collect();
                let seed = reference::draw(rows, 11, 1.0);
                let (got, d) = device.cross_entropy(&logits, &labels, &seed).expect("cross_entropy");
                let (mut want, mut want_d, mut most_d) = (vec![], vec![], vec![]);
                for (row, x) in xs.chunks(vocabulary).enumerate() {
                    let max = x.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
                    let label = labels[row] as usize;
                    want.push(max + sum.ln() - x[label]);
                    for (j, x) in x.iter().enumerate() {
                        let p = (x - max).exp() / sum;
                        let s = seed[row] as f64;
                        let value = p * s - if j == label { s } else { 0.0 };
                        want_d.push(value);
                        // exp and its f32 argument; then one rounding.
                        most_d.push(half_ulp(dtype) * value.abs() * 1.01 + 40.0 * E * s.abs() + 2f64.powi(-25));
                    }
                }
                let what = format!("{rows}×{vocabulary} {dtype:?}");
                within(&format!("loss {what}"), &got, &want, &vec![40.0 * E * 10.0; rows]);
                within(&format!("d_logits {what}"), &download(device, &d), &want_d, &most_d);
            }
        }
    }
}

fn elementwise(device: &dyn Device) {
    for n in SIZES {
        for dtype in DTYPES {
            for out in DTYPES {
                let (a, xs) = tensor(device, &[n], dtype, 12);
                let (b, ys) = tensor(device, &[n], dtype, 13);
                let sum: Vec<f64> = xs.iter().zip(&ys).map(|(x, y)| x + y).collect();
                let tiny = 2f64.powi(-25);
                let once =
                    |c: &[f64]| -> Vec<f64> { c.iter().map(|c| (half_ulp(out) + E) * c.abs() * 1.01 + tiny).collect() };
                let got = download(device, &device.add(&a, &b, out).expect("add"));
                within("add", &got, &sum, &once(&sum));
                let scaled: Vec<f64> = xs.iter().map(|x| x * 0.3f32 as f64).collect();
                let got = download(device, &device.scale(&a, 0.3, out).expect("scale"));
                within("scale", &got, &scaled, &once(&scaled));
            }
            let (g, gs) = tensor(device, &[n], dtype, 14);
            let (up, us) = tensor(device, &[n], dtype, 15);
            let (d, ds) = tensor(device, &[n], dtype, 16);
            let u = half_ulp(dtype);
            let most = |c: &[f64]| -> Vec<f64> { c.iter().map(|c| (3.03 * u + 16.0 * E) * c.abs() + 2e-7).collect() };
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let want: Vec<f64> = gs.iter().zip(&us).map(|(g, u)| g * sigmoid(*g) * u).collect();
            within("gate", &download(device, &device.gate(&g, &up).expect("gate")), &want, &most(&want));
            let (d_gate, d_up) = device.gate_grad(&d, &g, &up).expect("gate_grad");
            let want: Vec<f64> = ds.iter().zip(&gs).map(|(d, g)| d * g * sigmoid(*g)).collect();
            within("d_up", &download(device, &d_up), &want, &most(&want));
            let slope = |g: f64| sigmoid(g) * (1.0 + g * (1.0 - sigmoid(g)));
            let want: Vec<f64> = ds.iter().zip(&us).zip(&gs).map(|((d, u), g)| d * u * slope(*g)).collect();
            within("d_gate", &download(device, &d_gate), &want, &most(&want));
        }
    }
}
