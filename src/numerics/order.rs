//! In which order a product adds its terms, seen from outside.
//!
//! Masked ones (Xie, Gao, Wang, Xue, "Revealing floating-point accumulation orders", USENIX ATC 2025, arXiv
//! 2411.00442): with a huge M at term i, −M at term j and small equal terms elsewhere, everything that is added to M
//! before −M arrives is swamped. What survives counts the terms outside the smallest subtree of the summation that
//! holds both i and j. All pairs together determine the tree.

use serde::Serialize;

use super::{Arithmetic, Multiplier, Order, Rounding, Sum};
use crate::device::Compute;
use crate::{Error, Result};

/// Terms whose every pair is asked.
pub const TERMS: usize = 64;
/// Terms of a long product, where a library may cut k into parts.
pub const LONG: usize = 4096;

/// The order in words that can be compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Found {
    /// Blocks of `block` terms, each added at once with the accumulator, one after another.
    Sequential { block: usize },
    /// As before, with the two halves of each pair of terms swapped (the second is added first).
    SequentialSwapped,
    /// Several accumulators; block b goes to accumulator b mod lanes.
    Lanes { lanes: usize, block: usize },
    /// A balanced tree over blocks.
    Pairwise { block: usize },
    /// Nothing was swamped: the sum is exact over all terms.
    Exact,
    /// None of these: sizes of the smallest subtrees of the first term with each other one.
    Other { with_first: Vec<usize> },
}

/// How many terms lie below the lowest common node of every pair (i < j), row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Subtrees {
    terms: usize,
    sizes: Vec<usize>,
}

/// Sizes of the values that swamp and of those that are swamped: products of two operands.
fn magnitudes(compute: Compute) -> (f32, f32) {
    match compute {
        // 2^30 against 2^-20: far more than any accumulator's bits apart, within fp16's range.
        Compute::F16 => (2f32.powi(15), 2f32.powi(-10)),
        Compute::F32 | Compute::Tf32 | Compute::Bf16 => (2f32.powi(40), 2f32.powi(-30)),
    }
}

/// Terms that lie below the lowest common node of i and j, for the pairs asked.
fn ask(multiplier: &dyn Multiplier, terms: usize, pairs: &[(usize, usize)]) -> Result<Vec<usize>> {
    let (huge, small) = magnitudes(multiplier.operand());
    // fp16 reaches far enough only as huge · huge against small · small, so every pair has a vector b of its own.
    let mut sizes = Vec::with_capacity(pairs.len());
    for &(i, j) in pairs {
        let (mut a, mut b) = (vec![small; terms], vec![small; terms]);
        (a[i], b[i], a[j], b[j]) = (huge, huge, -huge, huge);
        let left = multiplier.dots(&a, &b)?.first().copied().unwrap_or(f32::NAN) / (small * small);
        let swamped = terms as f32 - left;
        if !(2.0..=terms as f32).contains(&swamped) || swamped.fract() != 0.0 {
            return Err(Error::input(format!("a product of masked ones left {left} of {terms} terms")));
        }
        sizes.push(swamped as usize);
    }
    Ok(sizes)
}

fn every_pair(terms: usize) -> Vec<(usize, usize)> {
    (0..terms).flat_map(|i| (i + 1..terms).map(move |j| (i, j))).collect()
}

/// Orders that have a name, with the arithmetic that shows what they look like.
fn named(terms: usize) -> Vec<(Found, Arithmetic)> {
    let fused = |block, order| Arithmetic {
        block,
        order,
        sum: if block == 1 { Sum::Exact } else { Sum::Aligned { fraction_bits: 24 } },
        rounding: Rounding::NearestEven,
        ..Arithmetic::FMA
    };
    let blocks = [1usize, 2, 4, 8, 16, 32];
    let mut all: Vec<(Found, Arithmetic)> =
        blocks.iter().map(|&block| (Found::Sequential { block }, fused(block, Order::Sequential))).collect();
    for block in blocks {
        for lanes in [2usize, 4, 8, 16, 32].into_iter().filter(|lanes| lanes * block < terms) {
            all.push((Found::Lanes { lanes, block }, fused(block, Order::Lanes { lanes })));
        }
        all.push((Found::Pairwise { block }, fused(block, Order::Pairwise)));
    }
    all
}

/// The order of a product of [`TERMS`] terms.
///
/// # Errors
/// Those of the product; a result that no order of additions gives.
pub fn of(multiplier: &dyn Multiplier) -> Result<Found> {
    let pairs = every_pair(TERMS);
    let seen = Subtrees { terms: TERMS, sizes: ask(multiplier, TERMS, &pairs)? };
    if seen.sizes.iter().all(|&size| size == 2) {
        return Ok(Found::Exact);
    }
    let swapped: Vec<usize> = pairs.iter().map(|&(i, j)| ((i ^ 1).max(j ^ 1) + 1).max(2)).collect();
    if seen.sizes == swapped {
        return Ok(Found::SequentialSwapped);
    }
    for (found, model) in named(TERMS) {
        // The first pairs rule most of them out.
        let few = &pairs[..TERMS - 1];
        if ask(&model, TERMS, few)? == seen.sizes[..few.len()] && ask(&model, TERMS, &pairs)? == seen.sizes {
            return Ok(found);
        }
    }
    Ok(Found::Other { with_first: seen.sizes[..seen.terms - 1].to_vec() })
}

/// Distance of the ones in a long product: few enough for a partial sum of 8 bits to count them.
const SPARSE: usize = 16;

/// Where a product of [`LONG`] terms starts partial sums of their own, to [`SPARSE`] terms, as far as one probe per half
/// octave tells.
///
/// # Errors
/// As [`of`].
pub fn cuts(multiplier: &dyn Multiplier) -> Result<Vec<usize>> {
    let (huge, small) = magnitudes(multiplier.operand());
    let places = (4..).flat_map(|p| [1usize << p, 3 << (p - 1)]).take_while(|&j| j + 1 < LONG);
    let mut starts = Vec::new();
    for j in places.map(|j| j + 1) {
        let one = |k: usize| if k.is_multiple_of(SPARSE) { small } else { 0.0 };
        let (mut a, mut b): (Vec<f32>, Vec<f32>) = (0..LONG).map(|k| (one(k), one(k))).unzip();
        (a[j], b[j], a[j + 1], b[j + 1]) = (huge, huge, -huge, huge);
        let left = multiplier.dots(&a, &b)?.first().copied().unwrap_or(f32::NAN) / (small * small);
        let swamped = (LONG / SPARSE) as f32 - left;
        if !(0.0..=(LONG / SPARSE) as f32).contains(&swamped) || swamped.fract() != 0.0 {
            return Err(Error::input(format!("a product of {LONG} masked ones left {left} of {}", LONG / SPARSE)));
        }
        // In one sequence the subtree of two neighbours reaches back to term 0; in a part of its own, to its start.
        starts.push((j / SPARSE + 1).saturating_sub(swamped as usize) * SPARSE);
    }
    starts.retain(|&start| start > 0);
    starts.sort_unstable();
    starts.dedup();
    Ok(starts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_named_order_is_recognised_and_no_two_look_alike() {
        for (name, model) in named(TERMS) {
            let found = of(&model).unwrap_or(Found::Exact);
            let same = found == name
                // A tree over one-term blocks of f32 adds and one over two-term blocks meet in the same nodes.
                || matches!((&found, &name), (Found::Pairwise { .. }, Found::Pairwise { .. }));
            assert!(same, "{name:?} looks like {found:?}");
        }
    }

    #[test]
    fn an_exact_sum_swamps_nothing() {
        let exact = Arithmetic { block: TERMS, ..Arithmetic::FMA };
        assert_eq!(of(&exact).ok(), Some(Found::Exact));
    }

    /// A library that sums k in parts of 1024 and adds the parts.
    struct InParts;

    impl Multiplier for InParts {
        fn operand(&self) -> Compute {
            Compute::F32
        }
        fn dots(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
            let parts = a.chunks(1024).zip(b.chunks(1024));
            Ok(vec![parts.map(|(a, b)| Arithmetic::FMA.dot(a, b)).sum()])
        }
    }

    #[test]
    fn a_long_sequence_has_no_cut_and_parts_show_where_they_start() {
        assert_eq!(cuts(&Arithmetic::FMA).ok(), Some(vec![]));
        assert_eq!(cuts(&InParts).ok(), Some(vec![1024, 2048, 3072]));
    }
}
