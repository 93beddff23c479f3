//! The pass that every tensor takes, with AVX-512: left to itself, the compiler shuffles lanes for longer than it adds.
//! Lane by lane the sums are those of [`Ordinary`]'s own loops.

use std::arch::x86_64::*;

use super::measure::{Ordinary, RUN, Rows};

/// [`Ordinary`] in registers; f64 lanes in two halves.
struct Registers {
    largest: __m512i,
    smallest: __m512i,
    zero: __m512i,
    squares: [__m512d; 2],
    sum: [__m512d; 2],
}

/// Adds the first `groups` · [`RUN`] elements, in rows of W.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn take<'a, const W: usize>(lanes: &mut Ordinary, rows: impl Rows<'a>, groups: usize) {
    let mut all = load(lanes);
    let ones = _mm512_set1_epi32(-1);
    for group in 0..groups {
        let (mut squares, mut sum, mut smallest) = (_mm512_setzero_ps(), _mm512_setzero_ps(), ones);
        each::<W>(rows, group, |x| {
            let magnitude = magnitude(x);
            all.largest = _mm512_max_epu32(all.largest, magnitude);
            smallest = _mm512_min_epu32(smallest, magnitude);
            squares = _mm512_fmadd_ps(x, x, squares);
            sum = _mm512_add_ps(sum, x);
        });
        join(&mut all.squares, squares);
        join(&mut all.sum, sum);
        if _mm512_testn_epi32_mask(smallest, smallest) == 0 {
            all.smallest = _mm512_min_epu32(all.smallest, _mm512_add_epi32(smallest, ones));
            continue;
        }
        // Few groups have zeros: counting them in every one would take a quarter of the pass.
        each::<W>(rows, group, |x| {
            let magnitude = magnitude(x);
            all.smallest = _mm512_min_epu32(all.smallest, _mm512_add_epi32(magnitude, ones));
            let zero = _mm512_testn_epi32_mask(magnitude, magnitude);
            all.zero = _mm512_mask_sub_epi32(all.zero, zero, all.zero, ones);
        });
    }
    store(&all, lanes);
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

#[inline]
#[target_feature(enable = "avx512f")]
fn join(all: &mut [__m512d; 2], of: __m512) {
    let high = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(of)));
    all[0] = _mm512_add_pd(all[0], _mm512_cvtps_pd(_mm512_castps512_ps256(of)));
    all[1] = _mm512_add_pd(all[1], _mm512_cvtps_pd(high));
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(lanes: &Ordinary) -> Registers {
    // SAFETY: each array has sixteen elements, and a half of it eight.
    unsafe {
        Registers {
            largest: _mm512_loadu_si512(lanes.largest.as_ptr().cast()),
            smallest: _mm512_loadu_si512(lanes.smallest.as_ptr().cast()),
            zero: _mm512_loadu_si512(lanes.zero.as_ptr().cast()),
            squares: [_mm512_loadu_pd(lanes.squares.as_ptr()), _mm512_loadu_pd(lanes.squares[8..].as_ptr())],
            sum: [_mm512_loadu_pd(lanes.sum.as_ptr()), _mm512_loadu_pd(lanes.sum[8..].as_ptr())],
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(all: &Registers, lanes: &mut Ordinary) {
    // SAFETY: as above.
    unsafe {
        _mm512_storeu_si512(lanes.largest.as_mut_ptr().cast(), all.largest);
        _mm512_storeu_si512(lanes.smallest.as_mut_ptr().cast(), all.smallest);
        _mm512_storeu_si512(lanes.zero.as_mut_ptr().cast(), all.zero);
        for half in 0..2 {
            _mm512_storeu_pd(lanes.squares[8 * half..].as_mut_ptr(), all.squares[half]);
            _mm512_storeu_pd(lanes.sum[8 * half..].as_mut_ptr(), all.sum[half]);
        }
    }
}
