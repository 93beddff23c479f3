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
    let (sign, ones) = (_mm512_set1_epi32(0x7fff_ffff), _mm512_set1_epi32(-1));
    for group in 0..groups {
        let (mut squares, mut sum) = (_mm512_setzero_ps(), _mm512_setzero_ps());
        for i in 0..RUN / W {
            for chunk in rows.row(group * (RUN / W) + i).as_chunks::<16>().0 {
                // SAFETY: sixteen elements.
                let x = unsafe { _mm512_loadu_ps(chunk.as_ptr()) };
                let magnitude = _mm512_and_si512(_mm512_castps_si512(x), sign);
                all.largest = _mm512_max_epu32(all.largest, magnitude);
                all.smallest = _mm512_min_epu32(all.smallest, _mm512_add_epi32(magnitude, ones));
                let zero = _mm512_testn_epi32_mask(magnitude, magnitude);
                all.zero = _mm512_mask_sub_epi32(all.zero, zero, all.zero, ones);
                squares = _mm512_fmadd_ps(x, x, squares);
                sum = _mm512_add_ps(sum, x);
            }
        }
        join(&mut all.squares, squares);
        join(&mut all.sum, sum);
    }
    store(&all, lanes);
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
