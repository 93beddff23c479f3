//! exp and fixed-order reductions, in plain Rust that vectorises and gives the same bits on every instruction set.

/// Lanes of every reduction: one AVX-512 register, two AVX2 registers.
pub const LANES: usize = 16;

/// e^x; error ≤ 1 ulp in the normal range (checked against f64 in the tests). 0 below −103.98, infinite above 88.73, NaN for NaN.
///
/// x = n·ln 2 + r, |r| ≤ ½ ln 2; e^r by a polynomial of degree 7; 2^n in two factors, because n reaches −151 and 128.
/// Steps and coefficients are those of SLEEF's `expf` with 1.0 ulp (Shibata, Petrogalli 2020; sleefsimdsp.c), which
/// PyTorch's vectors call: the same bits.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    // 1.5·2^23: adding it rounds to an integer, to nearest even.
    const INTEGER: f32 = 12_582_912.0;
    // Clamped so that n fits; f32::max would drop a NaN, so it is put back at the end.
    let clamped = x.clamp(-105.0, 89.0);
    let shifted = clamped * LOG2_E + INTEGER;
    let n = shifted - INTEGER;
    let power_of_two = shifted.to_bits().wrapping_sub(INTEGER.to_bits()) as i32;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 0.000_198_527_62_f32;
    p = p.mul_add(r, 0.001_393_043_6);
    p = p.mul_add(r, 0.008_333_361);
    p = p.mul_add(r, 0.041_666_485);
    p = p.mul_add(r, 0.166_666_67);
    p = p.mul_add(r, 0.5);
    let value = p.mul_add(r * r, r) + 1.0;
    let half = power_of_two >> 1;
    let power = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    let scaled = value * power(half) * power(power_of_two.wrapping_sub(half));
    if x.is_nan() { x } else { scaled }
}

/// ln x of a positive normal x, NaN and infinity as they are; error ≤ 1 ulp.
///
/// x = 2^e·m, m in [0.75, 1.5); ln m = 2·artanh((m − 1)/(m + 1)), summed in pairs of floats. Steps and coefficients are
/// those of SLEEF's `logf` with 1.0 ulp (sleefsimdsp.c `xlogf_u1`), which PyTorch's log_softmax calls: the same bits.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    if !x.is_finite() {
        return x;
    }
    const LN2: (f32, f32) = (std::f32::consts::LN_2, -1.904_654_3e-9);
    let exponent = ((x * (1.0 / 0.75)).to_bits() >> 23) as i32 - 127;
    let e = exponent as f32;
    let m = f32::from_bits(x.to_bits().wrapping_sub((exponent as u32) << 23));
    let scaled = LN2.0 * e;
    let power = (scaled, LN2.1.mul_add(e, LN2.0.mul_add(e, -scaled)));
    let (n, d) = (sum_of(-1.0, m), sum_of(1.0, m));
    let t = 1.0 / d.0;
    let q = n.0 * t;
    let u = t.mul_add(n.0, -q);
    let v = (-d.1).mul_add(t, (-d.0).mul_add(t, 1.0));
    let q = (q, q.mul_add(v, n.1.mul_add(t, u)));
    let square = q.0 * q.0;
    let p = 0.302_729_5_f32.mul_add(square, 0.399_610_82).mul_add(square, 0.666_669_5);
    let high = power.0 + 2.0 * q.0;
    let low = (((power.0 - high) + 2.0 * q.0) + power.1) + 2.0 * q.1;
    let rest = square * q.0 * p;
    let sum = high + rest;
    sum + (((high - sum) + rest) + low)
}

/// a + b and what rounding it lost.
#[inline(always)]
fn sum_of(a: f32, b: f32) -> (f32, f32) {
    let sum = a + b;
    let v = sum - a;
    (sum, (a - (sum - v)) + (b - v))
}

/// Below it PyTorch's fast exponentials give 0.
const LN_MIN: f32 = f32::from_bits(0xc2ae_ac50);
const LN_MAX: f32 = f32::from_bits(0x42b1_7218);

/// e^x as PyTorch's CPU flash attention computes it for half operands (`Vectorized<float>::fexp_u20` in
/// ATen/cpu/vec, after Malossi et al., Fast Exponential Computation on SIMD Architectures): relative error up to 1e-4,
/// a twentieth of what rounding to bf16 does next. Using the same approximation makes the rounded probabilities equal.
#[inline(always)]
pub fn exp_flash_half(x: f32) -> f32 {
    let scaled = x.clamp(LN_MIN, LN_MAX) * std::f32::consts::LOG2_E;
    let fraction = scaled - scaled.floor();
    let mut c = fraction.mul_add(-0.079_204_24, -0.224_338_37);
    c = fraction.mul_add(c, 0.303_542_6);
    c = fraction.mul_add(c, 0.000_107_034_35);
    // 2^23·(x·log₂e − c + 127) read as the bits of a float: exponent and mantissa at once.
    let bits = 8_388_608f32.mul_add(scaled - c, 1_065_353_216.0);
    let value = f32::from_bits(bits as i32 as u32);
    if x.is_nan() {
        x
    } else if x < LN_MIN {
        0.0
    } else {
        value
    }
}

/// e^x as PyTorch's CPU flash attention computes it for f32 (`Vectorized<float>::exp_u20`): degree 5, up to 20 ulp off.
#[inline(always)]
pub fn exp_flash(x: f32) -> f32 {
    const COEFFICIENTS: [f32; 5] = [0.999_999_7, 0.499_991_5, 0.166_676_52, 0.041_897_822, 0.008_289_291];
    let clamped = x.clamp(LN_MIN, LN_MAX);
    let n = clamped.mul_add(std::f32::consts::LOG2_E, 0.5).floor();
    let r = n.mul_add(-std::f32::consts::LN_2, clamped);
    let mut p = COEFFICIENTS[4];
    for &c in COEFFICIENTS[..4].iter().rev() {
        p = r.mul_add(p, c);
    }
    p = r.mul_add(p, 1.0);
    // 2^(n−1) and then 2: n reaches 128. The sum with 1.5·2^23 leaves n in the low bits.
    let shifted = (n - 1.0) + 12_582_912.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let value = p * power * 2.0;
    if x.is_nan() {
        x
    } else if x < LN_MIN {
        0.0
    } else {
        value
    }
}

/// Σ f(x[0][i], x[1][i], …) over slices of one length, in [`LANES`] partial sums, combined pairwise.
#[inline(always)]
pub fn sum<const N: usize>(x: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    sum_in_lanes::<LANES, N>(x, f)
}

/// [`sum`] in `L` partial sums, a power of two.
#[inline(always)]
pub fn sum_in_lanes<const L: usize, const N: usize>(x: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    assert!(x.iter().all(|other| other.len() == x[0].len()), "slices of one length");
    let mut lanes = [0f32; L];
    let whole = x[0].len() / L;
    for vector in 0..whole {
        add_terms(&mut lanes, &x, L * vector, &f);
    }
    for i in whole * L..x[0].len() {
        lanes[i - whole * L] += f(x.map(|x| x[i]));
    }
    fold(lanes, |a, b| a + b)
}

/// ‖x‖₂ of a contiguous tensor as torch.linalg.vector_norm has it (ReduceOpsKernel.cpp
/// `norm_kernel_tensor_iterator_impl`, which PyTorch builds for AVX2): eight lanes of squares in f32, the lanes one after
/// another, then what is left of the tensor. It overflows where PyTorch's does.
#[derive(Default)]
pub struct VectorNorm {
    lanes: [f32; 8],
    rest: [f32; 7],
    left: usize,
}

impl VectorNorm {
    /// The next elements; all runs but the last are multiples of 8 long.
    #[inline(always)]
    pub fn add(&mut self, x: &[f32]) {
        assert!(self.left == 0, "a run that is no multiple of 8 comes last");
        let (whole, rest) = x.split_at(x.len() / 8 * 8);
        let mut lanes = self.lanes;
        for x in whole.chunks_exact(8) {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane += x * x;
            }
        }
        self.lanes = lanes;
        self.rest[..rest.len()].copy_from_slice(rest);
        self.left = rest.len();
    }

    pub fn finish(&self) -> f32 {
        let sum = self.lanes.iter().skip(1).fold(self.lanes[0], |sum, lane| sum + lane);
        self.rest[..self.left].iter().fold(sum, |sum, x| sum + x * x).sqrt()
    }
}

/// [`sum`] in the order of torch.sum over a contiguous last dimension (SumKernel.cpp `vectorized_inner_sum`, which
/// PyTorch builds for AVX2 and also uses on processors with AVX-512): four interleaved vectors of 8 lanes, whose
/// partial sums cascade through four levels; then the scalar tail, then the lanes one after another.
#[inline(always)]
pub fn torch_sum<const N: usize>(x: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    const VECTOR: usize = 8;
    const STRIDE: usize = 4 * VECTOR;
    const LEVELS: usize = 4;
    let n = x[0].len();
    let mut levels = [[0f32; STRIDE]; LEVELS];
    let strides = n / STRIDE;
    let power = (strides.next_power_of_two().trailing_zeros() as usize / LEVELS).max(4);
    let mut i = 0;
    while i < strides {
        let end = (i + (1 << power)).min(strides);
        let whole = end - i == 1 << power;
        for stride in i..end {
            add_terms(&mut levels[0], &x, stride * STRIDE, &f);
        }
        i = end;
        for level in 1..if whole { LEVELS } else { 1 } {
            let below = std::mem::replace(&mut levels[level - 1], [0.0; STRIDE]);
            add_lanes(&mut levels[level], &below);
            if i & (((1 << power) - 1) << (level * power)) != 0 {
                break;
            }
        }
    }
    let [mut sums, higher @ ..] = levels;
    for level in higher {
        add_lanes(&mut sums, &level);
    }
    let (lanes, others) = sums.split_at_mut(VECTOR);
    let vectors = n / VECTOR;
    for vector in 4 * strides..vectors {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(x.map(|x| x[vector * VECTOR + l]));
        }
    }
    for row in others.chunks_exact(VECTOR) {
        add_lanes(lanes, row);
    }
    let tail = (vectors * VECTOR..n).fold(0f32, |sum, i| sum + f(x.map(|x| x[i])));
    lanes.iter().fold(tail, |sum, lane| sum + lane)
}

#[inline(always)]
fn add_lanes(sums: &mut [f32], other: &[f32]) {
    for (sum, x) in sums.iter_mut().zip(other) {
        *sum += x;
    }
}

/// lanes[l] += f(element `at` + l). Slices are cut before the loop, so that it vectorises.
#[inline(always)]
fn add_terms<const N: usize, const L: usize>(
    lanes: &mut [f32; L],
    x: &[&[f32]; N],
    at: usize,
    f: &impl Fn([f32; N]) -> f32,
) {
    let x = x.map(|x| &x[at..][..L]);
    for (l, lane) in lanes.iter_mut().enumerate() {
        *lane += f(x.map(|x| x[l]));
    }
}

/// Largest f(i), NaN if any is NaN (as torch.max), −∞ for none.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let pick = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane = if lane.is_nan() { *lane } else { pick(*lane, value) };
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(chunks.remainder()) {
        *lane = if lane.is_nan() { *lane } else { pick(*lane, value) };
    }
    fold(lanes, |a, b| if a.is_nan() { a } else { pick(a, b) })
}

/// Combines lanes pairwise: … 16 → 8 → 4 → 2 → 1.
#[inline(always)]
fn fold<const L: usize>(mut lanes: [f32; L], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = L / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = f(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}
