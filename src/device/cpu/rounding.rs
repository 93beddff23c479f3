//! Rounding f32 values to bf16, f16 and TF32, and widening stored halves; all branch-free, so that they vectorise.
//! Owns what "rounded to dtype" means on the CPU; who rounds when is each operation's business.

use crate::device::{Compute, DType};

/// Quiet bit of an f32 NaN; kept by every narrower format.
const QUIET: u32 = 0x0040_0000;

/// x rounded to bf16 (8 bits of precision, f32's range), nearest even. NaN stays NaN.
#[inline(always)]
pub fn bf16(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
    let nan = (bits | QUIET) & 0xffff_0000;
    f32::from_bits(if x.is_nan() { nan } else { rounded })
}

/// x rounded to f16 (11 bits of precision, largest 65504, smallest 2^-24), nearest even; 65520 and more is infinite.
#[inline(always)]
pub fn f16(x: f32) -> f32 {
    let bits = x.to_bits();
    let sign = bits & 0x8000_0000;
    let magnitude = bits & 0x7fff_ffff;
    let normal = magnitude.wrapping_add(0xfff + ((magnitude >> 13) & 1)) & 0xffff_e000;
    // Below 2^-14 the spacing is 2^-24, which is the spacing of f32 between 0.5 and 1: the addition rounds.
    let small = ((f32::from_bits(magnitude) + 0.5) - 0.5).to_bits();
    let finite = if magnitude < 0x3880_0000 { small } else { normal };
    let ranged = if finite > 0x477f_e000 { 0x7f80_0000 } else { finite };
    let nan = (magnitude | QUIET) & 0xffff_e000;
    f32::from_bits(sign | if magnitude > 0x7f80_0000 { nan } else { ranged })
}

/// x rounded to TF32 (10 mantissa bits, f32's range), ties away from zero as `cvt.rna.tf32` does it.
#[inline(always)]
pub fn tf32(x: f32) -> f32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x1000) & 0xffff_e000;
    let nan = (bits | QUIET) & 0xffff_e000;
    let magnitude = bits & 0x7fff_ffff;
    // Infinity must not carry into the NaNs; it has no low bits, so the sum leaves it alone.
    f32::from_bits(if magnitude > 0x7f80_0000 { nan } else { rounded })
}

/// A rounding chosen once per call, so that loops are compiled per dtype and not per element.
pub trait Round: Copy + Send + Sync {
    fn apply(self, x: f32) -> f32;
}
#[derive(Clone, Copy)]
pub struct ToF32;
#[derive(Clone, Copy)]
pub struct ToBf16;
#[derive(Clone, Copy)]
pub struct ToF16;
impl Round for ToF32 {
    #[inline(always)]
    fn apply(self, x: f32) -> f32 {
        x
    }
}
impl Round for ToBf16 {
    #[inline(always)]
    fn apply(self, x: f32) -> f32 {
        bf16(x)
    }
}
impl Round for ToF16 {
    #[inline(always)]
    fn apply(self, x: f32) -> f32 {
        f16(x)
    }
}

/// Runs `$body` with `$round` bound to the rounding of a [`DType`].
macro_rules! with_round {
    ($dtype:expr, $round:ident => $body:expr) => {
        match $dtype {
            $crate::device::DType::F32 => {
                let $round = $crate::device::cpu::rounding::ToF32;
                $body
            }
            $crate::device::DType::BF16 => {
                let $round = $crate::device::cpu::rounding::ToBf16;
                $body
            }
            $crate::device::DType::F16 => {
                let $round = $crate::device::cpu::rounding::ToF16;
                $body
            }
        }
    };
}
pub(crate) use with_round;

/// One value rounded to `dtype`.
pub fn round(x: f32, dtype: DType) -> f32 {
    with_round!(dtype, r => r.apply(x))
}

/// Rounds a slice in place to `dtype`.
pub fn round_slice(x: &mut [f32], dtype: DType) {
    match dtype {
        DType::F32 => {}
        DType::BF16 => map_in_place(x, bf16),
        DType::F16 => map_in_place(x, f16),
    }
}

/// Rounds a slice in place to the operand format of `compute`.
pub fn round_operand(x: &mut [f32], compute: Compute) {
    match compute {
        Compute::F32 => {}
        Compute::Tf32 => map_in_place(x, tf32),
        Compute::Bf16 => map_in_place(x, bf16),
        Compute::F16 => map_in_place(x, f16),
    }
}

#[inline(always)]
fn map_in_place(x: &mut [f32], f: impl Fn(f32) -> f32) {
    super::simd::vectorised(
        #[inline(always)]
        || {
            for value in x {
                *value = f(*value);
            }
        },
    );
}

/// Whether values already of `dtype` need no rounding to be operands of `compute`.
pub fn is_exact_in(dtype: DType, compute: Compute) -> bool {
    matches!(
        (dtype, compute),
        (_, Compute::F32)
            | (DType::BF16, Compute::Bf16)
            | (DType::F16 | DType::BF16, Compute::Tf32)
            | (DType::F16, Compute::F16)
    )
}

/// Widens little-endian elements of `dtype` to f32; `bytes` holds exactly `out.len()` elements, at any alignment.
pub fn widen(bytes: &[u8], dtype: DType, out: &mut [f32]) {
    super::simd::vectorised(
        #[inline(always)]
        || match dtype {
            DType::F32 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *value = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            DType::BF16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
                }
            }
            DType::F16 => {
                for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *value = widen_f16(u16::from_le_bytes([b[0], b[1]]));
                }
            }
        },
    );
}

/// f16 bits as f32, exactly: the exponent is rebased by a multiplication, which also normalises subnormals.
#[inline(always)]
pub fn widen_f16(h: u16) -> f32 {
    let sign = ((h as u32) & 0x8000) << 16;
    let body = ((h as u32) & 0x7fff) << 13;
    // 2^112: the difference of the exponent biases, 127 − 15.
    let finite = (f32::from_bits(body) * f32::from_bits(0x7780_0000)).to_bits();
    let special = body | 0x7f80_0000;
    f32::from_bits(sign | if body >= 0x0f80_0000 { special } else { finite })
}
