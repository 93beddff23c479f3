//! Every bit of PyTorch's results where sizes make the order of sums visible (fixtures/device/make_pytorch_bits.py).
//! On the CPU alone: a GPU sums in other orders.

use spikeprobe::device::{AdamW, AttentionShape, Compute, DType, Device, Tensor};
use spikeprobe::model::{ModelConfig, RopeTables};

use super::download;
use super::pytorch::Case;

const BF16: DType = DType::BF16;
const F16: DType = DType::F16;

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
        let dx = device.rms_norm_grad(&case.tensor("dy"), &x, &w, &r, None).expect("rms_norm_grad");
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

#[test]
fn residual_streams_meet_the_terms_of_a_norms_gradient_as_autograd_adds_them() {
    let device = cpu();
    for dtype in [DType::F32, BF16] {
        let case = Case::new(&*device, "residual", dtype);
        let (x, w, dy) = (case.tensor("x"), case.tensor("w"), case.tensor("dy"));
        let (_, r) = device.rms_norm(&x, &w, 1e-5, dtype).expect("rms_norm");
        let dx = device.rms_norm_grad(&dy, &x, &w, &r, Some(&dy)).expect("rms_norm_grad");
        assert_equal(&*device, &format!("residual {dtype:?}"), &dx, case.values("dx"));
    }
}

#[test]
fn exponentials_of_f32_attention_have_pytorchs_last_bits() {
    let device = cpu();
    let case = Case::new(&*device, "attention_96_96", DType::F32);
    let scale = 32f64.powf(-0.5) as f32;
    let shape =
        AttentionShape { heads: 2, kv_heads: 2, head_dim: 32, scale, window: None, padded: &[96], grouped: &[] };
    let (q, k, v) = (case.tensor("q"), case.tensor("k"), case.tensor("v"));
    let (o, _) = device.attention(&q, &k, &v, &[0, 96], &shape, Compute::F32).expect("attention");
    assert_equal(&*device, "attention_96_96", &o, case.values("o"));
}

#[test]
fn attention_gradients_are_pytorchs_bit_for_bit() {
    let device = cpu();
    for dtype in [DType::F32, BF16, F16] {
        for (n, padded, head_dim) in [(33, 40, 64), (40, 40, 32), (210, 216, 32), (21, 24, 12)] {
            assert_attention(&*device, dtype, (n, padded, head_dim));
        }
    }
}

#[test]
fn attention_over_more_keys_than_a_block_is_pytorchs_bit_for_bit() {
    let device = cpu();
    for dtype in [DType::F32, F16] {
        assert_attention(&*device, dtype, (544, 544, 16));
    }
}

/// Two query heads over one key/value head, forward and backward.
fn assert_attention(device: &dyn Device, dtype: DType, (n, padded, head_dim): (usize, usize, usize)) {
    let name = format!("attention_grad_{n}_{padded}_{head_dim}");
    let case = Case::new(device, &name, dtype);
    let (q, k, v) = (case.tensor("q"), case.tensor("k"), case.tensor("v"));
    // PyTorch got no mask, and so one key/value head for both query heads, where nothing is padded.
    let grouped = [n == padded];
    let shape = AttentionShape {
        heads: 2,
        kv_heads: 1,
        head_dim,
        scale: (head_dim as f64).powf(-0.5) as f32,
        window: None,
        padded: &[padded],
        grouped: &grouped,
    };
    let compute = Compute::of(dtype);
    let (o, lse) = device.attention(&q, &k, &v, &[0, n], &shape, compute).expect("attention");
    assert_equal(device, &format!("{name} {dtype:?} o"), &o, case.values("o"));
    let d_o = case.tensor("do");
    let (dq, dk, dv) =
        device.attention_grad(&d_o, &q, &k, &v, &o, &lse, &[0, n], &shape, compute).expect("attention_grad");
    for (key, got) in [("dq", &dq), ("dk", &dk), ("dv", &dv)] {
        assert_equal(device, &format!("{name} {dtype:?} {key}"), got, case.values(key));
    }
}

#[test]
fn products_of_fp16_are_summed_in_atens_chains() {
    let device = cpu();
    for depth in [8, 36, 64, 103, 352, 600] {
        let case = |what: &str| Case::new(&*device, &format!("{what}_{depth}"), F16);
        let name = format!("fp16 of depth {depth}");
        let forward = case("linear");
        let y = device.linear(&forward.tensor("x"), &forward.tensor("w"), None, Compute::F16, F16).expect("linear");
        assert_equal(&*device, &name, &y, forward.values("y"));
        let input = case("linear_grad");
        let (dy, w) = (input.tensor("dy"), input.tensor("w"));
        let dx = device.linear_input_grad(&dy, &w, Compute::F16, F16).expect("linear_input_grad");
        assert_equal(&*device, &format!("{name} dx"), &dx, input.values("dx"));
        let weight = case("weight_grad");
        let (dy, x) = (weight.tensor("dy"), weight.tensor("x"));
        let dw = device.linear_weight_grad(&dy, &x, &[0, depth], Compute::F16, F16).expect("linear_weight_grad");
        assert_equal(&*device, &format!("{name} dw"), &dw, weight.values("dw"));
    }
}

#[test]
fn products_of_f32_are_cut_where_mkl_cuts_them_and_narrow_ones_computed_as_it_does() {
    let device = cpu();
    for name in ["linear_chain", "linear_halves", "linear_blocks", "linear_narrow", "linear_wide"] {
        let case = Case::new(&*device, name, DType::F32);
        let (x, w, dy) = (case.tensor("x"), case.tensor("w"), case.tensor("dy"));
        let (f32, compute) = (DType::F32, Compute::F32);
        if name != "linear_wide" {
            let y = device.linear(&x, &w, None, compute, f32).expect("linear");
            assert_equal(&*device, name, &y, case.values("y"));
        }
        let dx = device.linear_input_grad(&dy, &w, compute, f32).expect("linear_input_grad");
        assert_equal(&*device, &format!("{name} dx"), &dx, case.values("dx"));
        let dw = device.linear_weight_grad(&dy, &x, &[0, x.rows()], compute, f32).expect("linear_weight_grad");
        assert_equal(&*device, &format!("{name} dw"), &dw, case.values("dw"));
    }
}

#[test]
fn gate_and_loss_round_where_pytorchs_compiler_does() {
    let device = cpu();
    let case = Case::new(&*device, "gate_bits", DType::F32);
    let (gate, up) = (case.tensor("gate"), case.tensor("up"));
    assert_equal(&*device, "y", &device.gate(&gate, &up).expect("gate"), case.values("y"));
    let (d_gate, d_up) = device.gate_grad(&case.tensor("d"), &gate, &up).expect("gate_grad");
    assert_equal(&*device, "d_gate", &d_gate, case.values("d_gate"));
    assert_equal(&*device, "d_up", &d_up, case.values("d_up"));

    let case = Case::new(&*device, "loss_bits", DType::F32);
    let labels: Vec<u32> = case.values("labels").iter().map(|&label| label as u32).collect();
    let seed = vec![1.0 / 84.0; labels.len()];
    let (losses, d) = device.cross_entropy(&case.tensor("logits"), &labels, &seed).expect("cross_entropy");
    assert_eq!(losses, case.values("loss"));
    assert_equal(&*device, "d", &d, case.values("d"));
}

#[test]
fn vector_norm_adds_eight_lanes_and_then_the_rest() {
    let device = cpu();
    for n in [5, 1013] {
        let case = Case::new(&*device, &format!("norm_of_{n}"), DType::F32);
        let x = Tensor { shape: vec![n, 1], ..case.tensor("x") };
        let norms = device.norms(&x, &[0, n]).expect("norms");
        assert_eq!((norms[0].0, norms[0].1), (case.values("norm")[0], 0), "{n} elements");
    }
}

#[test]
fn rotary_tables_have_the_cosines_and_frequencies_of_pytorch() {
    let device = cpu();
    for (theta, head_dim) in [(10_000, 16), (10_000, 64), (500_000, 96), (1_000_000, 128)] {
        let name = format!("rotary_{theta}_{head_dim}");
        let case = Case::new(&*device, &name, DType::F32);
        let config = ModelConfig::from_json(&serde_json::json!({
            "model_type": "llama", "hidden_size": head_dim, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 16, "rms_norm_eps": 1e-5, "rope_theta": theta,
            "max_position_embeddings": 32768, "tie_word_embeddings": false, "torch_dtype": "float32",
        }))
        .expect("config");
        let tables = RopeTables::new(&*device, &config, 32_768, DType::F32).expect("tables");
        for (key, table) in [("cos", &tables.cos), ("sin", &tables.sin)] {
            let table = download(&*device, table);
            let rows = case.values("positions").iter().map(|&p| &table[p as usize * head_dim / 2..][..head_dim / 2]);
            let (got, want) = (rows.flatten(), case.values(key));
            let different: Vec<_> =
                got.zip(want).enumerate().filter(|(_, (a, b))| a.to_bits() != b.to_bits()).collect();
            assert!(
                different.is_empty(),
                "{name} {key}: {} of {}, first {:?}",
                different.len(),
                want.len(),
                different[0]
            );
        }
    }
}

#[test]
fn adamws_loop_divides_by_mkls_root_and_rounds_epsilon() {
    let device = cpu();
    for dtype in [DType::F32, BF16] {
        let case = Case::new(&*device, "adamw_loop_bits", dtype);
        let mut p = case.tensor("start");
        let n = p.elements();
        let mut moments = [0, 1].map(|_| device.zeros(&[n], dtype).expect("zeros"));
        for (t, g) in case.values("grads").chunks(n).enumerate() {
            let g = device.upload(g, &[n], dtype).expect("upload");
            let with = AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                epsilon: 1e-8,
                weight_decay: 0.1,
                step: (t + 1) as f64,
                fused: false,
            };
            let [m, v] = &mut moments;
            device.adamw(&mut p, &g, m, v, &with).expect("adamw");
        }
        for (key, got) in ["m", "v", "p"].into_iter().zip([&moments[0], &moments[1], &p]) {
            assert_equal(&*device, &format!("{key} {dtype:?}"), got, case.values(key));
        }
    }
}
