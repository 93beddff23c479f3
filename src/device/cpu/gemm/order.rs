//! The orders in which ATen's own kernels add the terms of fp16 products. PyTorch uses them on a CPU whose oneDNN has no
//! fp16 products (without AVX512-FP16; AMD Zen 4 was measured): aten/src/ATen/native/cpu/BlasKernel.cpp.
//!
//! An element of C is the sum of several chains over interleaved elements of the depth. Operands are packed chain after
//! chain, so that the kernels of [`super::kernel`] compute one at a time, for a whole tile.

use std::ops::Range;

/// Chains of an element whose operands both lie along the depth.
const LANES: usize = 64;
/// The same where the depth that is left is no multiple of [`LANES`] but of two registers of this length.
const REGISTER: usize = 8;
/// Chains of an element whose second operand lies across the depth.
const INTERLEAVED: usize = 4;

/// Where packed operands have each element of the depth, and how their products are added.
pub struct Order {
    /// By element of the depth.
    pub places: Vec<usize>,
    pub chains: Vec<Chain>,
}

/// Products that are added one after another, from zero, and what happens to their sum.
pub struct Chain {
    /// In the packed depth.
    pub elements: Range<usize>,
    /// Additions that follow, each of the latest two sums.
    pub additions: usize,
}

impl Order {
    /// x · Wᵀ (`fp16_dot_with_fp32_arith` of ReducedPrecisionFloatGemvFastPathKernel.cpp, built for AVX2): 64 chains,
    /// folded in halves; eight over what is left, folded and added; the last elements one by one.
    pub fn dot(k: usize) -> Self {
        let mut order = Self { places: vec![0; k], chains: Vec::new() };
        let (whole, registers) = (k / LANES * LANES, k / (2 * REGISTER) * 2 * REGISTER);
        order.fold::<LANES>(0..whole);
        order.fold::<REGISTER>(whole..registers);
        for element in registers..k {
            order.push(element..element + 1, 1, usize::from(element > 0));
        }
        order
    }

    /// dy · W (`gemm_notrans_` and its `sum`): four interleaved chains, added in turn; the first goes on to the last
    /// elements.
    pub fn interleaved(k: usize) -> Self {
        let mut order = Self { places: vec![0; k], chains: Vec::new() };
        let whole = k / INTERLEAVED * INTERLEAVED;
        order.push(0..whole, INTERLEAVED, 0);
        order.extend(whole..k);
        for first in 1..INTERLEAVED.min(whole) {
            order.push(first..whole, INTERLEAVED, 1);
        }
        order
    }

    /// N chains over the elements, by index modulo N, added in a tree whose first level adds those N / 2 apart; their
    /// sum is added to what is there.
    fn fold<const N: usize>(&mut self, elements: Range<usize>) {
        if elements.is_empty() {
            return;
        }
        let before = !self.chains.is_empty();
        for leaf in 0..N {
            // The leaves of the tree from left to right, closed as the carries of a binary counter.
            let lane = leaf.reverse_bits() >> (usize::BITS - N.trailing_zeros());
            let last = usize::from(before && leaf + 1 == N);
            self.push(elements.start + lane..elements.end, N, leaf.trailing_ones() as usize + last);
        }
    }

    /// A chain over every `step`-th of the elements.
    fn push(&mut self, elements: Range<usize>, step: usize, additions: usize) {
        let start = self.chains.last().map_or(0, |chain| chain.elements.end);
        self.chains.push(Chain { elements: start..start, additions });
        for element in elements.step_by(step) {
            self.extend(element..element + 1);
        }
    }

    /// The last chain goes on.
    fn extend(&mut self, elements: Range<usize>) {
        if let Some(chain) = self.chains.last_mut() {
            for element in elements {
                self.places[element] = chain.elements.end;
                chain.elements.end += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::noise::symmetric;

    /// The sum of `terms` as an order has it.
    fn sum(order: &Order, terms: &[f32]) -> f32 {
        let mut packed = vec![f32::NAN; terms.len()];
        order.places.iter().zip(terms).for_each(|(&place, &term)| packed[place] = term);
        let mut sums = vec![];
        for chain in &order.chains {
            sums.push(packed[chain.elements.clone()].iter().fold(0f32, |sum, term| sum + term));
            for _ in 0..chain.additions {
                let latest = sums.pop().expect("a sum");
                *sums.last_mut().expect("another") += latest;
            }
        }
        assert!(sums.len() <= 1);
        sums.pop().unwrap_or(0.0)
    }

    /// Both orders against ATen's loops, written as they are there.
    #[test]
    fn terms_are_added_as_aten_adds_them() {
        for k in (0..200).chain([352, 576, 1000]) {
            let terms: Vec<f32> = (0..k as u64).map(|i| symmetric(3, 0, i)).collect();
            let (whole, registers) = (k / 64 * 64, k / 16 * 16);
            let mut lanes = [0f32; 64];
            terms[..whole].chunks(64).for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(l, x)| *l += x));
            let mut rest = [0f32; 8];
            terms[whole..registers].chunks(8).for_each(|chunk| rest.iter_mut().zip(chunk).for_each(|(l, x)| *l += x));
            let halve = |lanes: &mut [f32]| {
                let mut width = lanes.len();
                while width > 1 {
                    width /= 2;
                    (0..width).for_each(|i| lanes[i] += lanes[width + i]);
                }
                lanes[0]
            };
            let both = halve(&mut lanes) + halve(&mut rest);
            let dot = terms[registers..].iter().fold(both, |sum, x| sum + x);
            assert_eq!(sum(&Order::dot(k), &terms), dot, "dot of {k}");

            let mut parts = [0f32; 4];
            let whole = k / 4 * 4;
            terms[..whole].chunks(4).for_each(|chunk| parts.iter_mut().zip(chunk).for_each(|(p, x)| *p += x));
            terms[whole..].iter().for_each(|x| parts[0] += x);
            let interleaved = parts[0] + parts[1] + parts[2] + parts[3];
            assert_eq!(sum(&Order::interleaved(k), &terms), interleaved, "interleaved sum of {k}");
        }
    }
}
