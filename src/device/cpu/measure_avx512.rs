//! The pass that every tensor takes, with AVX-512: left to itself, the compiler shuffles lanes for longer than it adds.
//! Lane by lane the sums are those of `measure`'s own loops.

use std::arch::x86_64::*;
use std::ops::Range;

use super::measure::{Ordinary, RUN, Rows};

/// Of these groups of [`RUN`] elements, in rows of W.
#[inline]
#[target_feature(enable = "avx512f,popcnt")]
pub fn of_groups<'a, const W: usize>(rows: impl Rows<'a>, groups: Range<usize>) -> Ordinary {
    let ones = _mm512_set1_epi32(-1);
    let (mut largest, mut smallest, mut zero) = (_mm512_setzero_si512(), ones, 0);
    let mut sums = [_mm512_setzero_pd(); 2];
    for group in groups {
        let (mut squares, mut least) = (_mm512_setzero_ps(), ones);
        each::<W>(rows, group, |x| {
            let magnitude = magnitude(x);
            largest = _mm512_max_epu32(largest, magnitude);
            least = _mm512_min_epu32(least, magnitude);
            squares = _mm512_fmadd_ps(x, x, squares);
        });
        join(&mut sums, squares);
        if _mm512_testn_epi32_mask(least, least) == 0 {
            smallest = _mm512_min_epu32(smallest, _mm512_add_epi32(least, ones));
            continue;
        }
        // Few groups have zeros: counting them in every one would take a quarter of the pass.
        each::<W>(rows, group, |x| {
            let magnitude = magnitude(x);
            smallest = _mm512_min_epu32(smallest, _mm512_add_epi32(magnitude, ones));
            zero += _mm512_testn_epi32_mask(magnitude, magnitude).count_ones();
        });
    }
    fold(largest, smallest, zero, sums)
}

/// Shows `f` a group's elements, which lie in rows of W.
#[inline]
#[target_feature(enable = "avx512f")]
fn each<'a, const W: usize>(rows: impl Rows<'a>, group: usize, mut f: impl FnMut(__m512)) {
    for i in 0..RUN / W {
        let row = rows.row(group * (RUN / W) + i);
        assert!(row.len() == W, "a row of {} in a group", row.len());
        for chunk in row.as_chunks::<16>().0 {
            // SAFETY: sixteen elements.
            f(unsafe { _mm512_loadu_ps(chunk.as_ptr()) });
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn magnitude(x: __m512) -> __m512i {
    _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff))
}

/// Adds sixteen sums to f64 ones, eight and eight.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn join(sums: &mut [__m512d; 2], of: __m512) {
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(of)));
    sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(of)));
    sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(high));
}

/// All lanes'; `smallest` of magnitudes − 1.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn fold(largest: __m512i, smallest: __m512i, zero: u32, sums: [__m512d; 2]) -> Ordinary {
    Ordinary {
        largest: _mm512_reduce_max_epu32(largest),
        smallest: _mm512_reduce_min_epu32(smallest),
        zero,
        squares: _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1])),
    }
}
