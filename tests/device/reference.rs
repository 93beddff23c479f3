//! f64 versions of the operations, written for the eye, and inputs for them.

use spikeprobe::device::{AttentionShape, DType, Device, Tensor, noise};

/// n values in (−scale, scale), the same for the same seed.
pub fn draw(n: usize, seed: u64, scale: f32) -> Vec<f32> {
    (0..n).map(|i| scale * noise::symmetric(seed, 0, i as u64)).collect()
}

/// A tensor of drawn values, and those values after rounding to `dtype`.
pub fn tensor(device: &dyn Device, shape: &[usize], dtype: DType, seed: u64) -> (Tensor, Vec<f64>) {
    let x = device.upload(&draw(shape.iter().product(), seed, 2.0), shape, dtype).expect("upload");
    let values = wide(&super::download(device, &x));
    (x, values)
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}

/// Relative size of half an ulp.
pub fn half_ulp(dtype: DType) -> f64 {
    noise::half_ulp(dtype) as f64
}

/// C [m, n] = A [m, k] · B [k, n] with element functions, and Σ|a·b| for the bound.
pub fn product(
    (m, n, k): (usize, usize, usize),
    a: impl Fn(usize, usize) -> f64,
    b: impl Fn(usize, usize) -> f64,
) -> (Vec<f64>, Vec<f64>) {
    let (mut c, mut size) = (Vec::new(), Vec::new());
    for i in 0..m {
        for j in 0..n {
            c.push((0..k).map(|p| a(i, p) * b(p, j)).sum());
            size.push((0..k).map(|p| (a(i, p) * b(p, j)).abs()).sum());
        }
    }
    (c, size)
}

/// q, k, v, d_o of one head and sequence: [length][head_dim] each.
pub struct Head {
    pub q: Vec<Vec<f64>>,
    pub k: Vec<Vec<f64>>,
    pub v: Vec<Vec<f64>>,
    pub d_o: Vec<Vec<f64>>,
}

pub struct HeadResult {
    pub o: Vec<Vec<f64>>,
    pub lse: Vec<f64>,
    pub dq: Vec<Vec<f64>>,
    pub dk: Vec<Vec<f64>>,
    pub dv: Vec<Vec<f64>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Causal softmax attention and its gradient, straight from the definition.
pub fn attention(head: &Head, shape: &AttentionShape) -> HeadResult {
    let (n, hd, scale) = (head.q.len(), shape.head_dim, shape.scale as f64);
    let zeros = || vec![vec![0f64; hd]; n];
    let mut r = HeadResult { o: zeros(), lse: vec![], dq: zeros(), dk: zeros(), dv: zeros() };
    for i in 0..n {
        let first = shape.window.map_or(0, |w| (i + 1).saturating_sub(w));
        let s: Vec<f64> = (first..=i).map(|j| scale * dot(&head.q[i], &head.k[j])).collect();
        let max = s.iter().cloned().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = s.iter().map(|s| (s - max).exp()).sum();
        r.lse.push(max + sum.ln());
        let p: Vec<f64> = s.iter().map(|s| (s - max).exp() / sum).collect();
        for (j, p) in (first..=i).zip(&p) {
            for d in 0..hd {
                r.o[i][d] += p * head.v[j][d];
                r.dv[j][d] += p * head.d_o[i][d];
            }
        }
        let delta = dot(&head.d_o[i], &r.o[i]);
        for (j, p) in (first..=i).zip(&p) {
            let ds = scale * p * (dot(&head.d_o[i], &head.v[j]) - delta);
            for d in 0..hd {
                r.dq[i][d] += ds * head.k[j][d];
                r.dk[j][d] += ds * head.q[i][d];
            }
        }
    }
    r
}
