//! The inner loop of every product of attention, and transposed operands for it.

use std::ops::Range;

use crate::device::cpu::gemm::mkl_block;

/// Chains that are interleaved.
const INTERLEAVED: usize = 4;
/// Lanes of the widest accumulator: four AVX-512 registers.
const WIDE: usize = 64;
/// Lanes of the narrow one; padded operands are multiples of it.
pub const NARROW: usize = 16;

/// The terms of a sum and their order.
#[derive(Clone, Copy)]
pub struct Terms<W> {
    /// By index from 0.
    pub weight: W,
    pub count: usize,
    pub order: Order,
}

/// In which order the terms of a sum are added: chains of multiply-adds from zero, which are added to what is there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// MKL's: ascending, a chain for every `part` of them. `before` terms of the first part are zero and left out.
    Chains { part: usize, before: usize },
    /// oneDNN's: one chain of pairs, the later term first, as `vdpbf16ps` adds them. `odd`: the first term is the second
    /// of a pair whose first one is zero.
    Pairs { odd: bool },
    /// ATen's `gemm_notrans_` for fp16: four interleaved chains, the first of which goes on past the `whole` first terms;
    /// `before` terms are zero and left out.
    Interleaved { whole: usize, before: usize },
    /// ATen's `gemm_transb_` for fp16: one chain that goes on from what is there.
    Onwards,
}

/// Terms of a chain: every `step`-th of a range, then another range.
#[derive(Clone)]
struct Chain {
    terms: Range<usize>,
    step: usize,
    rest: Range<usize>,
}

impl Order {
    /// MKL's, for a product of depth `depth` whose first `before` terms are zero.
    pub fn mkl(depth: usize, before: usize) -> Self {
        Order::Chains { part: mkl_block(depth).max(1), before }
    }

    /// Four interleaved chains, for a product of depth `depth` whose first `before` terms are zero.
    pub fn interleaved(depth: usize, before: usize) -> Self {
        Order::Interleaved { whole: depth / INTERLEAVED * INTERLEAVED, before }
    }
}

impl<W: Fn(usize) -> f32> Terms<W> {
    /// Terms that form a chain each.
    #[inline(always)]
    fn chains(&self) -> impl Iterator<Item = Chain> + use<W> {
        let count = self.count;
        let (chains, part, before) = match self.order {
            Order::Chains { part, before } => ((before % part + count).div_ceil(part), part, before % part),
            Order::Interleaved { before, .. } => (INTERLEAVED, 0, before),
            Order::Pairs { .. } | Order::Onwards => (usize::from(count > 0), count, 0),
        };
        let interleaved = match self.order {
            Order::Interleaved { whole, .. } => Some(whole.saturating_sub(before).min(count)),
            _ => None,
        };
        (0..chains).map(move |i| match interleaved {
            Some(whole) => {
                // The first term left of those whose index, counted with the absent ones, is i modulo 4.
                let first = (i + INTERLEAVED - before % INTERLEAVED) % INTERLEAVED;
                let rest = if i == 0 { whole..count } else { 0..0 };
                Chain { terms: first.min(whole)..whole, step: INTERLEAVED, rest }
            }
            None => {
                let terms = (part * i).saturating_sub(before)..(part * (i + 1) - before).min(count);
                Chain { terms, step: 1, rest: 0..0 }
            }
        })
    }

    /// The terms of a chain in order.
    #[inline(always)]
    fn each(&self, chain: Chain, mut term: impl FnMut(usize, f32)) {
        let Chain { terms, step, rest } = chain;
        let mut next = terms.start;
        if let Order::Pairs { odd } = self.order {
            if odd && next < terms.end {
                term(next, (self.weight)(next));
                next += 1;
            }
            while next + 1 < terms.end {
                term(next + 1, (self.weight)(next + 1));
                term(next, (self.weight)(next));
                next += 2;
            }
        }
        while next < terms.end {
            term(next, (self.weight)(next));
            next += step;
        }
        for j in rest {
            term(j, (self.weight)(j));
        }
    }
}

/// out[l] += Σ_j weight(j)·rows[j·stride + l].
#[inline(always)]
pub fn combine(terms: Terms<impl Fn(usize) -> f32 + Copy>, rows: &[f32], stride: usize, out: &mut [f32]) {
    for chain in terms.chains() {
        let mut at = 0;
        while at + WIDE <= out.len() {
            block::<WIDE>((terms, chain.clone()), &rows[at..], stride, &mut out[at..]);
            at += WIDE;
        }
        // What is left goes in one piece: a single narrow accumulator would wait for each of its own additions.
        let rest = (out.len() - at) / NARROW;
        match rest {
            3 => block::<48>((terms, chain.clone()), &rows[at..], stride, &mut out[at..]),
            2 => block::<32>((terms, chain.clone()), &rows[at..], stride, &mut out[at..]),
            1 => block::<NARROW>((terms, chain.clone()), &rows[at..], stride, &mut out[at..]),
            _ => {}
        }
        at += rest * NARROW;
        for (l, out) in out.iter_mut().enumerate().skip(at) {
            let onwards = terms.order == Order::Onwards;
            let mut sum = if onwards { *out } else { 0.0 };
            terms.each(chain.clone(), |j, weight| sum = weight.mul_add(rows[j * stride + l], sum));
            *out = if onwards { sum } else { *out + sum };
        }
    }
}

#[inline(always)]
fn block<const W: usize>(
    (terms, chain): (Terms<impl Fn(usize) -> f32>, Chain),
    rows: &[f32],
    stride: usize,
    out: &mut [f32],
) {
    let onwards = terms.order == Order::Onwards;
    let mut sums = [0f32; W];
    if onwards {
        sums.copy_from_slice(&out[..W]);
    }
    terms.each(
        chain,
        #[inline(always)]
        |j, weight| {
            for (sum, &x) in sums.iter_mut().zip(&rows[j * stride..][..W]) {
                *sum = weight.mul_add(x, *sum);
            }
        },
    );
    for (out, sum) in out[..W].iter_mut().zip(sums) {
        *out = if onwards { sum } else { *out + sum };
    }
}

/// Rows of a transposed operand: x [length][head_dim] as [head_dim][stride], zeros past `length`.
pub struct Transposed {
    values: Vec<f32>,
    stride: usize,
}

impl Transposed {
    pub fn new(x: &[f32], length: usize) -> Self {
        let hd = x.len() / length.max(1);
        // A run of keys may start anywhere and is rounded up to whole registers.
        let stride = length + NARROW;
        let mut values = vec![0f32; hd * stride];
        for (i, row) in x.chunks_exact(hd.max(1)).enumerate() {
            for (d, &x) in row.iter().enumerate() {
                values[d * stride + i] = x;
            }
        }
        Self { values, stride }
    }

    /// s[j] = Σ_d q[d]·x[first + j][d] for `count` rows; `s` has room for whole registers and may be written there.
    #[inline(always)]
    pub fn dot(&self, q: &[f32], first: usize, count: usize, s: &mut [f32]) {
        let s = &mut s[..count.next_multiple_of(NARROW)];
        s.fill(0.0);
        let terms = Terms { weight: |d: usize| q[d], count: q.len(), order: Order::mkl(q.len(), 0) };
        combine(terms, &self.values[first..], self.stride, s);
    }
}
