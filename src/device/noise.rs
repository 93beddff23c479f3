//! The counter-based random numbers of `perturb` and `dropout`: a pure function of (seed, stream, element), the same
//! on every device, in any order and for any cut of the work.

use super::DType;

const WEYL: u64 = 0x9e37_79b9_7f4a_7c15;

/// 64 mixed bits of one element: the finaliser of splitmix64 (Steele, Lea, Flood 2014) over a Weyl sequence whose
/// start is itself mixed from seed and stream.
#[inline(always)]
pub fn bits(seed: u64, stream: u64, element: u64) -> u64 {
    mix(start(seed, stream).wrapping_add(element.wrapping_mul(WEYL)))
}

/// Where the sequence of (seed, stream) begins; the same for all its elements.
#[inline(always)]
pub fn start(seed: u64, stream: u64) -> u64 {
    mix(seed.wrapping_add(WEYL).wrapping_add(mix(stream.wrapping_add(WEYL))))
}

/// The seed whose elements 0, 1, … of `stream` are the elements `first`, `first` + 1, … of `seed`: what is computed
/// in parts draws what the whole would.
pub fn shifted(seed: u64, stream: u64, first: u64) -> u64 {
    let begin = start(seed, stream).wrapping_add(first.wrapping_mul(WEYL));
    unmix(begin).wrapping_sub(WEYL).wrapping_sub(mix(stream.wrapping_add(WEYL)))
}

/// The inverse of [`mix`]: its factors inverted modulo 2^64, its shifts undone.
fn unmix(mut z: u64) -> u64 {
    z = (z ^ (z >> 31) ^ (z >> 62)).wrapping_mul(0x3196_42b2_d24d_8ec3);
    z = (z ^ (z >> 27) ^ (z >> 54)).wrapping_mul(0x96de_1b17_3f11_9089);
    z ^ (z >> 30) ^ (z >> 60)
}

#[inline(always)]
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Uniform in [0, 1): the top 24 bits times 2^-24, exact in f32.
#[inline(always)]
pub fn unit(seed: u64, stream: u64, element: u64) -> f32 {
    (bits(seed, stream, element) >> 40) as f32 * f32::from_bits(0x3380_0000)
}

/// Uniform in (−1, 1), symmetric and never 0: (2·k + 1 − 2^24)·2^-24 for the top 24 bits k, exact in f32.
#[inline(always)]
pub fn symmetric(seed: u64, stream: u64, element: u64) -> f32 {
    let k = (bits(seed, stream, element) >> 40) as i32;
    (2 * k + 1 - (1 << 24)) as f32 * f32::from_bits(0x3380_0000)
}

/// Half a unit in the last place of 1.0 in `dtype`.
pub fn half_ulp(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => f32::EPSILON / 2.0,
        DType::BF16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
    }
}
