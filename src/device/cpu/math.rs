//! exp and fixed-order reductions, in plain Rust that vectorises and gives the same bits on every instruction set.

/// Lanes of every reduction: one AVX-512 register, two AVX2 registers.
pub const LANES: usize = 16;

/// e^x; error ≤ 1 ulp in the normal range (checked against f64 in the tests). 0 below −103.98, infinite above 88.73, NaN for NaN.
///
/// x = n·ln 2 + r, |r| ≤ ½ ln 2; e^r by its Taylor polynomial of degree 7 (remainder 5e-9 there);
/// 2^n in two factors, because n reaches −151 and 128.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_145_75;
    const LN2_LOW: f32 = 1.428_606_8e-6;
    // 1.5·2^23: adding it rounds to an integer, to nearest even.
    const INTEGER: f32 = 12_582_912.0;
    // Clamped so that n fits; f32::max would drop a NaN, so it is put back at the end.
    let clamped = x.clamp(-105.0, 89.0);
    let shifted = clamped.mul_add(LOG2_E, INTEGER);
    let n = shifted - INTEGER;
    let power_of_two = shifted.to_bits().wrapping_sub(INTEGER.to_bits()) as i32;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    let mut p = 1.984_127e-4_f32;
    p = p.mul_add(r, 1.388_888_9e-3);
    p = p.mul_add(r, 8.333_334e-3);
    p = p.mul_add(r, 4.166_666_8e-2);
    p = p.mul_add(r, 1.666_666_7e-1);
    p = p.mul_add(r, 0.5);
    let value = p.mul_add(r * r, r) + 1.0;
    let half = power_of_two >> 1;
    let power = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    let scaled = value * power(half) * power(power_of_two.wrapping_sub(half));
    if x.is_nan() { x } else { scaled }
}

/// e^x for x ≤ 0 as PyTorch's CPU attention takes it for half formats (`Vectorized<float>::fexp_u20`, a degree-3
/// fit of Malossi et al., "Fast exponential computation on SIMD architectures"): relative error up to 1.1e-4, which
/// moves the rounding of fp16 probabilities. Their kernel's scalar tail (keys past a multiple of 16) is not imitated.
#[inline(always)]
pub fn exp_for_half(x: f32) -> f32 {
    const LOWEST: f32 = -87.336_55;
    const BINADE: f32 = 8_388_608.0;
    let scaled = x * std::f32::consts::LOG2_E;
    let fraction = scaled - scaled.floor();
    let mut p = fraction.mul_add(-0.079_204_24, -0.224_338_36);
    p = fraction.mul_add(p, 0.303_542_6);
    p = fraction.mul_add(p, 1.070_343_5e-4);
    let bits = BINADE.mul_add(scaled - p, BINADE * 127.0);
    match x {
        x if x.is_nan() => x,
        x if x < LOWEST => 0.0,
        _ => f32::from_bits(bits as u32),
    }
}

/// Σ f(i) over 0..n in [`LANES`] partial sums, combined pairwise: one fixed order for every caller.
#[inline(always)]
pub fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = n / LANES * LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane += f(i + l);
        }
        i += LANES;
    }
    for (l, lane) in lanes.iter_mut().enumerate().take(n - whole) {
        *lane += f(whole + l);
    }
    fold(lanes, |a, b| a + b)
}

/// Σ f(i) over 0..n, n < 16·4·16, in the order of torch.sum over a contiguous last dimension on AVX-512
/// (SumKernel.cpp `vectorized_inner_sum`): four interleaved rows of 16 lanes, then the scalar tail, then the lanes
/// one after another. Longer sums cascade there every 16 additions; here they run on.
#[inline(always)]
pub fn torch_sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    const ROWS: usize = 4;
    let mut rows = [[0f32; LANES]; ROWS];
    let vectors = n / LANES;
    let mut add = |row: usize, vector: usize| {
        for (l, lane) in rows[row].iter_mut().enumerate() {
            *lane += f(vector * LANES + l);
        }
    };
    for vector in 0..vectors / ROWS * ROWS {
        add(vector % ROWS, vector);
    }
    for vector in vectors / ROWS * ROWS..vectors {
        add(0, vector);
    }
    let [mut lanes, others @ ..] = rows;
    for row in others {
        for (lane, x) in lanes.iter_mut().zip(row) {
            *lane += x;
        }
    }
    let tail = (vectors * LANES..n).fold(0f32, |sum, i| sum + f(i));
    lanes.iter().fold(tail, |sum, lane| sum + lane)
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

/// Combines lanes pairwise: 16 → 8 → 4 → 2 → 1.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = f(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}
