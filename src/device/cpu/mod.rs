//! The CPU device: half tensors are f32 buffers that hold rounded values; frozen weights may stay in their files.
//!
//! This file wires the operations to their families, one file each. `simd` picks the instruction set at run time,
//! `threads` cuts the work, `rounding` and `math` are the arithmetic that everything shares.

mod attention;
mod buffer;
mod checks;
mod classes;
mod elementwise;
mod gemm;
mod loss;
mod mapped;
mod math;
mod measure;
#[cfg(target_arch = "x86_64")]
mod measure_avx512;
#[cfg(target_arch = "x86_64")]
mod measure_bf16;
mod meter;
mod norm;
mod optimizer;
mod root;
mod rope;
mod rounding;
mod simd;
mod statistics;
#[cfg(target_arch = "x86_64")]
mod sums_avx512;
mod threads;
mod values;

pub use buffer::Buffer;
pub use mapped::MappedBytes;
pub use math::VectorNorm;
pub(crate) use simd::vectorised;

use super::checks::{Expect, ProductSums, Sums, Weights};
use super::{AdamW, AttentionShape, Compute, DType, Device, Keep, LowRank, Offsets, Statistics, Storage, Tensor};
use crate::Result;
use values::{expect, tensor, values as values_of};

/// The processor and its worker threads.
pub struct CpuDevice {
    workers: threads::Workers,
    expected: meter::Expectations,
}

impl CpuDevice {
    /// A device of `threads` threads, or one per available processor.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let available = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let workers = threads::Workers::new(threads.unwrap_or_else(available))?;
        Ok(Self { workers, expected: meter::Expectations::default() })
    }
}

impl Device for CpuDevice {
    fn name(&self) -> String {
        "cpu".to_string()
    }
    /// Products and sums of squares of bf16 differ between AVX512-BF16 and the rest (subnormals, rounding of pairs); all
    /// else gives the same bits at every level.
    fn fingerprint(&self) -> String {
        format!("cpu {} {}", std::env::consts::ARCH, simd::level().name())
    }

    fn upload(&self, values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
        expect(values.len() == shape.iter().product::<usize>(), "upload", || {
            format!("{} values for shape {shape:?}", values.len())
        })?;
        let mut values = Buffer::copied(values);
        rounding::round_slice(&mut values, dtype);
        Ok(tensor(values, shape.to_vec(), dtype))
    }
    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        Ok(values_of(x)?.into_owned())
    }
    fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(tensor(Buffer::zeros(shape.iter().product()), shape.to_vec(), dtype))
    }
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        self.cast_impl(x, dtype)
    }
    fn gather_rows(&self, x: &Tensor, index: &[u32]) -> Result<Tensor> {
        self.gather_impl(x, index, x.dtype)
    }
    fn scatter_rows(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
        self.scatter_impl(x, index, rows)
    }

    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, compute: Compute, out: DType) -> Result<Tensor> {
        self.linear_impl(x, w, bias, (compute, out), None)
    }
    fn linear_input_grad(&self, dy: &Tensor, w: &Tensor, compute: Compute, out: DType) -> Result<Tensor> {
        self.linear_input_grad_impl(dy, w, (compute, out), None)
    }
    fn linear_adapted(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        compute: Compute,
        out: DType,
        branch: &LowRank<'_>,
        scaling: f32,
    ) -> Result<Tensor> {
        self.linear_impl(x, w, bias, (compute, out), Some((branch, scaling)))
    }
    fn linear_input_grad_onto(
        &self,
        so_far: Option<Tensor>,
        branch: Option<&LowRank<'_>>,
        dy: &Tensor,
        w: &Tensor,
        compute: Compute,
        out: DType,
        dtype: DType,
    ) -> Result<Tensor> {
        self.linear_input_grad_impl(dy, w, (compute, out), Some((so_far.as_ref(), branch, dtype)))
    }
    fn linear_weight_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: Offsets<'_>,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        self.linear_weight_grad_impl(dy, x, units, compute, out)
    }

    fn add(&self, a: &Tensor, b: &Tensor, out: DType) -> Result<Tensor> {
        self.add_impl(a, b, out)
    }
    fn scale(&self, x: &Tensor, s: f32, out: DType) -> Result<Tensor> {
        self.scale_impl(x, s, out)
    }
    fn perturb(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor> {
        self.perturb_impl(x, seed, stream, ulp_of)
    }
    fn dropout(&self, x: &Tensor, p: f64, keep: Keep<'_>) -> Result<Tensor> {
        self.dropout_impl(x, p, keep)
    }

    fn embedding(&self, table: &Tensor, ids: &[u32], out: DType) -> Result<Tensor> {
        self.gather_impl(table, ids, out)
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32, out: DType) -> Result<(Tensor, Tensor)> {
        self.rms_norm_impl(x, w, eps, out)
    }
    fn rms_norm_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        r: &Tensor,
        so_far: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.rms_norm_grad_impl(dy, (x, w, r), so_far)
    }
    fn rope(
        &self,
        x: &Tensor,
        positions: &[u32],
        cos: &Tensor,
        sin: &Tensor,
        heads: usize,
        inverse: bool,
        out: DType,
    ) -> Result<Tensor> {
        self.rope_impl(x, &rope::Rotation { positions, cos, sin, heads, inverse }, out)
    }
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        rows: Offsets<'_>,
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor)> {
        self.attention_impl((q, k, v), rows, shape, compute)
    }
    fn attention_grad(
        &self,
        d_o: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        o: &Tensor,
        lse: &Tensor,
        rows: Offsets<'_>,
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        self.attention_grad_impl((d_o, o, lse), (q, k, v), rows, shape, compute)
    }
    fn gate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.gate_impl(gate, up)
    }
    fn gate_grad(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
        self.gate_grad_impl(d_out, gate, up)
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        self.cross_entropy_impl(logits.clone(), labels, seed)
    }
    fn cross_entropy_owned(&self, logits: Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        self.cross_entropy_impl(logits, labels, seed)
    }

    fn accumulate(&self, acc: &mut Tensor, g: &Tensor) -> Result<()> {
        self.accumulate_impl(acc, g)
    }
    fn accumulate_units(&self, acc: &mut Tensor, units: &Tensor) -> Result<()> {
        self.accumulate_units_impl(acc, units)
    }
    fn scale_in_place(&self, x: &mut Tensor, s: f32) -> Result<()> {
        self.scale_in_place_impl(x, s)
    }
    fn adamw(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, with: &AdamW) -> Result<()> {
        self.adamw_impl(p, g, m, v, with)
    }
    fn sgd(&self, p: &mut Tensor, g: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()> {
        self.sgd_impl(p, g, learning_rate, weight_decay)
    }

    fn statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<Vec<Statistics>> {
        self.statistics_impl(x, units, target)
    }
    fn expect_statistics(&self, of: Option<(Offsets<'_>, Option<DType>)>) {
        self.expected.set(of);
    }
    fn pause_statistics(&self, pause: bool) {
        self.expected.pause(pause);
    }
    fn norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<Vec<(f32, u64)>> {
        self.norms_impl(x, units)
    }
    fn row_checks(&self, x: &Tensor, weights: &[Weights<'_>]) -> Result<Vec<Sums>> {
        self.row_checks_impl(x, weights)
    }
    fn column_checks(&self, x: &Tensor, units: Offsets<'_>) -> Result<Sums> {
        self.column_checks_impl(x, units)
    }
    fn expect_sums(&self, of: Option<Expect>) {
        checks::expect(of);
    }
    fn product_sums<'t>(&self, y: &'t Tensor) -> Option<&'t ProductSums> {
        match &y.storage {
            Storage::Cpu(buffer) => buffer.product_sums(),
            _ => None,
        }
    }
}
