//! Every bit of PyTorch's bf16 results where widths make the order of sums visible (fixtures/device/make_pytorch_bits.py).
//! On the CPU alone: a GPU sums in other orders.

use spikeprobe::device::{AttentionShape, Compute, DType, Device, Tensor};

use super::download;
use super::pytorch::Case;

const BF16: DType = DType::BF16;

fn cpu() -> std::sync::Arc<dyn Device> {
    spikeprobe::device::open("cpu", Some(2)).expect("cpu")
}

/// Fails on the first element that differs (NaN equals nothing).
fn assert_equal(device: &dyn Device, what: &str, got: &Tensor, want: &[f32]) {
    let got = download(device, got);
    assert_eq!(got.len(), want.len(), "{what}");
    let different: Vec<usize> = (0..got.len()).filter(|&i| got[i].is_nan() || got[i] != want[i]).collect();
    if let Some(&i) = different.first() {
        panic!("{what}: {} of {} differ, first [{i}]: {} for {}", different.len(), got.len(), got[i], want[i]);
    }
}

/// True where the processor multiplies pairs of bf16 as oneDNN does there; said aloud where it does not.
fn multiplies_pairs(device: &dyn Device) -> bool {
    let pairs = device.fingerprint().contains("bf16");
    if !pairs {
        println!("skipped: {} has no AVX512-BF16, with which the expected products were made", device.fingerprint());
    }
    pairs
}

#[test]
fn the_mean_of_squares_cascades_as_torch_sum_does() {
    let device = cpu();
    for name in ["norm_576", "norm_1100"] {
        let case = Case::new(&*device, name, BF16);
        let (x, w) = (case.tensor("x"), case.tensor("w"));
        let (y, r) = device.rms_norm(&x, &w, 1e-5, BF16).expect("rms_norm");
        assert_equal(&*device, name, &y, case.values("y"));
        let dx = device.rms_norm_grad(&case.tensor("dy"), &x, &w, &r).expect("rms_norm_grad");
        assert_equal(&*device, &format!("{name} dx"), &dx, case.values("dx"));
    }
}

#[test]
fn products_of_bf16_are_cut_where_onednn_cuts_them() {
    let device = cpu();
    if !multiplies_pairs(&*device) {
        return;
    }
    for name in ["linear_96", "linear_576", "linear_1536"] {
        let case = Case::new(&*device, name, BF16);
        let y = device.linear(&case.tensor("x"), &case.tensor("w"), None, Compute::Bf16, BF16).expect("linear");
        assert_equal(&*device, name, &y, case.values("y"));
    }
    let case = Case::new(&*device, "weight_grad", BF16);
    let (dy, x) = (case.tensor("dy"), case.tensor("x"));
    let dw = device.linear_weight_grad(&dy, &x, &[0, 600], Compute::Bf16, BF16).expect("linear_weight_grad");
    assert_equal(&*device, "weight_grad", &dw, case.values("dw"));
}

#[test]
fn the_last_keys_of_a_padded_length_are_exponentiated_one_by_one() {
    let device = cpu();
    for (n, padded) in [(21, 24), (100, 104), (40, 40)] {
        let name = format!("attention_{n}_{padded}");
        let case = Case::new(&*device, &name, BF16);
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 4,
            head_dim: 16,
            scale: 0.25,
            window: None,
            padded: &[padded],
            grouped: &[],
        };
        let (q, k, v) = (case.tensor("q"), case.tensor("k"), case.tensor("v"));
        let (o, _) = device.attention(&q, &k, &v, &[0, n], &shape, Compute::Bf16).expect("attention");
        assert_equal(&*device, &name, &o, case.values("o"));
    }
}
