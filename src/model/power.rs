//! Powers of an f32 as PyTorch's CPU build gives them.

/// Elements in two AVX-512 registers: PyTorch's binary operations take as many at a time and what is left one by one.
const VECTORS: usize = 32;

/// `base ** exponents` for a positive base and exponents in [0, 1]: SLEEF's vectors, then the C library's powf.
pub fn powers(base: f32, exponents: &[f32]) -> Vec<f32> {
    let (vectors, rest) = exponents.split_at(exponents.len() / VECTORS * VECTORS);
    vectors.iter().map(|&e| power(base, e)).chain(rest.iter().map(|&e| base.powf(e))).collect()
}

/// e^(exponent · ln base) in pairs of floats. Steps and coefficients are those of SLEEF's `powf` with 1.0 ulp (Shibata,
/// Petrogalli 2020; sleefsimdsp.c): the same bits.
fn power(base: f32, exponent: f32) -> f32 {
    let x = times(ln(base), exponent);
    let n = ((x.0 + x.1) * std::f32::consts::LOG2_E).round_ties_even();
    let r = plus(x, n * -0.693_145_75);
    let r = plus(r, n * -1.428_606_8e-6);
    let high = r.0 + r.1;
    let r = (high, (r.0 - high) + r.1);
    let mut p = 0.001_363_246_5_f32;
    p = p.mul_add(r.0, 0.008_365_969);
    p = p.mul_add(r.0, 0.041_671_082);
    p = p.mul_add(r.0, 0.166_665_52);
    p = p.mul_add(r.0, 0.499_999_85);
    let sum = plus_pair(r, times(square(r), p));
    let high = 1.0 + sum.0;
    let value = high + (((1.0 - high) + sum.0) + sum.1);
    value * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// ln x of a positive normal x: x = 2^e·m, m in [0.75, 1.5), q = (m − 1)/(m + 1), ln m = 2·artanh q.
fn ln(x: f32) -> (f32, f32) {
    const LN2: (f32, f32) = (std::f32::consts::LN_2, -1.904_654_3e-9);
    const THIRD: (f32, f32) = (0.666_666_6, 3.691_838_6e-9);
    let exponent = ((x * (1.0 / 0.75)).to_bits() >> 23) as i32 - 127;
    let m = f32::from_bits(x.to_bits().wrapping_sub((exponent as u32) << 23));
    let q = quotient(plus((-1.0, 0.0), m), plus((1.0, 0.0), m));
    let q2 = square(q);
    let p = 0.240_320_35_f32.mul_add(q2.0, 0.285_112_68).mul_add(q2.0, 0.400_008);
    let sum = ordered(times(LN2, exponent as f32), (2.0 * q.0, 2.0 * q.1));
    ordered(sum, product(product(q2, q), plus_pair(times(q2, p), THIRD)))
}

type Pair = (f32, f32);

/// a + b.
fn plus(a: Pair, b: f32) -> Pair {
    plus_pair(a, (b, 0.0))
}

fn plus_pair(a: Pair, b: Pair) -> Pair {
    let sum = a.0 + b.0;
    let v = sum - a.0;
    (sum, ((a.0 - (sum - v)) + (b.0 - v)) + (a.1 + b.1))
}

/// a + b where |a| ≥ |b|.
fn ordered(a: Pair, b: Pair) -> Pair {
    let sum = a.0 + b.0;
    (sum, (((a.0 - sum) + b.0) + a.1) + b.1)
}

fn times(a: Pair, b: f32) -> Pair {
    let high = a.0 * b;
    (high, a.1.mul_add(b, a.0.mul_add(b, -high)))
}

fn product(a: Pair, b: Pair) -> Pair {
    let high = a.0 * b.0;
    (high, a.0.mul_add(b.1, a.1.mul_add(b.0, a.0.mul_add(b.0, -high))))
}

fn square(a: Pair) -> Pair {
    let high = a.0 * a.0;
    (high, (a.0 + a.0).mul_add(a.1, a.0.mul_add(a.0, -high)))
}

fn quotient(n: Pair, d: Pair) -> Pair {
    let t = 1.0 / d.0;
    let high = n.0 * t;
    let u = t.mul_add(n.0, -high);
    let v = (-d.1).mul_add(t, (-d.0).mul_add(t, 1.0));
    (high, high.mul_add(v, n.1.mul_add(t, u)))
}
