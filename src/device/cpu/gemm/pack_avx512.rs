//! Packing with AVX-512, for operands whose stored values need no rounding: 16 lanes × 16 units at a time, straight from
//! memory to the panel. [`super::pack`] does everything else.

use std::arch::x86_64::*;
use std::ops::Range;

use super::kernel::Kernel;
use super::pack::Matrix;
use crate::device::DType;
use crate::device::cpu::values::Elements;

/// What lies in memory and what a unit is made of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// f32 to f32.
    Whole,
    /// bf16 to pairs of bf16.
    Halves,
    /// f32 that hold bf16 values, to pairs of bf16.
    Narrow,
    /// bf16 to f32.
    Widen,
}

/// Packs as [`super::pack::pack`] does, if this file knows how; false if it does not, and nothing was written.
/// Contiguous lanes are read across all panels at once, in the order in which they lie in memory.
pub fn pack(
    matrix: &Matrix<'_>,
    lanes: Range<usize>,
    depth: Range<usize>,
    width: usize,
    kernel: &Kernel,
    out: &mut [u32],
) -> bool {
    let (source, bytes, size) = match (matrix.elements, kernel.per_unit) {
        (Elements::Wide(x), 1) => (Source::Whole, bytemuck::cast_slice(x), 4),
        (Elements::Wide(x), _) => (Source::Narrow, bytemuck::cast_slice(x), 4),
        (Elements::Packed(bytes, DType::F32), 1) => (Source::Whole, bytes, 4),
        (Elements::Packed(bytes, DType::BF16), 1) => (Source::Widen, bytes, 2),
        (Elements::Packed(bytes, DType::BF16), _) => (Source::Halves, bytes, 2),
        _ => return false,
    };
    if lanes.is_empty() || depth.is_empty() {
        return false;
    }
    let last = matrix.at + (lanes.end - 1) * matrix.lane + (depth.end - 1) * matrix.depth;
    let units = depth.len().div_ceil(kernel.per_unit);
    assert!(matrix.lane == 1 || matrix.depth == 1, "one stride of an operand is 1");
    let panels = lanes.len().div_ceil(width);
    assert!(bytes.len() >= (last + 1) * size && width <= 32 && out.len() == panels * units * width);
    let first = (matrix.at + lanes.start * matrix.lane + depth.start * matrix.depth) * size;
    let view = View {
        // SAFETY: inside the operand by the assertion on `last`.
        start: unsafe { bytes.as_ptr().add(first) },
        lane: matrix.lane * size,
        depth: matrix.depth * size,
        lanes: lanes.len(),
        elements: depth.len(),
    };
    if matrix.depth == 1 {
        for (panel, out) in out.chunks_exact_mut(units * width).enumerate() {
            let skipped = panel * width;
            // SAFETY: a panel has lanes of the operand (there are as many panels as the lanes need).
            let start = unsafe { view.start.add(skipped * view.lane) };
            let view = View { start, lanes: (view.lanes - skipped).min(width), ..view };
            // SAFETY: as below.
            unsafe {
                match source {
                    Source::Whole => pack_across::<WHOLE>(&view, width, out),
                    Source::Halves => pack_across::<HALVES>(&view, width, out),
                    Source::Narrow => pack_across::<NARROW>(&view, width, out),
                    Source::Widen => pack_across::<WIDEN>(&view, width, out),
                }
            }
        }
        return true;
    }
    // SAFETY: the caller checked for AVX-512 F, BW, VL; `view` lies inside the operand, `out` holds all units (asserted).
    unsafe {
        match source {
            Source::Whole => pack_along::<WHOLE>(&view, (width, units), out),
            Source::Halves => pack_along::<HALVES>(&view, (width, units), out),
            Source::Narrow => pack_along::<NARROW>(&view, (width, units), out),
            Source::Widen => pack_along::<WIDEN>(&view, (width, units), out),
        }
    }
    true
}

/// The part of an operand to pack; strides in bytes.
#[derive(Clone, Copy)]
struct View {
    start: *const u8,
    lane: usize,
    depth: usize,
    lanes: usize,
    elements: usize,
}

/// Elements of depth by which loads are announced.
const AHEAD: usize = 16;

const WHOLE: u8 = Source::Whole as u8;
const HALVES: u8 = Source::Halves as u8;
const NARROW: u8 = Source::Narrow as u8;
const WIDEN: u8 = Source::Widen as u8;

/// The lowest n bits.
fn low16(n: usize) -> __mmask16 {
    if n >= 16 { 0xffff } else { (1 << n) - 1 }
}

/// Lanes that are contiguous in depth: blocks of 16 × 16 units, transposed.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_across<const SOURCE: u8>(view: &View, width: usize, out: &mut [u32]) {
    let pairs = SOURCE == HALVES || SOURCE == NARROW;
    let per_block = if pairs { 32 } else { 16 };
    let size = if SOURCE == WHOLE || SOURCE == NARROW { 4 } else { 2 };
    let units = out.len() / width;
    for lane in (0..width).step_by(16) {
        let wide = (width - lane).min(16);
        for (block, unit) in (0..units).step_by(16).enumerate() {
            let element = block * per_block;
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate().take(view.lanes.saturating_sub(lane).min(16)) {
                // SAFETY: lane and elements lie inside the view; lanes of memory past its elements are masked off.
                *row = unsafe {
                    let from = view.start.add((lane + i) * view.lane + element * size);
                    // Two blocks ahead: sixteen rows are more streams than the hardware follows. Into the second-level
                    // cache only: rows often lie so that they share a few sets of the first.
                    _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(2 * per_block * size).cast());
                    if SOURCE == NARROW {
                        _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(2 * per_block * size + 64).cast());
                    }
                    load_units::<SOURCE>(from, view.elements - element)
                };
            }
            let rows = transpose(rows);
            for (i, row) in rows.iter().enumerate().take((units - unit).min(16)) {
                let at = (unit + i) * width + lane;
                // A full store spills into the next unit, which is written afterwards.
                let mask = if at + 16 <= out.len() && lane + 16 >= width { 0xffff } else { low16(wide) };
                // SAFETY: `at` plus the lanes of the mask lie inside `out`.
                unsafe { _mm512_mask_storeu_epi32(out.as_mut_ptr().add(at).cast(), mask, *row) };
            }
        }
    }
}

/// 16 units of one lane from contiguous memory, of which `elements` exist.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_units<const SOURCE: u8>(from: *const u8, elements: usize) -> __m512i {
    // SAFETY (all loads): masks keep to the elements that exist.
    unsafe {
        match SOURCE {
            WHOLE => _mm512_maskz_loadu_epi32(low16(elements), from.cast()),
            HALVES => {
                let mask = if elements >= 32 { u32::MAX } else { (1u32 << elements) - 1 };
                _mm512_maskz_loadu_epi16(mask, from.cast())
            }
            NARROW => {
                let low = _mm512_maskz_loadu_epi32(low16(elements), from.cast());
                let high = _mm512_maskz_loadu_epi32(low16(elements.saturating_sub(16)), from.wrapping_add(64).cast());
                _mm512_permutex2var_epi16(low, upper_halves(), high)
            }
            _ => widen(_mm256_maskz_loadu_epi16(low16(elements), from.cast())),
        }
    }
}

/// Index of the upper 16 bits of each of 32 f32: the bf16 values in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn upper_halves() -> __m512i {
    // Unit i joins words 4i + 1 and 4i + 3.
    let units = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    _mm512_add_epi32(_mm512_mullo_epi32(units, _mm512_set1_epi32(0x0004_0004)), _mm512_set1_epi32(0x0003_0001))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn widen(halves: __m256i) -> __m512i {
    _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves))
}

/// out[unit][lane] = rows[lane][unit] of 32-bit units.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    let (mut t, mut u) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
    // Pairs of rows, pairs of pairs; then quarters of the registers, twice.
    for i in 0..8 {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for q in 0..4 {
        let i = 4 * q;
        u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for i in 0..4 {
        t[i] = _mm512_shuffle_i32x4::<0x88>(u[i], u[i + 4]);
        t[i + 4] = _mm512_shuffle_i32x4::<0xdd>(u[i], u[i + 4]);
        t[i + 8] = _mm512_shuffle_i32x4::<0x88>(u[i + 8], u[i + 12]);
        t[i + 12] = _mm512_shuffle_i32x4::<0xdd>(u[i + 8], u[i + 12]);
    }
    for i in 0..8 {
        u[i] = _mm512_shuffle_i32x4::<0x88>(t[i], t[i + 8]);
        u[i + 8] = _mm512_shuffle_i32x4::<0xdd>(t[i], t[i + 8]);
    }
    u
}

/// Lanes that are contiguous at each depth: unit by unit over all panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_along<const SOURCE: u8>(view: &View, (width, units): (usize, usize), out: &mut [u32]) {
    let pairs = SOURCE == HALVES || SOURCE == NARROW;
    let size = if SOURCE == WHOLE || SOURCE == NARROW { 4 } else { 2 };
    let last = out.len();
    let to = out.as_mut_ptr();
    for unit in 0..units {
        let element = if pairs { 2 * unit } else { unit };
        // SAFETY: the element lies inside the view.
        let from = unsafe { view.start.add(element * view.depth) };
        for line in (0..view.lanes * size).step_by(64) {
            // Rows lie far apart, which no hardware prefetcher follows.
            _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD * view.depth + line).cast());
            if pairs {
                _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add((AHEAD + 1) * view.depth + line).cast());
            }
        }
        // An odd depth ends with half a pair.
        let whole = element + 1 < view.elements;
        for panel in (0..view.lanes).step_by(width) {
            for lane in (0..width).step_by(16) {
                let mask = low16((view.lanes - panel).min(width).saturating_sub(lane));
                let second = if whole { mask } else { 0 };
                let at = panel * units + unit * width + lane;
                // What a full store spills into the panel's next unit is written again with that unit.
                let spills = unit + 1 < units && at + 16 <= last;
                let kept = if spills { 0xffff } else { low16(width - lane) };
                // SAFETY: loads keep to the lanes of the mask, which lie inside the view; `at` plus the lanes stored lie
                // inside `out`.
                unsafe {
                    let from = from.wrapping_add((panel + lane) * size);
                    let units = load_lanes::<SOURCE>(from, from.wrapping_add(view.depth), mask, second);
                    _mm512_mask_storeu_epi32(to.add(at).cast(), kept, units);
                }
            }
        }
    }
}

/// One unit of 16 lanes; pairs join one element of `first` with one of `second`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn load_lanes<const SOURCE: u8>(
    first: *const u8,
    second: *const u8,
    mask: __mmask16,
    mask_second: __mmask16,
) -> __m512i {
    // SAFETY (all loads): masks keep to the lanes that exist.
    unsafe {
        match SOURCE {
            WHOLE => _mm512_maskz_loadu_epi32(mask, first.cast()),
            HALVES => {
                let low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, first.cast()));
                _mm512_or_si512(low, widen(_mm256_maskz_loadu_epi16(mask_second, second.cast())))
            }
            NARROW => {
                let low = _mm512_srli_epi32::<16>(_mm512_maskz_loadu_epi32(mask, first.cast()));
                let high = _mm512_maskz_loadu_epi32(mask_second, second.cast());
                _mm512_mask_blend_epi16(0xaaaa_aaaa, low, high)
            }
            _ => widen(_mm256_maskz_loadu_epi16(mask, first.cast())),
        }
    }
}
