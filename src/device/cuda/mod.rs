//! The CUDA device: our kernels for everything but matrix products, which are cuBLAS's.
//!
//! Needs no toolkit and no special build: the driver is loaded when a device is opened, kernels are embedded PTX.
//! This file wires the operations to their families. `driver` makes the calls, `memory`, `transfer` and `weights` own the
//! device's memory and what moves there, `kernels` launches, `cublas` multiplies. Kernels' contracts: kernels/*.cu.

mod cublas;
mod decoder;
mod driver;
mod elementwise;
mod fused;
mod kernels;
mod matrix_unit;
mod measure;
mod memory;
mod meter;
mod products;
mod transfer;
mod update;
mod weights;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use measure::Measured;
pub use memory::Buffer;

use super::{
    AdamW, AttentionShape, Compute, DType, Device, Keep, LowRank, Norm, Offsets, PendingNorms, PendingStatistics,
    Statistics, Storage, Tensor, Update, UpdateRule,
};
use crate::{Error, Result};

/// One GPU, opened.
#[derive(Debug)]
pub struct CudaDevice {
    // In order of destruction: users of the context before the context.
    blas: Mutex<cublas::Cublas>,
    kernels: kernels::Kernels,
    weights: Mutex<weights::Weights>,
    staging: Mutex<transfer::Staging>,
    /// What the pass that is under way will be asked to measure.
    expected: Mutex<Option<Arc<meter::Expected>>>,
    memory: Arc<memory::Memory>,
    driver: Arc<driver::Driver>,
}

impl CudaDevice {
    /// Opens GPU `ordinal`.
    ///
    /// # Errors
    /// No driver or one older than 525, no such GPU, compute capability below 7.5, no cuBLAS.
    pub fn open(ordinal: usize) -> Result<Self> {
        let driver = Arc::new(driver::Driver::open(ordinal)?);
        let memory = memory::Memory::new(driver.clone());
        let blas = Mutex::new(cublas::Cublas::open(&memory)?);
        let kernels = kernels::Kernels::load(driver.clone())?;
        let weights = Mutex::new(weights::Weights::new(memory.clone())?);
        let staging = Mutex::new(transfer::Staging::new(driver.clone(), driver.compute));
        Ok(Self { blas, kernels, weights, staging, expected: Mutex::default(), memory, driver })
    }

    /// Waits for all queued work; failures of earlier kernels surface here.
    pub fn synchronize(&self) -> Result<()> {
        self.driver.synchronize(self.driver.compute)
    }

    /// Uninitialised memory for a tensor.
    fn empty(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let bytes = shape.iter().product::<usize>() * dtype.size();
        Ok(Tensor { shape: shape.to_vec(), dtype, storage: Storage::Cuda(self.bytes(bytes)?) })
    }
    fn bytes(&self, bytes: usize) -> Result<Buffer> {
        self.memory.allocate(bytes, || lock(&self.weights).evict())
    }
    /// Host values on the device, as they lie in memory.
    fn put<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Buffer> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = self.bytes(bytes.len())?;
        // SAFETY: the buffer is that long and belongs to this call.
        unsafe { lock(&self.staging).upload(buffer.address(), bytes)? };
        Ok(buffer)
    }
    /// The first `count` values of a buffer, after all queued work.
    fn get<T: bytemuck::Pod>(&self, buffer: &Buffer, count: usize) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); count];
        // SAFETY: callers ask for no more than they allocated.
        unsafe { lock(&self.staging).download(buffer.address(), bytemuck::cast_slice_mut(&mut values))? };
        Ok(values)
    }

    /// Where a tensor's elements lie on the device; weights are brought there.
    fn operand(&self, x: &Tensor) -> Result<Operand> {
        match &x.storage {
            Storage::Cuda(buffer) => {
                Ok(Operand { address: buffer.address(), dtype: x.dtype, _buffer: Some(buffer.clone()), weight: None })
            }
            Storage::Mapped(bytes) => {
                let weight = lock(&self.weights).get(bytes)?;
                Ok(Operand { address: weight.address(), dtype: x.dtype, _buffer: None, weight: Some(weight) })
            }
            Storage::Cpu(_) => Err(Error::internal("a tensor of the CPU reached the GPU")),
        }
    }
    /// The same values in memory of their own.
    ///
    /// # Errors
    /// Out of memory; a tensor of another device.
    pub fn copy(&self, x: &Tensor) -> Result<Tensor> {
        let Storage::Cuda(buffer) = &x.storage else { return self.cast_to(x, x.dtype) };
        let storage = Storage::Cuda(self.duplicate(buffer, x.elements() * x.dtype.size())?);
        Ok(Tensor { shape: x.shape.clone(), dtype: x.dtype, storage })
    }
    fn duplicate(&self, buffer: &Buffer, bytes: usize) -> Result<Buffer> {
        let copy = self.bytes(bytes)?;
        // SAFETY: both buffers hold `bytes` bytes and are distinct.
        unsafe { self.driver.copy_on_device(copy.address(), buffer.address(), bytes)? };
        Ok(copy)
    }
    /// A tensor's own memory for changes in place: copied first if someone else holds it too.
    fn exclusive(&self, x: &mut Tensor) -> Result<u64> {
        let bytes = x.elements() * x.dtype.size();
        let Storage::Cuda(buffer) = &mut x.storage else {
            return Err(Error::internal("only a tensor that this device made can be changed in place"));
        };
        if !buffer.is_unique() {
            *buffer = self.duplicate(buffer, bytes)?;
        }
        buffer.set_stash(None);
        Ok(buffer.address())
    }
}

/// A mutex whose holder panicked guards plain handles here, which stay valid.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A tensor's place on the device, kept alive until the kernels that read it are queued.
#[derive(Debug)]
struct Operand {
    address: u64,
    dtype: DType,
    _buffer: Option<Buffer>,
    weight: Option<weights::Weight>,
}

impl Drop for Operand {
    fn drop(&mut self) {
        if let Some(weight) = &self.weight {
            // A lost event means a lost context: the next call says so.
            let _ = weight.used();
        }
    }
}

/// Shape promises between the model and the device; a broken one is our own bug, and named.
fn expect(holds: bool, operation: &str, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::internal(format!("{operation}: {}", what()))) }
}

/// Checks the boundaries of units of rows.
fn expect_offsets(offsets: &[usize], rows: usize, operation: &str) -> Result<()> {
    let ordered = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    expect(offsets.first() == Some(&0) && offsets.last() == Some(&rows) && ordered, operation, || {
        format!("boundaries {offsets:?} do not cover {rows} rows")
    })
}

/// As the kernels' u32 fields take it.
fn narrow(x: usize, what: &str) -> Result<u32> {
    u32::try_from(x).map_err(|_| Error::device(format!("{what} {x} does not fit 32 bits")))
}

impl Device for CudaDevice {
    fn name(&self) -> String {
        format!("cuda:{}", self.driver.ordinal)
    }
    fn fingerprint(&self) -> String {
        let d = &self.driver;
        let blas = lock(&self.blas);
        format!(
            "{} sm_{}{} cuda {} cublas {}{}",
            d.name,
            d.capability.0,
            d.capability.1,
            d.version,
            blas.version,
            if blas.reduced_precision { "" } else { " full-precision reductions" }
        )
    }

    fn upload(&self, values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.upload_values(values, shape, dtype)
    }
    fn download(&self, x: &Tensor) -> Result<Vec<f32>> {
        self.download_values(x)
    }
    fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.zeros_of(shape, dtype)
    }
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        self.cast_to(x, dtype)
    }
    fn gather_rows(&self, x: &Tensor, index: &[u32]) -> Result<Tensor> {
        self.gather(x, index, x.dtype)
    }
    fn scatter_rows(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
        self.scatter(x, index, rows)
    }

    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, compute: Compute, out: DType) -> Result<Tensor> {
        self.product(x, w, bias, compute, out)
    }
    fn linear_input_grad(&self, dy: &Tensor, w: &Tensor, compute: Compute, out: DType) -> Result<Tensor> {
        self.product_input_grad(dy, w, compute, out)
    }
    fn linear_weight_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: Offsets<'_>,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        self.product_weight_grad(dy, x, units, compute, out)
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
        self.adapted(x, w, bias, compute, out, branch, scaling)
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
        self.input_grad_onto(so_far, branch, dy, w, compute, out, dtype)
    }

    fn add(&self, a: &Tensor, b: &Tensor, out: DType) -> Result<Tensor> {
        self.sum(a, b, out)
    }
    fn scale(&self, x: &Tensor, s: f32, out: DType) -> Result<Tensor> {
        self.scaled(x, s, out)
    }
    fn perturb(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor> {
        self.perturbed(x, seed, stream, ulp_of)
    }
    fn dropout(&self, x: &Tensor, p: f64, keep: Keep<'_>) -> Result<Tensor> {
        self.dropped(x, p, keep)
    }

    fn embedding(&self, table: &Tensor, ids: &[u32], out: DType) -> Result<Tensor> {
        self.gather(table, ids, out)
    }
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32, out: DType) -> Result<(Tensor, Tensor)> {
        self.norm(x, w, eps, out)
    }
    fn rms_norm_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Tensor,
        r: &Tensor,
        so_far: Option<&Tensor>,
    ) -> Result<Tensor> {
        self.norm_grad(dy, (x, w, r), so_far)
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
        self.rotate(x, positions, (cos, sin), heads, inverse, out)
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
        self.attend((q, k, v), rows, shape, compute)
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
        self.attend_grad((d_o, o, lse), (q, k, v), rows, shape, compute)
    }
    fn gate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        self.gated(gate, up)
    }
    fn gate_grad(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
        self.gated_grad(d_out, gate, up)
    }
    fn cross_entropy(&self, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        self.loss(logits, labels, seed)
    }
    fn cross_entropy_owned(&self, logits: Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        self.loss_owned(logits, labels, seed)
    }

    fn accumulate(&self, acc: &mut Tensor, g: &Tensor) -> Result<()> {
        self.add_to(acc, g)
    }
    fn accumulate_units(&self, acc: &mut Tensor, units: &Tensor) -> Result<()> {
        self.add_units_to(acc, units)
    }
    fn scale_in_place(&self, x: &mut Tensor, s: f32) -> Result<()> {
        self.scale_by(x, s)
    }
    fn adamw(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, with: &AdamW) -> Result<()> {
        let rule = UpdateRule::AdamW { m, v, with: *with };
        self.update_all(&mut [Update { p, g, rule }], [1.0; 2]).map(drop)
    }
    fn sgd(&self, p: &mut Tensor, g: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()> {
        let rule = UpdateRule::Sgd { learning_rate, weight_decay };
        self.update_all(&mut [Update { p, g, rule }], [1.0; 2]).map(drop)
    }
    fn update(&self, tensors: &mut [Update<'_>], factors: [f32; 2]) -> Result<f64> {
        self.update_all(tensors, factors)
    }

    fn statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<Vec<Statistics>> {
        self.statistics_measured(&self.queue_measure(x, units, target)?)
    }
    fn queue_statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<PendingStatistics> {
        Ok(PendingStatistics::Cuda(self.queue_measure(x, units, target)?))
    }
    fn finish_statistics(&self, pending: PendingStatistics) -> Result<Vec<Statistics>> {
        match pending {
            PendingStatistics::Ready(statistics) => Ok(statistics),
            PendingStatistics::Cuda(measured) => self.statistics_measured(&measured),
        }
    }
    fn expect_statistics(&self, of: Option<(Offsets<'_>, Option<DType>)>) {
        self.expect(of);
    }
    fn norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<Vec<Norm>> {
        self.finish_norms(self.queue_norms(x, units)?)
    }
    fn queue_norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<PendingNorms> {
        Ok(PendingNorms::Cuda(self.queue(&[(x, units)], measure::How::Norm(1.0))?))
    }
    fn finish_norms(&self, pending: PendingNorms) -> Result<Vec<Norm>> {
        match pending {
            PendingNorms::Ready(norms) => Ok(norms),
            PendingNorms::Cuda(measured) => self.norms_measured(&measured),
        }
    }
    fn norms_of(&self, tensors: &[Tensor], factor: f32) -> Result<Vec<Norm>> {
        self.norms_of_all(tensors, factor)
    }
    fn matrix_unit(&self, x: &Tensor, w: &Tensor, compute: Compute) -> Result<Option<Tensor>> {
        self.mma(x, w, compute)
    }
}
