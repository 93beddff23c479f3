//! Optimizer updates: all tensors of a step in one launch of optimizer.cu (two, if both rules occur).

use bytemuck::{Pod, Zeroable};

use super::kernels::tag;
use super::{CudaDevice, expect, narrow};
use crate::Result;
use crate::device::{AdamW, DType, Update, UpdateRule};

/// Elements a run, one block's work: 16 a thread, so that a small adapter still fills the card.
const RUN: usize = 256 * 16;

/// `struct Change` of optimizer.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Change {
    p: u64,
    m: u64,
    v: u64,
    g: u64,
    count: u32,
    tag: i32,
    g_tag: i32,
    each: i32,
    decay: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    root_correction2: f32,
    epsilon: f32,
    minus_step_size: f32,
    unused: f32,
}

impl CudaDevice {
    pub(super) fn update_all(&self, tensors: &mut [Update<'_>], factors: [f32; 2]) -> Result<f64> {
        let mut squares = 0.0;
        for kernel in ["adamw", "sgd"] {
            let (mut runs, mut held) = (Vec::new(), Vec::new());
            for tensor in tensors.iter_mut().filter(|t| kernel == kernel_of(&t.rule)) {
                let gradient = self.operand(tensor.g)?;
                let whole = self.change(tensor, gradient.address)?;
                cut(&whole, tensor, &mut runs)?;
                held.push(gradient);
            }
            squares += self.launch_update(kernel, &runs, factors)?;
        }
        Ok(squares.sqrt())
    }

    /// The run that would cover the whole tensor: addresses, dtypes and scalars.
    fn change(&self, tensor: &mut Update<'_>, g: u64) -> Result<Change> {
        let (n, dtype, g_dtype) = (tensor.p.elements(), tensor.p.dtype, tensor.g.dtype);
        expect(tensor.g.elements() == n, "update", || format!("p {:?}, g {:?}", tensor.p.shape, tensor.g.shape))?;
        let p = self.exclusive(tensor.p)?;
        let mut change = Change { p, g, tag: tag(dtype), g_tag: tag(g_dtype), each: tag(dtype), ..Change::zeroed() };
        match &mut tensor.rule {
            UpdateRule::AdamW { m, v, with } => {
                let same = m.elements() == n && v.elements() == n && m.dtype == dtype && v.dtype == dtype;
                expect(same, "adamw", || {
                    format!("p {n} {dtype:?}, m {:?} {:?}, v {:?} {:?}", m.shape, m.dtype, v.shape, v.dtype)
                })?;
                (change.m, change.v) = (self.exclusive(m)?, self.exclusive(v)?);
                change.set(with);
            }
            UpdateRule::Sgd { learning_rate, weight_decay } => {
                // aten converts add's alpha to the tensors' dtype before the kernel widens it again.
                let scalar = |x: f64| match dtype {
                    DType::F32 => x as f32,
                    DType::BF16 => half::bf16::from_f32(x as f32).to_f32(),
                    DType::F16 => half::f16::from_f32(x as f32).to_f32(),
                };
                (change.minus_step_size, change.decay) = (scalar(-*learning_rate), scalar(*weight_decay));
            }
        }
        Ok(change)
    }

    /// Σ (Δp)² of all runs.
    fn launch_update(&self, kernel: &str, runs: &[Change], factors: [f32; 2]) -> Result<f64> {
        if runs.is_empty() {
            return Ok(0.0);
        }
        let (table, moved) = (self.put(runs)?, self.bytes(runs.len() * size_of::<f64>())?);
        let launch = self.kernels.launch(kernel).buffer(&moved).buffer(&table).value(factors[0]).value(factors[1]);
        // SAFETY: optimizer.cu; runs lie inside tensors that hold the same number of elements each, p, m and v are
        // exclusively ours, one block a run.
        unsafe { launch.run((narrow(runs.len(), "run count")?, 1), 256)? };
        Ok(self.get::<f64>(&moved, runs.len())?.iter().sum())
    }
}

fn kernel_of(rule: &UpdateRule<'_>) -> &'static str {
    match rule {
        UpdateRule::AdamW { .. } => "adamw",
        UpdateRule::Sgd { .. } => "sgd",
    }
}

/// `whole` as runs of at most [`RUN`] elements.
fn cut(whole: &Change, tensor: &Update<'_>, runs: &mut Vec<Change>) -> Result<()> {
    let (n, size, g_size) = (tensor.p.elements(), tensor.p.dtype.size(), tensor.g.dtype.size());
    for begin in (0..n).step_by(RUN) {
        let at = |address: u64, size: usize| if address == 0 { 0 } else { address + (begin * size) as u64 };
        runs.push(Change {
            p: at(whole.p, size),
            m: at(whole.m, size),
            v: at(whole.v, size),
            g: at(whole.g, g_size),
            count: narrow(RUN.min(n - begin), "run length")?,
            ..*whole
        });
    }
    Ok(())
}

impl Change {
    /// The scalars of one AdamW update, in f64 as Python computes them, then rounded to f32.
    fn set(&mut self, with: &AdamW) {
        let correction1 = 1.0 - with.beta1.powf(with.step);
        let correction2 = 1.0 - with.beta2.powf(with.step);
        self.decay = (1.0 - with.learning_rate * with.weight_decay) as f32;
        self.one_minus_beta1 = (1.0 - with.beta1) as f32;
        self.beta2 = with.beta2 as f32;
        self.one_minus_beta2 = (1.0 - with.beta2) as f32;
        self.root_correction2 = correction2.sqrt() as f32;
        self.epsilon = with.epsilon as f32;
        self.minus_step_size = -(with.learning_rate / correction1) as f32;
        if with.fused {
            self.each = tag(DType::F32);
        }
    }
}
