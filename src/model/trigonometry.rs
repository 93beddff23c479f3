//! cos and sin of an f32 as PyTorch's CPU build gives them: MKL's vector functions, found from outside by comparing.
//!
//! Every f32 from 0 to 2^20 has the bits of torch 2.15 (1.2·10⁹ values of either function, compared once; the tests hold
//! some thousand). About 5 % of them, 1 % above 10 000, are not the correctly rounded value. The first branch was
//! measured; the second has the steps of `cosf` in Intel's graphics compiler (MIT; IGC IMF cos_s_la.cl), each rounded.

use std::f32::consts::{FRAC_1_PI, FRAC_PI_2, TAU};

/// Above it, MKL reduces by whole 256ths of a turn.
const FEW_TURNS: f32 = 10_000.0;
/// Above it (no position times a frequency), correctly rounded values.
const MANY_TURNS: f32 = 16_777_216.0;

/// cos of an angle ≥ 0.
pub fn cos(angle: f32) -> f32 {
    if angle <= FEW_TURNS {
        let half_turns = ((angle + FRAC_PI_2) * FRAC_1_PI).round_ties_even();
        from_half_turns(angle, half_turns, f64::from(half_turns) - 0.5)
    } else if angle < MANY_TURNS {
        from_table(angle, TABLE_STEPS / 4)
    } else {
        f64::from(angle).cos() as f32
    }
}

/// sin of an angle ≥ 0.
pub fn sin(angle: f32) -> f32 {
    if angle <= FEW_TURNS {
        let half_turns = (angle * FRAC_1_PI).round_ties_even();
        from_half_turns(angle, half_turns, f64::from(half_turns))
    } else if angle < MANY_TURNS {
        from_table(angle, 0)
    } else {
        f64::from(angle).sin() as f32
    }
}

/// ± sin(angle − π·multiple) in f64, rounded once: the odd polynomial of degree 9 whose relative error on [−π/2, π/2] is
/// least (6.05·10⁻⁹, a tenth of a rounding: what makes the 5 %).
fn from_half_turns(angle: f32, half_turns: f32, multiple: f64) -> f32 {
    // π; products of the first two with a multiple below 2^20 are exact.
    const PI: [f64; 3] = [3.141_592_653_468_251_2, 1.215_420_101_260_793_2e-10, 4.044_532_497_591_901e-21];
    // Remez, then moved by 10⁻¹⁵ so that no value compared falls on the other side of a tie.
    const P: [f64; 4] = [
        -0.166_666_595_504_282_56,
        0.008_333_066_246_093_422,
        -0.000_198_096_029_027_269_64,
        2.605_780_639_662_498_6e-6,
    ];
    let r = PI.iter().fold(f64::from(angle), |r, part| r - multiple * part);
    let square = r * r;
    let p = ((P[3] * square + P[2]) * square + P[1]) * square + P[0];
    let sine = (r + r * (square * p)) as f32;
    if half_turns as i32 & 1 == 1 { -sine } else { sine }
}

/// sin of the angle and `ahead` 256ths of a turn, in f32: angle = 2π·n/256 + r, r and what it lacks (`lost`) in two
/// floats; sin(2πn/256 + r) from the sine and cosine of the table.
fn from_table(angle: f32, ahead: usize) -> f32 {
    // ⌊2^128 / 2π⌋
    const TURN: u128 = 0x28be_60db_9391_054a_7f09_d5f4_7d4d_3770;
    // 2π in two parts: products of the first with half a float are exact.
    const TAU_HIGH: f32 = 6.283_203;
    const TAU_LOW: f32 = -1.781_782e-5;
    // What exceeds whole turns, in 2^−64 of a turn.
    let (exponent, significand) = (angle.to_bits() >> 23, angle.to_bits() & 0x7f_ffff | 0x80_0000);
    let turns = (((TURN >> (182 - exponent)) * u128::from(significand)) >> 32) as u64;
    let first = (turns >> 41) as f32;
    let n = (first / 32_768.0).round_ties_even();
    let first = (first - n * 32_768.0) * 2f32.powi(-23);
    let second = (turns >> 18 & 0x7f_ffff) as f32 * 2f32.powi(-46);
    let third = (turns & 0x3_ffff) as f32 * 2f32.powi(-64);
    let high = first + second;
    let low = (second + (first - high)) + third;
    // r = 2π·(high + low)
    let half = f32::from_bits(high.to_bits() & 0xffff_f000);
    let other = high - half;
    let product = TAU_HIGH * half;
    let rest = (TAU_HIGH * other + TAU_LOW * half) + (TAU * low + TAU_LOW * other);
    let r = product + rest;
    let lost = (product - r) + rest;
    // The sine in two floats; the cosine as a power of two, whose product with r is exact, and the difference.
    let n = n as usize + ahead;
    let (sine, cosine) = (table(n), table(n + TABLE_STEPS / 4));
    let power = f64::from_bits((cosine / 0.7).to_bits() & !((1 << 52) - 1));
    let (difference, power) = ((cosine - power) as f32, power as f32);
    let sine_low = (sine - f64::from(sine as f32)) as f32;
    let sine = sine as f32;
    // sine + cosine·r, exact but for `small`
    let (by_power, by_difference) = (r * power, difference * r);
    let partial = sine + by_power;
    let large = by_difference + partial;
    let small = ((partial - large) + by_difference) + ((sine - partial) + by_power);
    // The slope at r, not at 0, also stands before r³: hence the 1 %.
    let square = r * r;
    let slope = (difference + power) - r * sine;
    let odd = (0.008_333_292 * square - 0.166_666_67) * square * r;
    let even = (0.041_666_493 * square - 0.5) * square;
    large + (((sine_low + lost * slope) + even * sine) + (small + odd * slope))
}

const TABLE_STEPS: usize = 256;

/// sin(2π·n / 256)
fn table(n: usize) -> f64 {
    let quarter = TABLE_STEPS / 4;
    let within = n % (2 * quarter);
    let sine = QUARTER[if within <= quarter { within } else { 2 * quarter - within }];
    if n % TABLE_STEPS < 2 * quarter { sine } else { -sine }
}

/// sin(2π·n / 256), n ≤ 64. Literals: f64::sin is the platform's.
#[rustfmt::skip]
const QUARTER: [f64; 65] = [
    0.0, 0.024_541_228_522_912_288, 0.049_067_674_327_418_015, 0.073_564_563_599_667_43,
    0.098_017_140_329_560_6, 0.122_410_675_199_216_2, 0.146_730_474_455_361_75, 0.170_961_888_760_301_22,
    0.195_090_322_016_128_28, 0.219_101_240_156_869_8, 0.242_980_179_903_263_9, 0.266_712_757_474_898_37,
    0.290_284_677_254_462_4, 0.313_681_740_398_891_46, 0.336_889_853_392_220_05, 0.359_895_036_534_988_17,
    0.382_683_432_365_089_8, 0.405_241_314_004_989_86, 0.427_555_093_430_282_1, 0.449_611_329_654_606_6,
    0.471_396_736_825_997_64, 0.492_898_192_229_784_04, 0.514_102_744_193_221_8, 0.534_997_619_887_097_3,
    0.555_570_233_019_602_2, 0.575_808_191_417_845_3, 0.595_699_304_492_433_4, 0.615_231_590_580_626_8,
    0.634_393_284_163_645_5, 0.653_172_842_953_776_8, 0.671_558_954_847_018_4, 0.689_540_544_737_066_9,
    std::f64::consts::FRAC_1_SQRT_2, 0.724_247_082_951_466_9, 0.740_951_125_354_959_1, 0.757_208_846_506_484_6,
    0.773_010_453_362_737, 0.788_346_427_626_606_2, 0.803_207_531_480_644_9, 0.817_584_813_151_583_7,
    0.831_469_612_302_545_2, 0.844_853_565_249_707_1, 0.857_728_610_000_272_1, 0.870_086_991_108_711_5,
    0.881_921_264_348_355, 0.893_224_301_195_515_3, 0.903_989_293_123_443_3, 0.914_209_755_703_530_7,
    0.923_879_532_511_286_7, 0.932_992_798_834_738_8, 0.941_544_065_183_020_8, 0.949_528_180_593_036_7,
    0.956_940_335_732_208_8, 0.963_776_065_795_439_8, 0.970_031_253_194_544, 0.975_702_130_038_528_6,
    0.980_785_280_403_230_4, 0.985_277_642_388_941_2, 0.989_176_509_964_781, 0.992_479_534_598_71,
    0.995_184_726_672_196_9, 0.997_290_456_678_690_2, 0.998_795_456_205_172_4, 0.999_698_818_696_204_2,
    1.0,
];

#[cfg(test)]
mod tests {
    /// Angles that decide: half turns counted in f32, ties that the coefficients move, both sides of 10 000, and values
    /// above it that a fused multiply-add would change. Bits of (angle, torch's value), torch 2.15.
    const SINES: [(u32, u32); 9] = [
        (0x41c9_0992, 0xbb49_1430), // 25.13
        (0x3fda_0b56, 0x3f7d_c00b), // 1.703
        (0x45e8_225f, 0x3f7f_fffe), // 7428
        (0x4601_845f, 0x3f7f_fffe), // 8289
        (0x461c_4000, 0xbe9c_797d), // 10 000
        (0x461c_4001, 0xbe9c_f359),
        (0x461c_58cb, 0xbe65_19a7), // 10 006.198
        (0x461c_5922, 0xbe9c_7bb7), // 10 006.283
        (0x47ff_ff80, 0xbf13_430a), // 131 071
    ];
    const COSINES: [(u32, u32); 11] = [
        (0x0000_0000, 0x3f80_0000), // 0
        (0x398c_2f66, 0x3f80_0000), // 0.000267
        (0x3b31_91a8, 0x3f7f_ffc3), // 0.0027
        (0x3e07_6f60, 0x3f7d_c3a0), // 0.132
        (0x454c_fd2b, 0x3f80_0000), // 3280
        (0x45d7_fc09, 0x3f7f_fffe), // 6911
        (0x461c_4000, 0xbf73_c074), // 10 000
        (0x461c_4001, 0xbf73_acdd),
        (0x461c_5b90, 0xbf1b_7e05), // 10 006.891
        (0x4621_d716, 0xbf7f_8c0d), // 10 357.771
        (0x47ff_ff80, 0xbf51_675e), // 131 071
    ];

    #[test]
    fn sines_and_cosines_have_the_bits_of_pytorch() {
        let check = |name, f: fn(f32) -> f32, values: &[(u32, u32)]| {
            for &(angle, value) in values {
                let (angle, value) = (f32::from_bits(angle), f32::from_bits(value));
                assert_eq!(f(angle).to_bits(), value.to_bits(), "{name} {angle}: {} for {value}", f(angle));
            }
        };
        check("sin", super::sin, &SINES);
        check("cos", super::cos, &COSINES);
    }
}
