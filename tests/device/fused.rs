//! Operations that a device may do in one go: the same bits as the separate ones they stand for.

use spikeprobe::device::{Compute, DType, Device, LowRank, Tensor};

use super::compare::same;
use super::reference::{upload, values};
use super::{DTYPES, download, on_devices};

on_devices! {
    adapted: a_linear_with_its_branch_is_both_and_their_sum_cpu, a_linear_with_its_branch_is_both_and_their_sum_cuda;
    onto: input_gradients_add_up_one_after_another_cpu, input_gradients_add_up_one_after_another_cuda;
    units: units_accumulate_one_after_another_cpu, units_accumulate_one_after_another_cuda;
    owned: cross_entropy_in_place_is_cross_entropy_cpu, cross_entropy_in_place_is_cross_entropy_cuda;
}

/// (dtype of the frozen product, of the branch): as the plans of f32, autocast, half weights and an f32 adapter have them.
const PLANS: [(DType, DType); 5] = [
    (DType::F32, DType::F32),
    (DType::BF16, DType::BF16),
    (DType::F16, DType::F16),
    (DType::BF16, DType::F32),
    (DType::F16, DType::F32),
];

fn drawn(device: &dyn Device, shape: &[usize], dtype: DType, seed: u64) -> Tensor {
    upload(device, &values(shape.iter().product(), seed), shape, dtype).0
}

fn adapted(device: &dyn Device) {
    for (n, fan_in, fan_out, rank) in [(1, 1, 1, 1), (7, 33, 20, 3), (40, 65, 96, 8)] {
        for (out, branch) in PLANS {
            let (x, w) = (drawn(device, &[n, fan_in], out, 1), drawn(device, &[fan_out, fan_in], out, 2));
            let (u, b) = (drawn(device, &[n, rank], branch, 3), drawn(device, &[fan_out, rank], branch, 4));
            let bias = drawn(device, &[fan_out], out, 5);
            let (compute, side) = (Compute::of(out), Compute::of(branch));
            let low = LowRank { x: &u, w: &b, compute: side, dtype: branch };
            for bias in [None, Some(&bias)] {
                let got = device.linear_adapted(&x, &w, bias, compute, out, &low, 1.7).expect("linear_adapted");
                let y = device.linear(&x, &w, bias, compute, out).expect("linear");
                let v = device.linear(&u, &b, None, side, branch).expect("branch");
                let v = device.scale(&v, 1.7, branch).expect("scale");
                let sum = device.add(&y, &v, if out == branch { out } else { DType::F32 }).expect("add");
                let want = device.cast(&sum, out).expect("cast");
                assert_eq!((got.dtype, &got.shape), (out, &want.shape));
                same(&format!("{n} {out:?} {branch:?}"), &download(device, &got), &download(device, &want));
            }
        }
    }
}

fn onto(device: &dyn Device) {
    for (n, fan_in, fan_out, rank) in [(1, 1, 1, 1), (7, 33, 20, 3), (40, 65, 96, 8)] {
        for (out, branch) in PLANS {
            let (dy, w) = (drawn(device, &[n, fan_out], out, 1), drawn(device, &[fan_out, fan_in], out, 2));
            let (du, a) = (drawn(device, &[n, rank], branch, 3), drawn(device, &[rank, fan_in], branch, 4));
            let low = LowRank { x: &du, w: &a, compute: Compute::of(branch), dtype: branch };
            let compute = Compute::of(out);
            let own = device.linear_input_grad(&dy, &w, compute, out).expect("grad");
            let side = device.linear_input_grad(&du, &a, low.compute, branch).expect("grad");
            // Under autocast the input, and with it the sum, is f32 where the products are half.
            for dtype in [out, DType::F32] {
                let [own, side] = [&own, &side].map(|x| device.cast(x, dtype).expect("cast"));
                let before = drawn(device, &[n, fan_in], dtype, 5);
                for so_far in [None, Some(before)] {
                    for with in [None, Some(&low)] {
                        let mut sum = so_far.clone();
                        for part in with.map(|_| &side).into_iter().chain([&own]) {
                            sum = Some(match sum {
                                None => part.clone(),
                                Some(sum) => device.add(&sum, part, dtype).expect("add"),
                            });
                        }
                        let got = device.linear_input_grad_onto(so_far.clone(), with, &dy, &w, compute, out, dtype);
                        let (got, want) = (got.expect("onto"), sum.expect("at least one part"));
                        let what = format!("{n} {out:?} {branch:?} {dtype:?} {} {}", so_far.is_some(), with.is_some());
                        assert_eq!((got.dtype, &got.shape), (dtype, &want.shape), "{what}");
                        same(&what, &download(device, &got), &download(device, &want));
                    }
                }
            }
        }
    }
}

fn units(device: &dyn Device) {
    for dtype in DTYPES {
        for (count, n) in [(0, 5), (1, 1), (3, 7), (8, 1030)] {
            let mut acc = drawn(device, &[1, n], dtype, 1);
            let mut want = acc.clone();
            let all = drawn(device, &[count, 1, n], DType::F32, 2);
            device.accumulate_units(&mut acc, &all).expect("accumulate_units");
            let flat = Tensor { shape: vec![count, n], ..all };
            for unit in 0..count {
                let one = device.gather_rows(&flat, &[unit as u32]).expect("gather");
                device.accumulate(&mut want, &one).expect("accumulate");
            }
            same(&format!("{count} of {n} {dtype:?}"), &download(device, &acc), &download(device, &want));
        }
    }
}

fn owned(device: &dyn Device) {
    for dtype in DTYPES {
        let logits = drawn(device, &[5, 257], dtype, 1);
        let (labels, seed) = ([0, 1, 256, 3, 4], [0.5, 1.0, -1.0, 0.0, 2.0]);
        let (want, d) = device.cross_entropy(&logits, &labels, &seed).expect("cross_entropy");
        let (got, e) = device.cross_entropy_owned(logits, &labels, &seed).expect("cross_entropy_owned");
        same("loss", &got, &want);
        same("gradient", &download(device, &e), &download(device, &d));
    }
}
