use spikeprobe::device::{DType, Device, Keep, noise};

use super::compare::same;
use super::reference::{round, upload, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    every_half: casts_of_every_half_cpu, casts_of_every_half_cuda;
    many_floats: casts_of_floats_of_every_exponent_cpu, casts_of_floats_of_every_exponent_cuda;
    gather: rows_are_gathered_and_scattered_cpu, rows_are_gathered_and_scattered_cuda;
    embedding: embedding_rounds_to_the_residual_dtype_cpu, embedding_rounds_to_the_residual_dtype_cuda;
    arithmetic: sums_and_scales_round_once_cpu, sums_and_scales_round_once_cuda;
    noisy: noise_and_dropout_are_the_generators_cpu, noise_and_dropout_are_the_generators_cuda;
    empty: tensors_without_elements_pass_cpu, tensors_without_elements_pass_cuda;
}

/// Values that kernels treat specially.
const SPECIAL: [f32; 12] = [
    0.0,
    -0.0,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
    1e-45,
    -1e-40,
    6e-8,
    65504.0,
    65520.0,
    f32::MAX,
    f32::MIN_POSITIVE,
];

fn every_half(device: &dyn Device) {
    for dtype in [DType::BF16, DType::F16] {
        let all: Vec<f32> = (0..=u16::MAX)
            .map(|bits| match dtype {
                DType::BF16 => half::bf16::from_bits(bits).to_f32(),
                _ => half::f16::from_bits(bits).to_f32(),
            })
            .collect();
        let x = device.upload(&all, &[all.len()], dtype).expect("upload");
        same("stored and read back", &download(device, &x), &all);
        for target in DTYPES {
            let want: Vec<f32> = all.iter().map(|&x| round(x, target)).collect();
            same(
                &format!("{dtype:?} to {target:?}"),
                &download(device, &device.cast(&x, target).expect("cast")),
                &want,
            );
        }
    }
}

fn many_floats(device: &dyn Device) {
    // An odd stride visits every exponent and all patterns of the bits that rounding looks at; ties by hand.
    let mut floats: Vec<f32> = (0..1u32 << 17).map(|i| f32::from_bits(i.wrapping_mul(32_771))).collect();
    for nudge in [0x7FFF, 0x8000, 0x8001] {
        floats.extend((0..=u16::MAX).map(|high| f32::from_bits((high as u32) << 16 | nudge)));
        floats.extend((0..1 << 16).map(|i| f32::from_bits(0x3300_0000 + i * 0x1000 + nudge - 0x8000)));
    }
    floats.extend(SPECIAL);
    let x = device.upload(&floats, &[floats.len()], DType::F32).expect("upload");
    same("f32", &download(device, &x), &floats);
    for dtype in [DType::BF16, DType::F16] {
        let want: Vec<f32> = floats.iter().map(|&x| round(x, dtype)).collect();
        same(&format!("to {dtype:?}"), &download(device, &device.cast(&x, dtype).expect("cast")), &want);
    }
}

fn gather(device: &dyn Device) {
    for (rows, columns) in [(1, 1), (7, 3), (33, 65), (130, 32)] {
        for dtype in DTYPES {
            let (x, _) = upload(device, &values(rows * columns, 1), &[rows, columns], dtype);
            let all = download(device, &x);
            let index: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
            let y = device.gather_rows(&x, &index).expect("gather");
            assert_eq!((y.shape.as_slice(), y.dtype), ([index.len(), columns].as_slice(), dtype));
            let want: Vec<f32> = index.iter().flat_map(|&i| &all[i as usize * columns..][..columns]).copied().collect();
            same("gathered", &download(device, &y), &want);
            let mut spread = vec![0f32; (rows + 2) * columns];
            for (row, &i) in want.chunks(columns).zip(&index) {
                spread[(i as usize + 2) * columns..][..columns].copy_from_slice(row);
            }
            let shifted: Vec<u32> = index.iter().map(|i| i + 2).collect();
            let z = device.scatter_rows(&y, &shifted, rows + 2).expect("scatter");
            same("scattered", &download(device, &z), &spread);
        }
    }
    let (x, _) = upload(device, &[1.0, 2.0], &[2, 1], DType::F32);
    assert!(device.gather_rows(&x, &[2]).is_err(), "a row that is not there");
    assert!(device.scatter_rows(&x, &[0, 2], 2).is_err(), "a row that is not there");
}

fn embedding(device: &dyn Device) {
    for dtype in DTYPES {
        for out in DTYPES {
            let (table, _) = upload(device, &values(11 * 13, 2), &[11, 13], dtype);
            let all = download(device, &table);
            let ids = [10, 0, 3, 3, 7];
            let want: Vec<f32> =
                ids.iter().flat_map(|&i| &all[i as usize * 13..][..13]).map(|&x| round(x, out)).collect();
            let y = device.embedding(&table, &ids, out).expect("embedding");
            assert_eq!(y.dtype, out);
            same("embedding", &download(device, &y), &want);
        }
    }
}

fn arithmetic(device: &dyn Device) {
    for n in [1, 7, 32, 65, 1023, 5000] {
        let mut a = values(n, 3);
        for (i, x) in a.iter_mut().enumerate().take(SPECIAL.len()) {
            *x = SPECIAL[i];
        }
        let b = values(n, 4);
        for (a_type, b_type, out) in [
            (DType::F32, DType::F32, DType::F32),
            (DType::BF16, DType::F32, DType::BF16),
            (DType::F16, DType::F16, DType::F16),
            (DType::F16, DType::BF16, DType::F32),
        ] {
            let (x, y) = (device.upload(&a, &[n], a_type).expect("a"), device.upload(&b, &[n], b_type).expect("b"));
            let (left, right) = (download(device, &x), download(device, &y));
            let want: Vec<f32> = left.iter().zip(&right).map(|(a, b)| round(a + b, out)).collect();
            same("add", &download(device, &device.add(&x, &y, out).expect("add")), &want);
            let want: Vec<f32> = left.iter().map(|a| round(a * 0.3, out)).collect();
            same("scale", &download(device, &device.scale(&x, 0.3, out).expect("scale")), &want);
        }
    }
}

fn noisy(device: &dyn Device) {
    for dtype in DTYPES {
        let x = device.upload(&values(3000, 5), &[30, 100], dtype).expect("upload");
        let before = download(device, &x);
        let h = noise::half_ulp(DType::BF16);
        let want: Vec<f32> = before
            .iter()
            .enumerate()
            .map(|(i, x)| round(x * (1.0 + h * noise::symmetric(7, 9, i as u64)), dtype))
            .collect();
        same("perturb", &download(device, &device.perturb(&x, 7, 9, DType::BF16).expect("perturb")), &want);
        // noise.div_(0.9) leaves the factor in the dtype of the input.
        let kept = round(1.0 / 0.9f32, dtype);
        let want: Vec<f32> = before
            .iter()
            .enumerate()
            .map(|(i, x)| round(x * if noise::unit(7, 9, i as u64) >= 0.1 { kept } else { 0.0 }, dtype))
            .collect();
        let drawn = Keep::Drawn { seed: 7, stream: 9 };
        same("dropout", &download(device, &device.dropout(&x, 0.1, drawn).expect("dropout")), &want);
        let words: Vec<u32> = (0..94).map(|i| (noise::bits(3, 1, i) >> 32) as u32).collect();
        let bit = |i: usize| words[i / 32] >> (i % 32) & 1;
        let want: Vec<f32> =
            before.iter().enumerate().map(|(i, x)| round(x * if bit(i) == 1 { kept } else { 0.0 }, dtype)).collect();
        same("dropout", &download(device, &device.dropout(&x, 0.1, Keep::Bits(&words)).expect("dropout")), &want);
        assert!(device.dropout(&x, 0.1, Keep::Bits(&words[..93])).is_err(), "3000 elements need 94 words");
    }
}

/// The generator itself; that devices use it is `noisy`.
#[test]
fn noise_is_uniform_and_has_no_mean() {
    let n = 100_000;
    // Five standard deviations each.
    let kept = (0..n).filter(|&i| noise::unit(7, 1, i) >= 0.25).count() as f64 / n as f64;
    assert!((kept - 0.75).abs() < 5.0 * (0.75f64 * 0.25 / n as f64).sqrt(), "{kept} kept");
    let sum: f64 = (0..n).map(|i| noise::symmetric(7, 1, i) as f64).sum();
    assert!(sum.abs() < 5.0 * (n as f64 / 3.0).sqrt(), "sum {sum}");
    assert!((0..100).any(|i| noise::unit(7, 1, i) != noise::unit(7, 2, i)), "streams differ");
}

fn empty(device: &dyn Device) {
    let x = device.zeros(&[0, 8], DType::BF16).expect("zeros");
    assert!(download(device, &device.cast(&x, DType::F32).expect("cast")).is_empty());
    assert!(download(device, &device.add(&x, &x, DType::BF16).expect("add")).is_empty());
    assert!(download(device, &device.gather_rows(&x, &[]).expect("gather")).is_empty());
    assert_eq!(download(device, &device.zeros(&[3, 5], DType::F16).expect("zeros")), [0.0; 15]);
}
