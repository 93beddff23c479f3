//! Sums for checksums with AVX-512: left to itself, the compiler folds lanes for longer than it adds.

use std::arch::x86_64::*;

use super::measure_avx512::join;
use crate::device::checks::DEEP;

/// Adds Σ x and Σ |x| of each run, in f32; the lanes of sixteen runs are folded together.
#[target_feature(enable = "avx512f")]
pub fn add_runs<'r>(run: impl Fn(usize) -> &'r [f32], sums: &mut [f32], sizes: &mut [f32]) {
    let groups = sums.chunks_mut(16).zip(sizes.chunks_mut(16));
    for (group, (sums, sizes)) in groups.enumerate() {
        let (mut all_sums, mut all_sizes) = ([_mm512_setzero_ps(); 16], [_mm512_setzero_ps(); 16]);
        for i in 0..sums.len() {
            (all_sums[i], all_sizes[i]) = lanes_of(run(16 * group + i));
        }
        let there = first(sums.len());
        for (all, to) in [(all_sums, sums), (all_sizes, sizes)] {
            // SAFETY: only elements that are there are read and written.
            unsafe {
                let before = _mm512_maskz_loadu_ps(there, to.as_ptr());
                _mm512_mask_storeu_ps(to.as_mut_ptr(), there, _mm512_add_ps(before, fold_together(all)));
            }
        }
    }
}

/// The sum of each register's lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn fold_together(x: [__m512; 16]) -> __m512 {
    // Neighbours' sums side by side: 16 registers become 8, 4, 2, 1.
    let mut eight = [_mm512_setzero_ps(); 8];
    for (y, pair) in eight.iter_mut().zip(x.as_chunks::<2>().0) {
        *y = _mm512_add_ps(_mm512_unpacklo_ps(pair[0], pair[1]), _mm512_unpackhi_ps(pair[0], pair[1]));
    }
    let mut four = [_mm512_setzero_ps(); 4];
    for (y, pair) in four.iter_mut().zip(eight.as_chunks::<2>().0) {
        let [a, b] = pair.map(|x| _mm512_castps_pd(x));
        let (low, high) = (_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
        *y = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    }
    // Each quarter of a register now holds part of the sums of four; quarters of four registers are added.
    let even_and_odd = |a, b| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
    even_and_odd(even_and_odd(four[0], four[1]), even_and_odd(four[2], four[3]))
}

/// Lanes whose sums are Σ x and Σ |x|.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes_of(row: &[f32]) -> (__m512, __m512) {
    let (mut sums, mut sizes) = ([_mm512_setzero_ps(); 2], [_mm512_setzero_ps(); 2]);
    let mut add = |half: usize, x: __m512| {
        sums[half] = _mm512_add_ps(sums[half], x);
        sizes[half] = _mm512_add_ps(sizes[half], _mm512_abs_ps(x));
    };
    let (pairs, rest) = row.as_chunks::<32>();
    for pair in pairs {
        for half in 0..2 {
            // SAFETY: sixteen elements of the 32.
            add(half, unsafe { _mm512_loadu_ps(pair[16 * half..].as_ptr()) });
        }
    }
    for (half, some) in rest.chunks(16).enumerate() {
        // SAFETY: only elements that are there are read.
        add(half, unsafe { _mm512_maskz_loadu_ps(first(some.len()), some.as_ptr()) });
    }
    (_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sizes[0], sizes[1]))
}

/// The first n of sixteen lanes.
fn first(n: usize) -> __mmask16 {
    ((1u32 << n.min(16)) - 1) as __mmask16
}

/// Adds Σ factor·x and Σ weight·|x| of each lane of a panel of W lanes, in N registers; chains of at most [`DEEP`] in f32.
#[target_feature(enable = "avx512f")]
pub fn of_panel<const W: usize, const N: usize>(
    panel: &[u32],
    (factors, weights): (&[f32], &[f32]),
    (sums, sizes): (&mut [f32], &mut [f32]),
) {
    let zero = [_mm512_setzero_pd(); 2];
    let (mut all_sums, mut all_sizes) = ([zero; N], [zero; N]);
    let units = panel.as_chunks::<W>().0;
    for ((units, factors), weights) in units.chunks(DEEP).zip(factors.chunks(DEEP)).zip(weights.chunks(DEEP)) {
        let (mut sum, mut size) = ([_mm512_setzero_ps(); N], [_mm512_setzero_ps(); N]);
        for ((unit, factor), weight) in units.iter().zip(factors).zip(weights) {
            for register in 0..N {
                let x = _mm512_castsi512_ps(lanes(unit, register));
                sum[register] = _mm512_fmadd_ps(x, _mm512_set1_ps(*factor), sum[register]);
                size[register] = _mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(*weight), size[register]);
            }
        }
        all_sums.iter_mut().zip(sum).for_each(|(total, chain)| join(total, chain));
        all_sizes.iter_mut().zip(size).for_each(|(total, chain)| join(total, chain));
    }
    add_lanes(&all_sums, sums, |x| x);
    add_lanes(&all_sizes, sizes, |x| x);
}

/// The same of pairs of bf16, the earlier in the low half; but what is added to the sizes is ‖x‖·`norm`, which is no less
/// than Σ weight·|x| where `norm` is the weights' (Cauchy and Schwarz) and takes a third fewer instructions.
#[target_feature(enable = "avx512f,avx512bf16")]
pub fn of_pairs<const W: usize, const N: usize>(
    panel: &[u32],
    (factors, norm): (&[f32], f64),
    (sums, sizes): (&mut [f32], &mut [f32]),
) {
    let zero = [_mm512_setzero_pd(); 2];
    let (mut all_sums, mut all_squares) = ([zero; N], [zero; N]);
    let (units, factors) = (panel.as_chunks::<W>().0, factors.as_chunks::<2>().0);
    for (units, factors) in units.chunks(DEEP / 2).zip(factors.chunks(DEEP / 2)) {
        let (mut early, mut late) = ([_mm512_setzero_ps(); N], [_mm512_setzero_ps(); N]);
        let mut squares = [_mm512_setzero_ps(); N];
        for (unit, factor) in units.iter().zip(factors) {
            for register in 0..N {
                let pairs = lanes(unit, register);
                let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                let second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(!0xffff)));
                early[register] = _mm512_fmadd_ps(first, _mm512_set1_ps(factor[0]), early[register]);
                late[register] = _mm512_fmadd_ps(second, _mm512_set1_ps(factor[1]), late[register]);
                // SAFETY: only renames the type of a register.
                let pairs = unsafe { std::mem::transmute::<__m512i, __m512bh>(pairs) };
                squares[register] = _mm512_dpbf16_ps(squares[register], pairs, pairs);
            }
        }
        all_sums.iter_mut().zip(early).for_each(|(total, chain)| join(total, chain));
        all_sums.iter_mut().zip(late).for_each(|(total, chain)| join(total, chain));
        all_squares.iter_mut().zip(squares).for_each(|(total, chain)| join(total, chain));
    }
    add_lanes(&all_sums, sums, |x| x);
    // Squares too small for f32 count as nothing in the sum.
    let lost = 2.0 * units.len() as f64 * 2f64.powi(-125);
    add_lanes(&all_squares, sizes, |squares| (squares + lost).sqrt() * norm);
}

/// Sixteen lanes of a unit, zeros past the end.
#[inline]
#[target_feature(enable = "avx512f")]
fn lanes<const W: usize>(unit: &[u32; W], register: usize) -> __m512i {
    // SAFETY: only elements that are there are read.
    unsafe { _mm512_maskz_loadu_epi32(first(W - 16 * register), unit[16 * register..].as_ptr().cast()) }
}

/// Adds a function of each lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_lanes(registers: &[[__m512d; 2]], to: &mut [f32], of: impl Fn(f64) -> f64) {
    for (to, [low, high]) in to.chunks_mut(16).zip(registers) {
        let mut lanes = [0f64; 16];
        // SAFETY: eight elements of the sixteen.
        unsafe { _mm512_storeu_pd(lanes.as_mut_ptr(), *low) };
        // SAFETY: the other eight.
        unsafe { _mm512_storeu_pd(lanes[8..].as_mut_ptr(), *high) };
        to.iter_mut().zip(lanes).for_each(|(total, x)| *total += of(x) as f32);
    }
}
