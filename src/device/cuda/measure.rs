//! Statistics and norms: the launches of statistics.cu, and what the `*_measured` kernels leave for them.
//!
//! Where the kernel that made a tensor measured it on the way (`meter`), only its partial results are left to add up.

use bytemuck::{Pod, Zeroable};

use super::kernels::{Plain, tag};
use super::memory::Buffer;
use super::{CudaDevice, expect_offsets, narrow};
use crate::Result;
use crate::device::{DType, Norm, Statistics, Storage, Tensor};

/// Elements a chunk or run, one block's work: 64 a thread, so that adding up its threads weighs little.
pub(super) const CHUNK: usize = 256 * 64;

/// `struct Chunk` of statistics.cu.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Chunk {
    address: u64,
    count: u32,
    tag: u32,
}

/// `struct Partial` of measure.cuh.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Partial {
    sum_squares: f64,
    nan: u64,
    pos_inf: u64,
    neg_inf: u64,
    zero: u64,
    subnormal: u64,
    underflow: u64,
    overflow: u64,
    max_abs: f32,
    min_abs: f32,
}

/// `struct Limits` of measure.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Limits {
    smallest_normal: f32,
    rounds_to_zero: f32,
    rounds_to_inf: f32,
}
// SAFETY: three floats, the same as in measure.cuh.
unsafe impl Plain for Limits {}

impl Limits {
    pub(super) fn of(dtype: DType) -> Self {
        let limits = |normal: u32, zero: u32, inf: u32| Self {
            smallest_normal: f32::from_bits(normal),
            rounds_to_zero: f32::from_bits(zero),
            rounds_to_inf: f32::from_bits(inf),
        };
        match dtype {
            DType::F32 => limits(0x0080_0000, 0, 0x7f80_0000),
            // Half of the smallest subnormal 2^-133 ties to zero; half an ulp past the largest ties to infinity.
            DType::BF16 => limits(0x0080_0000, 0x0000_8000, 0x7f7f_8000),
            // 2^-14; 2^-25; 65520.
            DType::F16 => limits(0x3880_0000, 0x3300_0000, 0x477f_f000),
        }
    }
}

/// Measurements whose kernels are queued.
#[derive(Debug)]
pub struct Measured {
    /// One [`Partial`] a unit.
    results: Buffer,
    /// Elements of each unit.
    elements: Vec<u64>,
}

/// What is measured, and how exactly.
#[derive(Clone, Copy)]
pub(super) enum How {
    /// Counted against the range of a dtype.
    Against(DType),
    /// Squares of x · factor, for norms.
    Norm(f32),
}

impl CudaDevice {
    /// Queues the measurement of every unit of every tensor in two launches.
    pub(super) fn queue(&self, parts: &[(&Tensor, &[usize])], how: How) -> Result<Measured> {
        let (mut chunks, mut begins, mut held, mut elements) = (Vec::new(), vec![0u32], Vec::new(), Vec::new());
        for (x, units) in parts {
            expect_offsets(units, x.rows(), "statistics")?;
            let place = self.operand(x)?;
            for unit in units.windows(2) {
                let (begin, end) = (unit[0] * x.columns(), unit[1] * x.columns());
                chunks.extend((begin..end).step_by(CHUNK).map(|at| Chunk {
                    address: place.address + (at * x.dtype.size()) as u64,
                    count: CHUNK.min(end - at) as u32,
                    tag: tag(x.dtype) as u32,
                }));
                begins.push(narrow(chunks.len(), "chunk count")?);
                elements.push((end - begin) as u64);
            }
            held.push(place);
        }
        let (table, borders) = (self.put(&chunks)?, self.put(&begins)?);
        let parts = self.bytes(chunks.len() * size_of::<Partial>())?;
        let launch = |name| self.kernels.launch(name).buffer(&parts).buffer(&table);
        let launch = match how {
            How::Against(target) => launch("statistics_partials").value(Limits::of(target)),
            How::Norm(factor) => launch("norms_partials").value(Limits::of(DType::F32)).value(factor),
        };
        // SAFETY: statistics.cu; chunks lie inside their tensors, one block a chunk.
        unsafe { launch.run((narrow(chunks.len(), "chunk count")?, 1), 256)? };
        self.combine(parts.address(), &borders, elements)
    }

    /// Queues adding up each unit's partial results.
    fn combine(&self, partials: u64, begins: &Buffer, elements: Vec<u64>) -> Result<Measured> {
        let results = self.bytes(elements.len() * size_of::<Partial>())?;
        let launch = self.kernels.launch("statistics_combine").buffer(&results).value(partials).buffer(begins);
        // SAFETY: statistics.cu; one block a unit, whose partials lie between two of `begins`. The partials' buffer was
        // alive until now, and what reuses its memory is queued behind.
        unsafe { launch.run((narrow(elements.len(), "unit count")?, 1), 32)? };
        Ok(Measured { results, elements })
    }

    /// Statistics of units of rows: those the kernel that made x left, or a pass of their own.
    pub(super) fn queue_measure(&self, x: &Tensor, units: &[usize], target: DType) -> Result<Measured> {
        let stash = match &x.storage {
            Storage::Cuda(buffer) => buffer.stash(),
            Storage::Cpu(_) | Storage::Mapped(_) => None,
        };
        match stash {
            Some(s) if s.is_of(x, units, target) => {
                let elements = units.windows(2).map(|unit| ((unit[1] - unit[0]) * x.columns()) as u64).collect();
                self.combine(s.address, &s.begins, elements)
            }
            _ => self.queue(&[(x, units)], How::Against(target)),
        }
    }

    pub(super) fn statistics_measured(&self, measured: &Measured) -> Result<Vec<Statistics>> {
        let partials: Vec<Partial> = self.get(&measured.results, measured.elements.len())?;
        Ok(partials.iter().zip(&measured.elements).map(|(p, &elements)| p.statistics(elements)).collect())
    }

    pub(super) fn norms_measured(&self, measured: &Measured) -> Result<Vec<Norm>> {
        Ok(self.get::<Partial>(&measured.results, measured.elements.len())?.iter().map(Partial::norm).collect())
    }

    pub(super) fn norms_of_all(&self, tensors: &[Tensor], factor: f32) -> Result<Vec<Norm>> {
        let whole: Vec<[usize; 2]> = tensors.iter().map(|x| [0, x.rows()]).collect();
        let parts: Vec<(&Tensor, &[usize])> = tensors.iter().zip(&whole).map(|(x, units)| (x, &units[..])).collect();
        self.norms_measured(&self.queue(&parts, How::Norm(factor))?)
    }
}

impl Partial {
    fn statistics(&self, elements: u64) -> Statistics {
        Statistics {
            elements,
            nan: self.nan,
            pos_inf: self.pos_inf,
            neg_inf: self.neg_inf,
            zero: self.zero,
            subnormal: self.subnormal,
            underflow: self.underflow,
            overflow: self.overflow,
            max_abs: self.max_abs,
            min_abs: if self.min_abs.is_finite() { self.min_abs } else { 0.0 },
            sum_squares: self.sum_squares,
        }
    }

    /// ‖x‖₂ and the count of non-finite elements. The sum goes through f32 because PyTorch's does: it overflows where
    /// PyTorch's overflows.
    fn norm(&self) -> Norm {
        let infinite = self.pos_inf + self.neg_inf;
        let norm = match (self.nan, infinite) {
            (0, 0) => (self.sum_squares as f32).sqrt(),
            (0, _) => f32::INFINITY,
            _ => f32::NAN,
        };
        (norm, self.nan + infinite)
    }
}
