//! Checksums of matrix products: silent on honest results, loud on every flip beyond their bound.

use std::sync::{Arc, Mutex};

use spikeprobe::Result;
use spikeprobe::device::checks::{Expect, View};
use spikeprobe::device::hooked::{Call, Hook, Hooked};
use spikeprobe::device::{Compute, DType, Device, LowRank, Tensor, cpu::CpuDevice, noise};
use spikeprobe::numerics::Checksums;

const N: usize = 9;
const IN: usize = 70;
const OUT: usize = 33;

/// Replaces one element of the result; remembers what it did.
struct Spoil(Mutex<Option<(usize, u32)>>);

impl Hook for Spoil {
    fn after(&self, device: &dyn Device, _: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let Some((element, bit)) = *self.0.lock().unwrap() else { return Ok(result) };
        let mut values = device.download(&result[0])?;
        values[element] = f32::from_bits(values[element].to_bits() ^ (1 << bit));
        Ok(vec![device.upload(&values, &result[0].shape, result[0].dtype)?])
    }
}

fn tensor(device: &dyn Device, stream: u64, shape: [usize; 2], dtype: DType) -> Tensor {
    let values: Vec<f32> = (0..(shape[0] * shape[1]) as u64).map(|k| noise::symmetric(3, stream, k)).collect();
    device.upload(&values, &shape, dtype).unwrap()
}

/// The violations of the three products of a linear with `spoiled` (element, bit) in each result.
fn violations(compute: Compute, dtype: DType, out: DType, spoiled: Option<(usize, u32)>) -> [Option<(f64, f64)>; 3] {
    let spoil = Arc::new(Spoil(Mutex::new(None)));
    let inner: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1)).unwrap());
    let spoilt: Arc<dyn Device> = Arc::new(Hooked { inner: inner.clone(), hook: spoil.clone() });
    let (x, w, dy) = (
        tensor(&*spoilt, 0, [N, IN], dtype),
        tensor(&*spoilt, 1, [OUT, IN], dtype),
        tensor(&*spoilt, 2, [N, OUT], dtype),
    );
    *spoil.0.lock().unwrap() = spoiled;
    let run = |product: &dyn Fn(&dyn Device) -> Result<Tensor>| {
        let checksums = Arc::new(Checksums::on(Arc::clone(&inner)));
        product(&Hooked { inner: spoilt.clone(), hook: checksums.clone() }).unwrap();
        let (products, found) = checksums.found().unwrap();
        assert_eq!(products, 1);
        found.first().map(|v| (v.difference, v.bound))
    };
    [
        run(&|d| d.linear(&x, &w, None, compute, out)),
        run(&|d| d.linear_input_grad(&dy, &w, compute, out)),
        run(&|d| d.linear_weight_grad(&dy, &x, &[0, 4, N], compute, out)),
    ]
}

const KINDS: [(Compute, DType, DType); 5] = [
    (Compute::F32, DType::F32, DType::F32),
    (Compute::Tf32, DType::F32, DType::F32),
    (Compute::Bf16, DType::BF16, DType::F32),
    (Compute::Bf16, DType::F32, DType::BF16),
    (Compute::F16, DType::F16, DType::F16),
];

#[test]
fn honest_products_agree_with_their_checksums() {
    for (compute, dtype, out) in KINDS {
        assert_eq!(violations(compute, dtype, out, None), [None; 3], "{compute:?} {dtype:?} → {out:?}");
    }
}

#[test]
fn every_flip_whose_effect_exceeds_the_bound_is_seen() {
    let device = CpuDevice::new(Some(1)).unwrap();
    let (x, w) = (tensor(&device, 0, [N, IN], DType::F32), tensor(&device, 1, [OUT, IN], DType::F32));
    let y = device.download(&device.linear(&x, &w, None, Compute::F32, DType::F32).unwrap()).unwrap();
    let sizes = |t: &Tensor, row: usize| -> Vec<f64> {
        device.download(t).unwrap()[row * IN..(row + 1) * IN].iter().map(|v| f64::from(v.abs())).collect()
    };
    let (mut seen, mut below) = (0, 0);
    for element in [0, 17, N * OUT - 1] {
        let row = element / OUT;
        let xs = sizes(&x, row);
        let weight: f64 = (0..OUT).map(|o| sizes(&w, o).iter().zip(&xs).map(|(w, x)| w * x).sum::<f64>()).sum();
        let unit = 2f64.powi(-24);
        for bit in 0..31 {
            let flipped = f32::from_bits(y[element].to_bits() ^ (1 << bit));
            let effect = f64::from(flipped - y[element]).abs();
            let rest: f64 = y[row * OUT..(row + 1) * OUT].iter().map(|v| f64::from(v.abs())).sum();
            // The stated bound, with the flipped value among the row's magnitudes.
            let bound = 1.01 * (IN + 1) as f64 * unit * weight + unit * (rest + f64::from(flipped.abs()));
            let [found, ..] = violations(Compute::F32, DType::F32, DType::F32, Some((element, bit)));
            // What honest rounding already took of the bound may hide or help.
            assert!(found.is_some() || effect <= 2.0 * bound, "element {element} bit {bit}: {effect:e} {bound:e}");
            seen += usize::from(found.is_some());
            below += usize::from(effect <= bound);
        }
    }
    assert!(seen >= 3 * 12 && below >= 3, "{seen} seen, {below} below the bound");
}

#[test]
fn a_result_that_is_nan_is_wrong() {
    let flipped = violations(Compute::F32, DType::F32, DType::F32, Some((5, 30)));
    assert!(flipped.iter().all(Option::is_some), "{flipped:?}");
}

/// [rows, columns] of f64.
struct Wide(Vec<f64>, usize);

impl Wide {
    fn of(device: &dyn Device, x: &Tensor) -> Self {
        Self(device.download(x).unwrap().into_iter().map(f64::from).collect(), x.shape[1])
    }
    fn at(&self, row: usize, column: usize) -> f64 {
        self.0[row * self.1 + column]
    }
}

/// Checks sums that a product took along against those of f64, (Σ, Σ|·|) by index.
/// `most`: what Σ|·| may be reported as at most, where it is not measured itself.
fn assert_near(what: &str, found: View<'_>, exact: &dyn Fn(usize) -> (f64, f64), most: Option<&dyn Fn(usize) -> f64>) {
    for (i, (&sum, &size)) in found.sums.iter().zip(found.sizes).enumerate() {
        let ((expected, weight), (sum, size)) = (exact(i), (f64::from(sum), f64::from(size)));
        let slack = 1e-5 * weight;
        let most = most.map_or(weight, |most| most(i));
        let near = (sum - expected).abs() <= slack && size >= weight - slack && size <= most + slack;
        assert!(near, "{what} {i}: {sum} {size}, not {expected} {weight} to {most}");
    }
}

/// Cauchy's and Schwarz's bound on [`predicted`]'s second sum.
fn at_most(k: usize, x: impl Fn(usize) -> f64, lanes: impl Fn(usize) -> (f64, f64)) -> f64 {
    let norm = |x: &dyn Fn(usize) -> f64| (0..k).map(|d| x(d) * x(d)).sum::<f64>().sqrt();
    norm(&x) * norm(&|d| lanes(d).1)
}

fn add_up(terms: impl Iterator<Item = f64>) -> (f64, f64) {
    terms.fold((0.0, 0.0), |(sum, size), x| (sum + x, size + x.abs()))
}

/// Σ over the terms' products, and over those of their magnitudes, of sums over lanes.
fn predicted(k: usize, x: impl Fn(usize) -> f64, lanes: impl Fn(usize) -> (f64, f64)) -> (f64, f64) {
    (0..k).fold((0.0, 0.0), |(sum, size), d| (sum + x(d) * lanes(d).0, size + x(d).abs() * lanes(d).1))
}

/// Rows, depth, columns: whole tiles and parts of them, more than one part of the depth, a LoRA rank.
const SHAPES: [(usize, usize, usize); 6] =
    [(50, 90, 24), (28, 64, 96), (31, 1301, 71), (45, 577, 8), (3, 40, 640), (130, 33, 300)];

#[test]
fn products_take_along_the_sums_of_their_operands_and_results() {
    let device = CpuDevice::new(Some(2)).unwrap();
    for (compute, dtype) in [(Compute::F32, DType::F32), (Compute::Bf16, DType::BF16)] {
        for (m, k, n) in SHAPES {
            let draw = |stream, shape| tensor(&device, stream, shape, dtype);
            let (x, w, u, b) = (draw(0, [m, k]), draw(1, [n, k]), draw(2, [m, 8]), draw(3, [n, 8]));
            let branch = LowRank { x: &u, w: &b, compute, dtype };
            device.expect_sums(Some(Expect::default()));
            let plain = device.linear(&x, &w, None, compute, dtype).unwrap();
            let adapted = device.linear_adapted(&x, &w, None, compute, dtype, &branch, 2.0).unwrap();
            device.expect_sums(None);
            assert!(device.product_sums(&device.linear(&x, &w, None, compute, dtype).unwrap()).is_none());
            let [x, w, u, b] = [&x, &w, &u, &b].map(|t| Wide::of(&device, t));
            for (y, has_branch) in [(&plain, false), (&adapted, true)] {
                // A rank of f32 has a kernel of its own, which sums nothing.
                let Some(sums) = device.product_sums(y) else {
                    assert!(compute == Compute::F32 && n == 8 && !has_branch, "{m}x{k}x{n} was not summed");
                    continue;
                };
                let y = Wide::of(&device, y);
                assert_eq!((sums.got().sums.len(), sums.length), (m, n));
                assert_near("row", sums.got(), &|i| add_up((0..n).map(|j| y.at(i, j))), None);
                let operands = |what, found, k, x: &Wide, w: &Wide| {
                    let lanes: Vec<_> = (0..k).map(|d| add_up((0..n).map(|j| w.at(j, d)))).collect();
                    let most = |i| at_most(k, |d| x.at(i, d), |d| lanes[d]);
                    let bf16 = compute == Compute::Bf16;
                    let most = bf16.then_some(&most as &dyn Fn(usize) -> f64);
                    assert_near(what, found, &|i| predicted(k, |d| x.at(i, d), |d| lanes[d]), most);
                };
                operands("operands of row", sums.main(), k, &x, &w);
                assert_eq!(sums.branch().is_some(), has_branch);
                if let Some(found) = sums.branch() {
                    operands("branch of row", found, 8, &u, &b);
                }
            }
        }
    }
}

#[test]
fn what_is_known_of_a_weight_outweighs_the_weight() {
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let (m, k, n) = (30, 200, 400);
    let (x, w) = (tensor(&*device, 0, [m, k], DType::BF16), tensor(&*device, 1, [n, k], DType::BF16));
    let mut flipped = device.download(&w).unwrap();
    flipped[777] = 1e3;
    let known = device.column_checks(&w, &[0, n]).unwrap();
    device.expect_sums(Some(Expect { weight: Some(Arc::new(known)) }));
    let wrong = device.upload(&flipped, &[n, k], DType::BF16).unwrap();
    let y = device.linear(&x, &wrong, None, Compute::Bf16, DType::F32).unwrap();
    device.expect_sums(None);
    let sums = device.product_sums(&y).unwrap();
    let (got, main) = (sums.got(), sums.main());
    let x = Wide::of(&*device, &x);
    for row in 0..m {
        let effect = x.at(row, 777 % k) * 1e3;
        let off = f64::from(got.sums[row] - main.sums[row]);
        assert!((off - effect).abs() < 0.01 * effect.abs() + 2.0, "row {row}: {off}, not {effect}");
    }
}

#[test]
fn honest_fused_products_agree_with_their_checksums() {
    for (compute, dtype) in [(Compute::F32, DType::F32), (Compute::Bf16, DType::BF16), (Compute::Bf16, DType::F32)] {
        for (m, k, n) in SHAPES {
            let inner: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(2)).unwrap());
            let checksums = Arc::new(Checksums::on(Arc::clone(&inner)));
            let device = Hooked { inner, hook: checksums.clone() };
            let draw = |stream, shape| tensor(&*device.inner, stream, shape, dtype);
            let (x, w, a, b, dy) =
                (draw(0, [m, k]), draw(1, [n, k]), draw(2, [8, k]), draw(3, [n, 8]), draw(4, [m, n]));
            let u = device.linear(&x, &a, None, compute, dtype).unwrap();
            let branch = LowRank { x: &u, w: &b, compute, dtype };
            device.linear_adapted(&x, &w, None, compute, dtype, &branch, 0.5).unwrap();
            let du = device.linear_input_grad(&dy, &b, compute, dtype).unwrap();
            device.linear_weight_grad(&dy, &u, &[0, m / 3, m], compute, dtype).unwrap();
            device.linear_weight_grad(&du, &x, &[0, m / 3, m], compute, dtype).unwrap();
            let branch = LowRank { x: &du, w: &a, compute, dtype };
            let mut so_far = None;
            for _ in 0..2 {
                let onto = device.linear_input_grad_onto(so_far, Some(&branch), &dy, &w, compute, dtype, dtype);
                so_far = Some(onto.unwrap());
            }
            let (products, found) = checksums.found().unwrap();
            assert_eq!((products, found), (7, vec![]), "{compute:?} {dtype:?} {m}x{k}x{n}");
        }
    }
}
