//! Against PyTorch's own results (fixtures/device/make_pytorch_ops.py).

use std::collections::HashMap;

use spikeprobe::device::{AdamW, AttentionShape, Compute, DType, Device, Tensor};

use super::compare::mostly_equal;
use super::{DTYPES, download, on_devices};

on_devices! {
    norm: norm_is_pytorchs_cpu, norm_is_pytorchs_cuda;
    rope: rope_is_pytorchs_cpu, rope_is_pytorchs_cuda;
    gate: gate_is_pytorchs_cpu, gate_is_pytorchs_cuda;
    attention: attention_is_pytorchs_cpu, attention_is_pytorchs_cuda;
    loss: cross_entropy_is_pytorchs_cpu, cross_entropy_is_pytorchs_cuda;
    linear: linear_is_pytorchs_cpu, linear_is_pytorchs_cuda;
    vector_norm: vector_norm_is_pytorchs_cpu, vector_norm_is_pytorchs_cuda;
    adamw: adamw_is_pytorchs_cpu, adamw_is_pytorchs_cuda;
    sgd: sgd_is_pytorchs_cpu, sgd_is_pytorchs_cuda;
}

/// Short name as in fixtures.
fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
    }
}

/// The tensors of one case and dtype, on the device.
pub struct Case<'a> {
    device: &'a dyn Device,
    dtype: DType,
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
}

/// Inside the test binary, which scripts/gpu-check takes to machines without this repository.
const FIXTURES: [&[u8]; 2] = [
    include_bytes!("../fixtures/device/pytorch_ops.safetensors"),
    include_bytes!("../fixtures/device/pytorch_bits.safetensors"),
];

impl<'a> Case<'a> {
    pub fn new(device: &'a dyn Device, case: &str, dtype: DType) -> Self {
        let prefix = format!("{case}/{}/", name(dtype));
        let mut tensors = HashMap::new();
        for fixture in FIXTURES {
            let file = safetensors::SafeTensors::deserialize(fixture).expect("fixture");
            for (key, view) in file.tensors() {
                if let Some(key) = key.strip_prefix(&prefix) {
                    tensors.insert(key.to_string(), (view.shape().to_vec(), widen(&view)));
                }
            }
        }
        assert!(!tensors.is_empty(), "no case {prefix}");
        Self { device, dtype, tensors }
    }
    pub fn tensor(&self, key: &str) -> Tensor {
        let (shape, values) = &self.tensors[key];
        self.device.upload(values, shape, self.dtype).expect("upload")
    }
    pub fn values(&self, key: &str) -> &[f32] {
        &self.tensors[key].1
    }
    fn check(&self, got: &Tensor, key: &str, share: f64, most: f64) {
        assert_eq!(got.dtype, self.dtype);
        let what = format!("{key} {}", name(self.dtype));
        mostly_equal(&what, &download(self.device, got), self.values(key), self.dtype, share, most);
    }
}

fn widen(view: &safetensors::tensor::TensorView<'_>) -> Vec<f32> {
    let bytes = view.data();
    match view.dtype() {
        safetensors::Dtype::F32 => bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().expect("4"))).collect(),
        safetensors::Dtype::BF16 => {
            bytes.chunks(2).map(|b| half::bf16::from_le_bytes(b.try_into().expect("2")).to_f32()).collect()
        }
        safetensors::Dtype::F16 => {
            bytes.chunks(2).map(|b| half::f16::from_le_bytes(b.try_into().expect("2")).to_f32()).collect()
        }
        safetensors::Dtype::I64 => {
            bytes.chunks(8).map(|b| i64::from_le_bytes(b.try_into().expect("8")) as f32).collect()
        }
        other => panic!("dtype {other:?}"),
    }
}

/// f32 results differ by the order of sums; halves then rarely, at ties.
fn share(dtype: DType, half: f64) -> f64 {
    if dtype == DType::F32 { 0.0 } else { half }
}

fn norm(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "norm", dtype);
        let (x, w) = (case.tensor("x"), case.tensor("w"));
        let (y, r) = device.rms_norm(&x, &w, 1e-5, dtype).expect("rms_norm");
        case.check(&y, "y", share(dtype, 0.999), 2.0);
        let dx = device.rms_norm_grad(&case.tensor("dy"), &x, &w, &r, None).expect("rms_norm_grad");
        case.check(&dx, "dx", share(dtype, 0.999), 2.0);
    }
}

fn rope(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "rope", dtype);
        let positions: Vec<u32> = (0..20).collect();
        let turn = |x: &str, inverse| {
            device
                .rope(&case.tensor(x), &positions, &case.tensor("cos"), &case.tensor("sin"), 4, inverse, dtype)
                .expect("rope")
        };
        case.check(&turn("x", false), "y", 1.0, 0.0);
        case.check(&turn("dy", true), "dx", 1.0, 0.0);
    }
}

fn gate(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "gate", dtype);
        let (g, u) = (case.tensor("gate"), case.tensor("up"));
        case.check(&device.gate(&g, &u).expect("gate"), "y", share(dtype, 0.999), 1.0);
        let (dg, du) = device.gate_grad(&case.tensor("dy"), &g, &u).expect("gate_grad");
        case.check(&dg, "d_gate", share(dtype, 0.999), 1.0);
        case.check(&du, "d_up", share(dtype, 0.999), 1.0);
    }
}

fn attention(device: &dyn Device) {
    for (name, heads, kv_heads, head_dim) in [("attention", 4, 2, 16usize), ("attention_long", 1, 1, 8)] {
        for dtype in DTYPES {
            if name == "attention_long" && dtype != DType::BF16 {
                continue;
            }
            let case = Case::new(device, name, dtype);
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
                scale: 1.0 / (head_dim as f32).sqrt(),
                window: None,
                padded: &[],
                grouped: &[],
            };
            let (q, k, v) = (case.tensor("q"), case.tensor("k"), case.tensor("v"));
            let rows = [0, q.rows()];
            let compute = Compute::of(dtype);
            let (o, lse) = device.attention(&q, &k, &v, &rows, &shape, compute).expect("attention");
            // Our CUDA kernel takes 16 or 32 keys at a time where PyTorch's CPU kernel takes 512: probabilities are
            // rounded against other running maxima, so how many elements are equal says nothing there.
            let share = |dtype, half| if device.name() == "cpu" { share(dtype, half) } else { 0.0 };
            case.check(&o, "o", share(dtype, 0.97), 2.0);
            let (dq, dk, dv) = device
                .attention_grad(&case.tensor("d_o"), &q, &k, &v, &o, &lse, &rows, &shape, compute)
                .expect("attention_grad");
            // In f32 both use an exponential that is 20 ulp off, and ds subtracts its noise from itself.
            let most = if dtype == DType::F32 { 40.0 } else { 2.0 };
            case.check(&dq, "dq", share(dtype, 0.98), most);
            case.check(&dk, "dk", share(dtype, 0.98), most);
            case.check(&dv, "dv", share(dtype, 0.98), most);
        }
    }
}

fn loss(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "loss", dtype);
        let labels: Vec<u32> = case.values("labels").iter().map(|&l| l as u32).collect();
        let seed = vec![1.0 / 7.0; labels.len()];
        let (rows, d) = device.cross_entropy(&case.tensor("logits"), &labels, &seed).expect("cross_entropy");
        mostly_equal("rows", &rows, case.values("rows"), DType::F32, 0.0, 2.0);
        case.check(&d, "d_logits", share(dtype, 0.999), 1.0);
    }
}

fn linear(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "linear", dtype);
        let (x, w, b, dy) = (case.tensor("x"), case.tensor("w"), case.tensor("b"), case.tensor("dy"));
        let compute = Compute::of(dtype);
        case.check(&device.linear(&x, &w, None, compute, dtype).expect("linear"), "y", share(dtype, 0.99), 2.0);
        let y = device.linear(&x, &w, Some(&b), compute, dtype).expect("linear");
        case.check(&y, "y_bias", share(dtype, 0.99), 2.0);
        let dx = device.linear_input_grad(&dy, &w, compute, dtype).expect("linear_input_grad");
        case.check(&dx, "dx", share(dtype, 0.99), 2.0);
        let dw = device.linear_weight_grad(&dy, &x, &[0, 17], compute, dtype).expect("linear_weight_grad");
        assert_eq!(dw.shape, [1, 40, 96]);
        case.check(&dw, "dw", share(dtype, 0.99), 2.0);
    }
}

fn vector_norm(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "vector_norm", dtype);
        let x = case.tensor("x");
        let norms = device.norms(&x, &[0, x.rows()]).expect("norms");
        assert_eq!(norms[0].1, 0);
        mostly_equal("norm", &[norms[0].0], case.values("norm"), DType::F32, 0.0, 4.0);
    }
}

fn adamw(device: &dyn Device) {
    for (name, fused) in [("adamw_loop", false), ("adamw_fused", true)] {
        for dtype in [DType::F32, DType::BF16] {
            let case = Case::new(device, name, dtype);
            let mut p = case.tensor("start");
            let mut m = device.zeros(&[257], dtype).expect("zeros");
            let mut v = device.zeros(&[257], dtype).expect("zeros");
            for (t, g) in case.values("grads").chunks(257).enumerate() {
                let g = device.upload(g, &[257], dtype).expect("upload");
                let with = AdamW {
                    learning_rate: 1e-2,
                    beta1: 0.9,
                    beta2: 0.999,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    step: (t + 1) as f64,
                    fused,
                };
                device.adamw(&mut p, &g, &mut m, &mut v, &with).expect("adamw");
            }
            case.check(&m, "m", 0.9, 1.0);
            case.check(&v, "v", 0.9, 1.0);
            case.check(&p, "p", 0.9, 1.0);
        }
    }
}

fn sgd(device: &dyn Device) {
    for dtype in DTYPES {
        let case = Case::new(device, "sgd", dtype);
        let mut p = case.tensor("start");
        for g in case.values("grads").chunks(257) {
            let g = device.upload(g, &[257], dtype).expect("upload");
            device.sgd(&mut p, &g, 1e-2, 0.1).expect("sgd");
        }
        case.check(&p, "p", 0.9, 1.0);
    }
}
