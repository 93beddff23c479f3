use spikeprobe::device::{AttentionShape, Compute, DType, Device};

use super::compare::close;
use super::reference::{operand, upload, values};
use super::{download, on_devices};

on_devices! {
    attention: attention_of_ragged_rows_cpu, attention_of_ragged_rows_cuda;
    attention_nan: attention_keeps_nan_where_it_belongs_cpu, attention_keeps_nan_where_it_belongs_cuda;
}

/// f64 attention: (o, lse, dq, dk, dv).
struct Attention {
    o: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

fn attention_in_f64(q: &[f64], k: &[f64], v: &[f64], d: &[f64], rows: &[usize], s: &AttentionShape) -> Attention {
    let n = rows[rows.len() - 1];
    let (h, kh, hd) = (s.heads, s.kv_heads, s.head_dim);
    let mut a = Attention {
        o: vec![0.0; n * h * hd],
        lse: vec![0.0; n * h],
        dq: vec![0.0; n * h * hd],
        dk: vec![0.0; n * kh * hd],
        dv: vec![0.0; n * kh * hd],
    };
    for sequence in rows.windows(2) {
        for i in sequence[0]..sequence[1] {
            let first = s.window.map_or(sequence[0], |w| sequence[0].max((i + 1).saturating_sub(w)));
            for head in 0..h {
                let at = (i * h + head) * hd;
                let key = |j: usize| (j * kh + head / (h / kh)) * hd;
                let dot = |x: &[f64], i: usize, y: &[f64], j: usize| (0..hd).map(|c| x[i + c] * y[j + c]).sum::<f64>();
                let scores: Vec<f64> = (first..=i).map(|j| dot(q, at, k, key(j)) * s.scale as f64).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let lse = most + scores.iter().map(|x| (x - most).exp()).sum::<f64>().ln();
                a.lse[i * h + head] = lse;
                for (j, score) in (first..=i).zip(&scores) {
                    for c in 0..hd {
                        a.o[at + c] += (score - lse).exp() * v[key(j) + c];
                    }
                }
                let delta = dot(d, at, &a.o, at);
                for (j, score) in (first..=i).zip(&scores) {
                    let p = (score - lse).exp();
                    let ds = p * (dot(d, at, v, key(j)) - delta) * s.scale as f64;
                    for c in 0..hd {
                        a.dv[key(j) + c] += p * d[at + c];
                        a.dk[key(j) + c] += ds * q[at + c];
                        a.dq[at + c] += ds * k[key(j) + c];
                    }
                }
            }
        }
    }
    a
}

fn attention(device: &dyn Device) {
    let cases = [
        (vec![0, 1, 3], 1, 1, 2, None),
        (vec![0, 1, 34, 34, 41], 4, 2, 8, None), // one row is empty
        (vec![0, 70], 2, 1, 64, None),
        (vec![0, 33, 65], 2, 2, 20, Some(7)),
        (vec![0, 100], 1, 1, 128, Some(40)),
        (vec![0, 19, 36], 2, 1, 160, None), // the wide kernels
        (vec![0, 40], 2, 2, 256, Some(9)),
    ];
    for (rows, heads, kv_heads, head_dim, window) in cases {
        let n = rows[rows.len() - 1];
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window,
            padded: &[],
            grouped: &[],
        };
        for (dtype, compute) in [
            (DType::F32, Compute::F32),
            (DType::F32, Compute::Tf32),
            (DType::BF16, Compute::Bf16),
            (DType::F16, Compute::F16),
            (DType::F32, Compute::Bf16),
        ] {
            let make = |heads: usize, seed: u64| {
                upload(device, &values(n * heads * head_dim, seed), &[n, heads * head_dim], dtype)
            };
            let ((q, qs), (k, ks), (v, vs), (d, ds)) =
                (make(heads, 1), make(kv_heads, 2), make(kv_heads, 3), make(heads, 4));
            let cast = |x: &[f64]| x.iter().map(|&x| operand(x as f32, compute) as f64).collect::<Vec<_>>();
            let want = attention_in_f64(&cast(&qs), &cast(&ks), &cast(&vs), &cast(&ds), &rows, &shape);
            let (o, lse) = device.attention(&q, &k, &v, &rows, &shape, compute).expect("attention");
            let out = if compute == Compute::Tf32 { DType::F32 } else { o.dtype };
            // P (and in the backward pass dS and o) are rounded to the compute format: its epsilon, relative to the
            // largest element of the result, is the noise of a plain computation in that format.
            let epsilon = match compute {
                Compute::F32 => 4e-6,
                Compute::Tf32 | Compute::F16 => 2f64.powi(-10),
                Compute::Bf16 => 2f64.powi(-7),
            };
            let largest = |x: &[f64]| x.iter().fold(0f64, |m, x| m.max(x.abs()));
            let what = format!("{head_dim} {dtype:?} {compute:?} {window:?}");
            let bound = |x: &[f64], by: f64| {
                let most = largest(x) * by * epsilon;
                move |_: usize| most
            };
            close(&format!("o {what}"), &download(device, &o), &want.o, out, bound(&want.o, 1.0));
            // The CPU's half path uses a coarser exponential: measured, a row of one token is 5e-5 off.
            let coarse = device.name() == "cpu" && matches!(compute, Compute::Bf16 | Compute::F16);
            let bound = if coarse { 1.1e-4 } else { 2e-5 };
            close(&format!("lse {what}"), &download(device, &lse), &want.lse, DType::F32, |_| bound);
            let (dq, dk, dv) = device.attention_grad(&d, &q, &k, &v, &o, &lse, &rows, &shape, compute).expect("grad");
            assert_eq!((dq.dtype, dk.dtype, dv.dtype), (dtype, dtype, dtype));
            // dS = P·(d_o·v − delta) cancels: its noise is that of the two terms, d_o·v·k·√head_dim·scale, not of the result.
            let terms = largest(&ds) * largest(&vs) * largest(&ks) * shape.scale as f64 * (head_dim as f64).sqrt();
            let grads = [("dq", dq, &want.dq, terms), ("dk", dk, &want.dk, terms), ("dv", dv, &want.dv, 0.0)];
            for (name, got, want, terms) in grads {
                let most = epsilon * (2.0 * largest(want) + terms);
                close(&format!("{name} {what}"), &download(device, &got), want, out, |_| most);
            }
        }
    }
}

fn attention_nan(device: &dyn Device) {
    let (n, hd) = (40, 16);
    let rows = [0, 20, 40];
    let shape =
        AttentionShape { heads: 1, kv_heads: 1, head_dim: hd, scale: 0.25, window: None, padded: &[], grouped: &[] };
    let mut v = values(n * hd, 3);
    (v[10 * hd], v[30 * hd + 1]) = (f32::NAN, f32::INFINITY);
    let (q, _) = upload(device, &values(n * hd, 1), &[n, hd], DType::F32);
    let (k, _) = upload(device, &values(n * hd, 2), &[n, hd], DType::F32);
    let (v, _) = upload(device, &v, &[n, hd], DType::F32);
    let (o, lse) = device.attention(&q, &k, &v, &rows, &shape, Compute::F32).expect("attention");
    let o = download(device, &o);
    for i in 0..n {
        let (first, second) = (o[i * hd], o[i * hd + 1]);
        assert_eq!(first.is_nan(), (10..20).contains(&i), "NaN of key 10, query {i}: {first}");
        assert_eq!(second == f32::INFINITY, i >= 30, "infinity of key 30, query {i}: {second}");
    }
    assert!(download(device, &lse).iter().all(|x| x.is_finite()), "v does not enter the log-sum-exp");
    let mut bad = values(n * hd, 1);
    bad[25 * hd] = f32::NAN;
    let (q, _) = upload(device, &bad, &[n, hd], DType::F32);
    let (o, _) = device.attention(&q, &k, &q, &rows, &shape, Compute::F32).expect("attention");
    let o = download(device, &o);
    assert!((0..25).all(|i| o[i * hd + 2].is_finite()) && o[25 * hd + 2].is_nan(), "a NaN query spoils its own row");
}
