//! Arithmetics of known hardware, as published. None of them was confirmed on a GPU by this project.

use super::{Arithmetic, Order, Rounding, Sum};
use crate::device::Compute;

/// A published arithmetic.
#[derive(Debug, Clone)]
pub struct Profile {
    pub name: &'static str,
    pub source: &'static str,
    pub arithmetic: Arithmetic,
}

const FASI: &str = "Fasi, Higham, Mikaitis, Pranesh, PeerJ CS 7:e330 (2021)";
const KHATTAK: &str = "Khattak, Mikaitis, arXiv 2512.07004 (2025); Xie et al., arXiv 2411.00442 (2025)";

/// Truncating alignment of `block` products with the accumulator, f32 between blocks.
const fn tensor_core(operand: Compute, block: usize, fraction_bits: u32) -> Arithmetic {
    Arithmetic {
        operand,
        block,
        sum: Sum::Aligned { fraction_bits },
        rounding: Rounding::TowardZero,
        accumulator_bits: 24,
        order: Order::Sequential,
        split: None,
        subnormal_operands: true,
        subnormal_sums: true,
    }
}

/// Matrix units of data-centre GPUs with f32 accumulation.
pub fn published() -> Vec<Profile> {
    let profile =
        |name, source, operand, block, bits| Profile { name, source, arithmetic: tensor_core(operand, block, bits) };
    vec![
        profile("V100 fp16", FASI, Compute::F16, 4, 23),
        profile("A100 fp16", FASI, Compute::F16, 8, 24),
        profile("A100 bf16", FASI, Compute::Bf16, 8, 24),
        profile("A100 tf32", FASI, Compute::Tf32, 4, 24),
        profile("H100 fp16", KHATTAK, Compute::F16, 16, 25),
        profile("H100 bf16", KHATTAK, Compute::Bf16, 16, 25),
        profile("H100 tf32", KHATTAK, Compute::Tf32, 8, 25),
    ]
}
