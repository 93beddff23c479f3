//! Checksums of matrix products: silent on honest results, loud on every flip beyond their bound.

use std::sync::{Arc, Mutex};

use spikeprobe::Result;
use spikeprobe::device::hooked::{Call, Hook, Hooked};
use spikeprobe::device::{Compute, DType, Device, Tensor, cpu::CpuDevice, noise};
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
