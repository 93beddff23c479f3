//! The inner loop of every product of attention, and transposed operands for it.

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

/// In which order the terms of a sum enter its one chain of multiply-adds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// MKL's.
    Ascending,
    /// Pairs, the later term first, as `vdpbf16ps` adds them and so oneDNN. `odd`: the first term is the second of a
    /// pair whose first one is zero.
    Pairs { odd: bool },
}

impl<W: Fn(usize) -> f32> Terms<W> {
    #[inline(always)]
    fn each(&self, mut term: impl FnMut(usize, f32)) {
        let Self { weight, count, order } = self;
        let mut next = 0;
        if let Order::Pairs { odd } = *order {
            if odd && *count > 0 {
                term(0, weight(0));
                next = 1;
            }
            while next + 1 < *count {
                term(next + 1, weight(next + 1));
                term(next, weight(next));
                next += 2;
            }
        }
        for j in next..*count {
            term(j, weight(j));
        }
    }
}

/// out[l] += Σ_j weight(j)·rows[j·stride + l]: one multiply-add chain per element.
#[inline(always)]
pub fn combine(terms: Terms<impl Fn(usize) -> f32 + Copy>, rows: &[f32], stride: usize, out: &mut [f32]) {
    let mut at = 0;
    while at + WIDE <= out.len() {
        block::<WIDE>(terms, &rows[at..], stride, &mut out[at..]);
        at += WIDE;
    }
    // What is left goes in one piece: a single narrow accumulator would wait for each of its own additions.
    let rest = (out.len() - at) / NARROW;
    match rest {
        3 => block::<48>(terms, &rows[at..], stride, &mut out[at..]),
        2 => block::<32>(terms, &rows[at..], stride, &mut out[at..]),
        1 => block::<NARROW>(terms, &rows[at..], stride, &mut out[at..]),
        _ => {}
    }
    at += rest * NARROW;
    for (l, out) in out.iter_mut().enumerate().skip(at) {
        terms.each(|j, weight| *out = weight.mul_add(rows[j * stride + l], *out));
    }
}

#[inline(always)]
fn block<const W: usize>(terms: Terms<impl Fn(usize) -> f32>, rows: &[f32], stride: usize, out: &mut [f32]) {
    let mut sums = [0f32; W];
    sums.copy_from_slice(&out[..W]);
    terms.each(
        #[inline(always)]
        |j, weight| {
            for (sum, &x) in sums.iter_mut().zip(&rows[j * stride..][..W]) {
                *sum = weight.mul_add(x, *sum);
            }
        },
    );
    out[..W].copy_from_slice(&sums);
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
        let terms = Terms { weight: |d: usize| q[d], count: q.len(), order: Order::Ascending };
        combine(terms, &self.values[first..], self.stride, s);
    }
}
