//! The pass that every tensor takes, of bf16 elements with AVX512-BF16: a register holds two registers' worth of them, and
//! one instruction adds the squares of both (a product of two bf16 is exact in f32).

use std::arch::x86_64::*;

use super::measure::{Ordinary, PAIRED, Rows};
use super::measure_avx512::{fold, join};

/// Elements that a register holds.
const TOGETHER: usize = 32;

/// Of the first `groups` · [`PAIRED`] elements, in rows of W.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16,popcnt")]
pub fn of_groups<'a, const W: usize>(rows: impl Rows<'a>, groups: usize) -> Ordinary {
    let ones = _mm512_set1_epi16(-1);
    let (mut largest, mut smallest, mut zero) = (_mm512_setzero_si512(), ones, 0);
    let mut sums = [_mm512_setzero_pd(); 2];
    for group in 0..groups {
        let (mut squares, mut least) = (_mm512_setzero_ps(), ones);
        each::<W>(rows, group, |magnitudes| {
            largest = _mm512_max_epu16(largest, magnitudes);
            least = _mm512_min_epu16(least, magnitudes);
            // SAFETY: both are 32 bf16.
            let pairs = unsafe { std::mem::transmute::<__m512i, __m512bh>(magnitudes) };
            squares = _mm512_dpbf16_ps(squares, pairs, pairs);
        });
        join(&mut sums, squares);
        if _mm512_testn_epi16_mask(least, least) == 0 {
            smallest = _mm512_min_epu16(smallest, _mm512_add_epi16(least, ones));
            continue;
        }
        // Not every group has zeros: counting them takes as long as all the rest.
        each::<W>(rows, group, |magnitudes| {
            smallest = _mm512_min_epu16(smallest, _mm512_add_epi16(magnitudes, ones));
            zero += _mm512_testn_epi16_mask(magnitudes, magnitudes).count_ones();
        });
    }
    let [a, b] = apart(largest);
    // Magnitudes − 1 once more, now of f32.
    let [c, d] = apart(_mm512_sub_epi16(smallest, ones)).map(|x| _mm512_add_epi32(x, _mm512_set1_epi32(-1)));
    fold(_mm512_max_epu32(a, b), _mm512_min_epu32(c, d), zero, sums)
}

/// Shows `f` the magnitudes of a group's elements, which lie in rows of W: those of the second sixteen of 32 neighbours,
/// each with one of the first sixteen in its lower half, which is zero in an f32 that holds a bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn each<'a, const W: usize>(rows: impl Rows<'a>, group: usize, mut f: impl FnMut(__m512i)) {
    /// Of three operands: (a | b) & c.
    const OR_THEN_AND: i32 = 0b1010_1000;
    for i in 0..PAIRED / W {
        let row = rows.row(group * (PAIRED / W) + i);
        assert!(row.len() == W, "a row of {} in a group", row.len());
        for chunk in row.as_chunks::<TOGETHER>().0 {
            // SAFETY: 32 elements.
            let [first, second] = [0, 16].map(|at| unsafe { _mm512_loadu_si512(chunk[at..].as_ptr().cast()) });
            let first = _mm512_srli_epi32::<16>(first);
            f(_mm512_ternarylogic_epi32::<OR_THEN_AND>(second, first, _mm512_set1_epi16(0x7fff)));
        }
    }
}

/// What `each` put together, as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn apart(x: __m512i) -> [__m512i; 2] {
    [_mm512_slli_epi32::<16>(x), _mm512_and_si512(x, _mm512_set1_epi32(!0xffff))]
}
