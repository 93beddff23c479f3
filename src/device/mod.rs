//! Dtype-tagged tensors and the operations a replay needs, on the CPU and on CUDA.
//!
//! The model is written once against [`Device`]. Each operation computes in f32 (accumulators included, unless it
//! says otherwise) and rounds once, to nearest even, to the dtype of its output: one PyTorch op, one rounding.
//! Everything is deterministic: fixed reduction orders, no float atomics, the same bits at any thread count, and
//! a row's result does not depend on the rows beside it.
//!
//! All unsafe code of the crate lives below this folder.

pub mod checks;
pub mod cpu;
pub mod cuda;
pub mod hooked;
mod keep;
pub mod noise;
pub mod nvml;
mod parts;

use std::sync::Arc;

pub use keep::Keep;

use crate::Result;

/// Storage type of a tensor element.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    BF16,
    F16,
}

impl DType {
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::BF16 | DType::F16 => 2,
        }
    }
    pub fn is_half(self) -> bool {
        self != DType::F32
    }
}

/// Arithmetic of a matrix product: what the operands are rounded to before it. Accumulation is f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compute {
    F32,
    /// f32 operands rounded to 10 mantissa bits.
    Tf32,
    Bf16,
    F16,
}

impl Compute {
    pub fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Compute::F32,
            DType::BF16 => Compute::Bf16,
            DType::F16 => Compute::F16,
        }
    }
}

/// Row-major tensor on a device. Cheap to clone; immutable once made, except through `&mut` operations of the
/// device that own it uniquely.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub dtype: DType,
    pub storage: Storage,
}

/// Where the elements live.
#[derive(Debug, Clone)]
pub enum Storage {
    /// f32 buffer whose values are exactly representable in the tensor's dtype.
    Cpu(Arc<cpu::Buffer>),
    /// Bytes of a safetensors file in the tensor's dtype, little-endian, unaligned: a frozen weight.
    Mapped(cpu::MappedBytes),
    /// Memory of a GPU, in the tensor's dtype.
    Cuda(cuda::Buffer),
}

impl Storage {
    /// The same for two tensors that share their memory.
    pub fn identity(&self) -> usize {
        match self {
            Storage::Cpu(buffer) => Arc::as_ptr(buffer) as usize,
            Storage::Mapped(bytes) => bytes.map.as_ptr() as usize + bytes.offset,
            Storage::Cuda(buffer) => buffer.address() as usize,
        }
    }
}

impl Tensor {
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
    /// All dimensions but the last, multiplied.
    pub fn rows(&self) -> usize {
        self.elements() / self.columns().max(1)
    }
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
}

/// Contiguous rows of one unit (a sequence, or a micro-batch): `offsets[i]..offsets[i + 1]`, offsets[0] == 0.
pub type Offsets<'a> = &'a [usize];

/// Measurements of one tensor (design section 6; probes of issue "every probe"). Counts are exact; sums are
/// compensated or f64.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Statistics {
    pub elements: u64,
    pub nan: u64,
    pub pos_inf: u64,
    pub neg_inf: u64,
    pub zero: u64,
    /// Non-zero magnitudes below the target dtype's smallest normal.
    pub subnormal: u64,
    /// Non-zero magnitudes that the target dtype rounds to zero.
    pub underflow: u64,
    /// Finite magnitudes that the target dtype rounds to infinity.
    pub overflow: u64,
    /// Over finite elements.
    pub max_abs: f32,
    /// Smallest non-zero magnitude, 0 if none.
    pub min_abs: f32,
    /// Σx² over finite elements. Eight neighbours may be added in f32 (bf16 on a CPU: sixteen): off by at most 4.8e-7
    /// (9.6e-7) of it.
    pub sum_squares: f64,
}

/// What AdamW needs besides the tensors (contract 6.2). `learning_rate` and powers in f64, like PyTorch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    pub learning_rate: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub epsilon: f64,
    pub weight_decay: f64,
    /// t: count of this tensor's updates, this one included.
    pub step: f64,
    /// PyTorch's fused kernel (`adamw_torch_fused`): on half tensors it rounds once per tensor and update; the loop
    /// of separate operations (false) rounds after each. In f32 they differ on the CPU: the loop's root is MKL's.
    pub fused: bool,
}

/// One tensor of [`Device::update`], changed in place.
#[derive(Debug)]
pub struct Update<'a> {
    pub p: &'a mut Tensor,
    pub g: &'a Tensor,
    pub rule: UpdateRule<'a>,
}

/// How [`Update`] moves its tensor.
#[derive(Debug)]
pub enum UpdateRule<'a> {
    AdamW { m: &'a mut Tensor, v: &'a mut Tensor, with: AdamW },
    Sgd { learning_rate: f64, weight_decay: f64 },
}

/// What [`Device::norms`] gives of one unit: ‖x‖₂ as torch.linalg.vector_norm has it (f32), non-finite elements.
pub type Norm = (f32, u64);

/// Norms that may still be under way on the device; [`Device::finish_norms`] waits for them.
#[derive(Debug)]
pub enum PendingNorms {
    Ready(Vec<Norm>),
    Cuda(cuda::Measured),
}

/// Statistics that may still be under way on the device; [`Device::finish_statistics`] waits for them.
#[derive(Debug)]
pub enum PendingStatistics {
    Ready(Vec<Statistics>),
    Cuda(cuda::Measured),
}

/// The attention geometry of one call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// 1/√head_dim.
    pub scale: f32,
    /// Keys older than this are masked (mistral's sliding_window).
    pub window: Option<usize>,
    /// The length that the trainer's batch pads each sequence to; empty: no padding. PyTorch's CPU kernel computes
    /// the last keys of the padded length by other means, which rounding to half makes visible.
    pub padded: &'a [usize],
    /// Per sequence, whether the trainer does not repeat keys and values per query head (`enable_gqa`): the query heads of
    /// a group then add to their gradients one after another; empty: nowhere.
    pub grouped: &'a [bool],
}

/// A low-rank product x [n, r] · w that is added to a frozen linear's result: x · w [out, r]ᵀ forward, x · w [r, in]
/// backward.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    pub x: &'a Tensor,
    pub w: &'a Tensor,
    pub compute: Compute,
    /// What the product is rounded to.
    pub dtype: DType,
}

/// The operations of a replay. n: tokens of all rows of the pass, concatenated without padding.
pub trait Device: Send + Sync {
    /// `cpu` or `cuda:N`, for people.
    fn name(&self) -> String;
    /// What results depend on besides the inputs: processor, SIMD level or GPU and driver, library versions.
    fn fingerprint(&self) -> String;

    // ---- data movement
    /// Copies f32 values to the device, rounding to `dtype`.
    fn upload(&self, values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor>;
    /// Elements as f32, exactly.
    fn download(&self, x: &Tensor) -> Result<Vec<f32>>;
    fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor>;
    /// x rounded (or widened) to `dtype`.
    fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor>;
    /// Rows `index[i]` of x [n, c] → [index.len(), c].
    fn gather_rows(&self, x: &Tensor, index: &[u32]) -> Result<Tensor>;
    /// Inverse of gather: zeros [rows, c] with row `index[i]` = x[i]. Indices are distinct.
    fn scatter_rows(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor>;

    // ---- products
    /// y [n, out] = x [n, in] · w [out, in]ᵀ (+ bias [out]), operands rounded to `compute`, y to `out`.
    /// With a bias the sum is rounded once (addmm).
    fn linear(&self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>, compute: Compute, out: DType) -> Result<Tensor>;
    /// dx [n, in] = dy [n, out] · w [out, in].
    fn linear_input_grad(&self, dy: &Tensor, w: &Tensor, compute: Compute, out: DType) -> Result<Tensor>;
    /// Per unit u of `units`: dw_u [out, in] = dy[u]ᵀ · x[u]. Returns [units, out, in] in `out`.
    fn linear_weight_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: Offsets<'_>,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor>;

    /// y = [`Device::linear`], then y + scaling · branch, rounded to `out`; the branch's product and its scaling each
    /// round to its dtype (PEFT's lora.Linear.forward).
    #[allow(clippy::too_many_arguments)]
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
        parts::linear_adapted(self, (x, w, bias), (compute, out), branch, scaling)
    }
    /// The gradient of an input that several products share, in `dtype`: `so_far`, then the branch's product, then
    /// [`Device::linear_input_grad`] rounded to `out`, each cast to `dtype` and rounded again as it is added
    /// (autograd accumulates one after another).
    #[allow(clippy::too_many_arguments)]
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
        parts::input_grad_onto(self, so_far, branch, (dy, w), (compute, out, dtype))
    }

    // ---- elementwise; every result rounded once to `out`
    /// a + b.
    fn add(&self, a: &Tensor, b: &Tensor, out: DType) -> Result<Tensor>;
    /// x · s.
    fn scale(&self, x: &Tensor, s: f32, out: DType) -> Result<Tensor>;
    /// x · (1 + ½ ulp(`ulp_of`) · u), u = [`noise::symmetric`] of (seed, stream, element), rounded to x's dtype.
    fn perturb(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor>;
    /// x · noise, rounded to x's dtype; noise = 1 / (1 − p), itself of x's dtype, where `keep` says so, else 0
    /// (ATen/native/Dropout.cpp, `_dropout`). Also its own backward.
    fn dropout(&self, x: &Tensor, p: f64, keep: Keep<'_>) -> Result<Tensor>;

    // ---- the decoder's own
    /// table [vocab, h] rows at ids → [n, h] in `out`.
    fn embedding(&self, table: &Tensor, ids: &[u32], out: DType) -> Result<Tensor>;
    /// HF RMSNorm on the last dimension (w.len() columns; more rows than n for per-head norms):
    /// r = 1/√(mean(x²) + eps) in f32; y = w · round(x·r, x.dtype), rounded to `out`. Returns (y, r [rows] f32).
    fn rms_norm(&self, x: &Tensor, w: &Tensor, eps: f32, out: DType) -> Result<(Tensor, Tensor)>;
    /// Gradient of the above w.r.t. x, w frozen: g = round(dy·w, x.dtype); dx = g·r − (½·Σ(g·x)·r³/n)·2x, rounded to
    /// x.dtype. Added to `so_far`, the gradient that has reached x by other ways (x.dtype), if there is one: halves as a
    /// whole, rounded; in f32 the two terms in turn, as autograd does where HF's cast to f32 is no operation of its own.
    fn rms_norm_grad(&self, dy: &Tensor, x: &Tensor, w: &Tensor, r: &Tensor, so_far: Option<&Tensor>)
    -> Result<Tensor>;
    /// Rotary embedding, half-split. x [n, heads · head_dim]; cos, sin [max_position, head_dim / 2], already in the
    /// dtype HF casts them to. y = round(round(x·cos, out) + round(rot(x)·sin, out), out). `inverse` rotates back
    /// (the gradient).
    #[allow(clippy::too_many_arguments)]
    fn rope(
        &self,
        x: &Tensor,
        positions: &[u32],
        cos: &Tensor,
        sin: &Tensor,
        heads: usize,
        inverse: bool,
        out: DType,
    ) -> Result<Tensor>;
    /// Causal attention per sequence of `rows`. q [n, heads·hd], k, v [n, kv_heads·hd] → (o like q in `compute`'s
    /// dtype, log-sum-exp [n, heads] f32). Scores and softmax in f32; for half compute the unnormalised
    /// probabilities are rounded before they meet v (PyTorch's flash kernels).
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        rows: Offsets<'_>,
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor)>;
    /// (dq, dk, dv), probabilities recomputed from the log-sum-exp, in the dtypes of q, k, v.
    #[allow(clippy::too_many_arguments)]
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
    ) -> Result<(Tensor, Tensor, Tensor)>;
    /// act = round(silu(gate)); returns round(act · up), both in gate's dtype.
    fn gate(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor>;
    /// (d_gate, d_up) for `gate`; each PyTorch op of it rounds once.
    fn gate_grad(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)>;
    /// Cross-entropy of logits [m, vocab] (widened to f32) against labels: per-row loss [m] as f32 values, and
    /// d_logits = (softmax − one-hot) · seed[row], in logits' dtype.
    fn cross_entropy(&self, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)>;
    /// The same with logits that are not needed any more, whose memory the gradient may take.
    fn cross_entropy_owned(&self, logits: Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        self.cross_entropy(&logits, labels, seed)
    }

    // ---- optimizer (masters and state in their own dtype)
    /// acc += g, rounded to acc's dtype.
    fn accumulate(&self, acc: &mut Tensor, g: &Tensor) -> Result<()>;
    /// acc += each of units [units, …] in turn, rounded to acc's dtype after each.
    fn accumulate_units(&self, acc: &mut Tensor, units: &Tensor) -> Result<()> {
        parts::accumulate_units(self, acc, units)
    }
    /// x *= s in place.
    fn scale_in_place(&self, x: &mut Tensor, s: f32) -> Result<()>;
    /// One AdamW update (contract 6.2), in place.
    fn adamw(&self, p: &mut Tensor, g: &Tensor, m: &mut Tensor, v: &mut Tensor, with: &AdamW) -> Result<()>;
    /// p -= lr · (g + weight_decay · p), in place.
    fn sgd(&self, p: &mut Tensor, g: &Tensor, learning_rate: f64, weight_decay: f64) -> Result<()>;
    /// One optimizer update of many tensors. Each gradient is multiplied by each of `factors` first (loss scale taken
    /// out, clipping), rounded to its dtype each time; a factor of 1 changes nothing. The gradients themselves stay as
    /// they are. Returns ‖Δp‖₂ over all tensors.
    fn update(&self, tensors: &mut [Update<'_>], factors: [f32; 2]) -> Result<f64> {
        parts::update(self, tensors, factors)
    }

    // ---- measuring
    /// Statistics against the range of `target`, one per unit of rows.
    fn statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<Vec<Statistics>>;
    /// [`Device::statistics`] without waiting for the device.
    fn queue_statistics(&self, x: &Tensor, units: Offsets<'_>, target: DType) -> Result<PendingStatistics> {
        Ok(PendingStatistics::Ready(self.statistics(x, units, target)?))
    }
    /// What `queue_statistics` began.
    fn finish_statistics(&self, pending: PendingStatistics) -> Result<Vec<Statistics>> {
        match pending {
            PendingStatistics::Ready(statistics) => Ok(statistics),
            PendingStatistics::Cuda(_) => {
                Err(crate::Error::internal("statistics of a GPU were asked of another device"))
            }
        }
    }
    /// A hint, until the next call: statistics of these units of rows will be asked of most results that have as many
    /// rows, against this dtype (`None`: each tensor's own). The device may measure where it computes.
    fn expect_statistics(&self, _of: Option<(Offsets<'_>, Option<DType>)>) {}
    /// A hint within that one: none will be asked of the results until this is called with `false`.
    fn pause_statistics(&self, _pause: bool) {}
    /// ‖x‖₂ per unit as torch.linalg.vector_norm gives it (f32 result), and its non-finite count.
    fn norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<Vec<Norm>>;
    /// [`Device::norms`] without waiting for the device, so that the host can queue what follows.
    fn queue_norms(&self, x: &Tensor, units: Offsets<'_>) -> Result<PendingNorms> {
        Ok(PendingNorms::Ready(self.norms(x, units)?))
    }
    /// What `queue_norms` began.
    fn finish_norms(&self, pending: PendingNorms) -> Result<Vec<Norm>> {
        match pending {
            PendingNorms::Ready(norms) => Ok(norms),
            PendingNorms::Cuda(_) => Err(crate::Error::internal("norms of a GPU were asked of another device")),
        }
    }
    /// The norm of each whole tensor times `factor`, rounded to its dtype before it is measured: gradients as they are
    /// once the loss scale is taken out.
    fn norms_of(&self, tensors: &[Tensor], factor: f32) -> Result<Vec<Norm>> {
        parts::norms_of(self, tensors, factor)
    }
    /// Per entry of `weights`, row by row of x [n, c]: Σ x·w and Σ |x|·a. Not a part of the step: the device's own sums,
    /// for checksums of products.
    fn row_checks(&self, x: &Tensor, weights: &[checks::Weights<'_>]) -> Result<Vec<checks::Sums>> {
        Ok(checks::of_rows(&self.download(x)?, x.columns(), weights))
    }
    /// A hint, until the next call: checksums of this thread's products will be asked for. The device may take them where
    /// it computes.
    fn expect_sums(&self, _of: Option<checks::Expect>) {}
    /// What was summed of the product y while it was computed, if anything and if y is still what it was.
    fn product_sums<'t>(&self, _y: &'t Tensor) -> Option<&'t checks::ProductSums> {
        None
    }
    /// x [n, k] · w [m, k]ᵀ → [n, m] f32 by the matrix unit itself, no library between; operands stored in `compute`'s
    /// dtype, n a multiple of 16, m of 8, k of 16. `None`: this device has none for this arithmetic.
    fn matrix_unit(&self, _x: &Tensor, _w: &Tensor, _compute: Compute) -> Result<Option<Tensor>> {
        Ok(None)
    }
    /// Per unit of rows and column of x: Σ x and Σ |x|, [units · c].
    fn column_checks(&self, x: &Tensor, units: Offsets<'_>) -> Result<checks::Sums> {
        Ok(checks::of_columns(&self.download(x)?, x.columns(), units))
    }
}

/// Opens `auto` (the first GPU that can be used, else the CPU), `cpu` or `cuda:N`; `threads` is for the CPU.
///
/// # Errors
/// A name that is none of these; a GPU that was asked for and cannot be used.
pub fn open(name: &str, threads: Option<usize>) -> Result<Arc<dyn Device>> {
    match name {
        "auto" => open_best(threads).map(|(device, _)| device),
        "cpu" => Ok(Arc::new(cpu::CpuDevice::new(threads)?)),
        "cuda" => Ok(Arc::new(cuda::CudaDevice::open(0)?)),
        _ => match name.strip_prefix("cuda:").map(str::parse) {
            Some(Ok(ordinal)) => Ok(Arc::new(cuda::CudaDevice::open(ordinal)?)),
            _ => Err(crate::Error::usage(format!("there is no device {name:?}")).next("--device auto, cpu or cuda:0")),
        },
    }
}

/// The first GPU; where it cannot be used the CPU, and why.
///
/// # Errors
/// Not even the CPU's threads could be started.
pub fn open_best(threads: Option<usize>) -> Result<(Arc<dyn Device>, Option<crate::Error>)> {
    match cuda::CudaDevice::open(0) {
        Ok(device) => Ok((Arc::new(device), None)),
        Err(why) => Ok((Arc::new(cpu::CpuDevice::new(threads)?), Some(why))),
    }
}
