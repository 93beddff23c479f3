//! Sums for checksums with AVX-512: left to itself, the compiler folds lanes for longer than it adds.

use std::arch::x86_64::*;

use super::measure_avx512::join;
use crate::device::checks::DEEP;

/// Adds Σ x and Σ |x| of each run.
#[target_feature(enable = "avx512f")]
pub fn add_runs<'r>(run: impl Fn(usize) -> &'r mut [f32], sums: &mut [f32], sizes: &mut [f32]) {
    for (i, (sum, size)) in sums.iter_mut().zip(sizes).enumerate() {
        let (x, magnitude) = of_row(run(i));
        *sum += x as f32;
        *size += magnitude as f32;
    }
}

/// Σ x and Σ |x|, in f32 along a register's lanes and as two registers are added, in f64 across them.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn of_row(row: &[f32]) -> (f64, f64) {
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
        let there = ((1u32 << some.len()) - 1) as __mmask16;
        // SAFETY: only elements that are there are read.
        add(half, unsafe { _mm512_maskz_loadu_ps(there, some.as_ptr()) });
    }
    (fold(_mm512_add_ps(sums[0], sums[1])), fold(_mm512_add_ps(sizes[0], sizes[1])))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn fold(x: __m512) -> f64 {
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x)));
    _mm512_reduce_add_pd(_mm512_cvtps_pd(_mm256_add_ps(_mm512_castps512_ps256(x), high)))
}

/// Adds Σ factor·x and Σ weight·|x| of each lane of a panel of W lanes, in N registers, of PER elements of depth a unit
/// (of two bf16 the earlier in the low half); chains of at most [`DEEP`] in f32, one an element of a unit.
#[target_feature(enable = "avx512f")]
pub fn of_panel<const W: usize, const N: usize, const PER: usize>(
    panel: &[u32],
    (factors, weights): (&[f32], &[f32]),
    (sums, sizes): (&mut [f64], &mut [f64]),
) {
    let zero = [_mm512_setzero_pd(); 2];
    let mut totals = [[zero; N]; 2];
    let (factors, weights) = (factors.as_chunks::<PER>().0, weights.as_chunks::<PER>().0);
    let units = panel.as_chunks::<W>().0;
    let together = DEEP / PER;
    for ((units, factors), weights) in
        units.chunks(together).zip(factors.chunks(together)).zip(weights.chunks(together))
    {
        let mut chains = [[[_mm512_setzero_ps(); N]; PER]; 2];
        for ((unit, factor), weight) in units.iter().zip(factors).zip(weights) {
            for register in 0..N {
                let there = ((1u32 << (W - 16 * register).min(16)) - 1) as __mmask16;
                // SAFETY: only elements that are there are read.
                let lanes = unsafe { _mm512_maskz_loadu_epi32(there, unit[16 * register..].as_ptr().cast()) };
                for element in 0..PER {
                    let x = _mm512_castsi512_ps(match (PER, element) {
                        (1, _) => lanes,
                        (_, 0) => _mm512_slli_epi32::<16>(lanes),
                        _ => _mm512_and_si512(lanes, _mm512_set1_epi32(!0xffff)),
                    });
                    let [sum, size] = &mut chains;
                    let (sum, size) = (&mut sum[element][register], &mut size[element][register]);
                    *sum = _mm512_fmadd_ps(x, _mm512_set1_ps(factor[element]), *sum);
                    *size = _mm512_fmadd_ps(_mm512_abs_ps(x), _mm512_set1_ps(weight[element]), *size);
                }
            }
        }
        for (totals, chains) in totals.iter_mut().zip(&chains) {
            for chains in chains {
                totals.iter_mut().zip(chains).for_each(|(total, chain)| join(total, *chain));
            }
        }
    }
    for (totals, to) in totals.iter().zip([sums, sizes]) {
        let mut lanes = [[0f64; 16]; N];
        for (lanes, [low, high]) in lanes.iter_mut().zip(totals) {
            // SAFETY: eight elements of the sixteen.
            unsafe { _mm512_storeu_pd(lanes.as_mut_ptr(), *low) };
            // SAFETY: the other eight.
            unsafe { _mm512_storeu_pd(lanes[8..].as_mut_ptr(), *high) };
        }
        to.iter_mut().zip(lanes.as_flattened()).for_each(|(total, x)| *total += x);
    }
}
