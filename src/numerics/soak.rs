//! A health check of a device: the same products again and again, against themselves and against their checksums,
//! until the time is up. Every round is one JSON line; a fault is a line of its own the moment it is seen.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::Checksums;
use crate::device::hooked::{Hook, Hooked};
use crate::device::{Compute, DType, Device, Tensor, noise};
use crate::{Result, interrupt};

/// (n, in, out) of a small model's linears: odd sizes too, so that every tail of a kernel runs.
const SHAPES: [(usize, usize, usize); 4] = [(128, 576, 1536), (91, 1536, 576), (33, 320, 192), (7, 65, 129)];

/// What a soak found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Soak {
    pub rounds: u64,
    pub products: u64,
    /// Results that differed from the first of the same product.
    pub unrepeated: u64,
    /// Products whose checksums disagree.
    pub wrong: u64,
}

impl Soak {
    pub fn healthy(&self) -> bool {
        self.rounds > 0 && self.unrepeated == 0 && self.wrong == 0
    }
}

struct Work {
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    compute: Compute,
    first: Option<Vec<Vec<u32>>>,
}

/// Multiplies for `time`; `told` gets each line. At least one round; Ctrl-C ends it early with what was found.
///
/// # Errors
/// Those of the device or of `told`.
pub fn soak(device: Arc<dyn Device>, time: Duration, told: &mut dyn FnMut(&Value) -> Result<()>) -> Result<Soak> {
    let mut works = Vec::new();
    for (i, (n, k, m)) in SHAPES.into_iter().enumerate() {
        for (compute, dtype) in [(Compute::F32, DType::F32), (Compute::Bf16, DType::BF16), (Compute::F16, DType::F16)] {
            let random = |stream: u64, rows: usize, columns: usize| {
                let stream = stream + 10 * i as u64;
                let values: Vec<f32> = (0..(rows * columns) as u64).map(|e| noise::symmetric(1, stream, e)).collect();
                device.upload(&values, &[rows, columns], dtype)
            };
            let (x, w, dy) = (random(0, n, k)?, random(1, m, k)?, random(2, n, m)?);
            works.push(Work { x, w, dy, compute, first: None });
        }
    }
    let (began, mut found) = (Instant::now(), Soak::default());
    loop {
        let checksums = Arc::new(Checksums::on(Arc::clone(&device)));
        let checked = Hooked { inner: Arc::clone(&device), hook: Arc::clone(&checksums) as Arc<dyn Hook> };
        for work in &mut works {
            let bits = products(&checked, work)?;
            match &work.first {
                None => work.first = Some(bits),
                Some(first) if *first != bits => {
                    found.unrepeated += 1;
                    let (n, k, m) = (work.x.rows(), work.x.columns(), work.w.rows());
                    let shape = json!([n, k, m]);
                    told(&json!({"event": "unrepeated", "round": found.rounds, "shape": shape,
                        "compute": format!("{:?}", work.compute)}))?;
                }
                Some(_) => {}
            }
        }
        let (products, violations) = checksums.found()?;
        found.products += products;
        found.wrong += violations.len() as u64;
        for violation in &violations {
            told(&json!({"event": "checksum", "round": found.rounds, "violation": violation}))?;
        }
        found.rounds += 1;
        let seconds = began.elapsed().as_secs_f64();
        told(&json!({"event": "round", "round": found.rounds, "seconds": seconds, "products": found.products,
            "unrepeated": found.unrepeated, "wrong": found.wrong}))?;
        if began.elapsed() >= time || interrupt::check().is_err() {
            return Ok(found);
        }
    }
}

/// Bits of the three products that a linear takes part in.
fn products(device: &dyn Device, work: &Work) -> Result<Vec<Vec<u32>>> {
    let (x, w, dy, compute) = (&work.x, &work.w, &work.dy, work.compute);
    let units = [0, x.rows() / 2, x.rows()];
    let results = [
        device.linear(x, w, None, compute, DType::F32)?,
        device.linear_input_grad(dy, w, compute, DType::F32)?,
        device.linear_weight_grad(dy, x, &units, compute, DType::F32)?,
    ];
    results.iter().map(|y| Ok(device.download(y)?.into_iter().map(f32::to_bits).collect())).collect()
}
