//! The inner loop of every product of attention, and transposed operands for it.

/// Lanes of the widest accumulator: four AVX-512 registers.
const WIDE: usize = 64;
/// Lanes of the narrow one; padded operands are multiples of it.
pub const NARROW: usize = 16;

/// out[l] += Σ_j weight(j)·rows[j·stride + l], j ascending over 0..count: one multiply-add chain per element.
#[inline(always)]
pub fn combine(weight: impl Fn(usize) -> f32 + Copy, count: usize, rows: &[f32], stride: usize, out: &mut [f32]) {
    let mut at = 0;
    while at + WIDE <= out.len() {
        block::<WIDE>(weight, count, &rows[at..], stride, &mut out[at..]);
        at += WIDE;
    }
    // What is left goes in one piece: a single narrow accumulator would wait for each of its own additions.
    let rest = (out.len() - at) / NARROW;
    match rest {
        3 => block::<48>(weight, count, &rows[at..], stride, &mut out[at..]),
        2 => block::<32>(weight, count, &rows[at..], stride, &mut out[at..]),
        1 => block::<NARROW>(weight, count, &rows[at..], stride, &mut out[at..]),
        _ => {}
    }
    at += rest * NARROW;
    for (l, out) in out.iter_mut().enumerate().skip(at) {
        *out = (0..count).fold(*out, |sum, j| weight(j).mul_add(rows[j * stride + l], sum));
    }
}

#[inline(always)]
fn block<const W: usize>(weight: impl Fn(usize) -> f32, count: usize, rows: &[f32], stride: usize, out: &mut [f32]) {
    let mut sums = [0f32; W];
    sums.copy_from_slice(&out[..W]);
    for j in 0..count {
        let weight = weight(j);
        for (sum, &x) in sums.iter_mut().zip(&rows[j * stride..][..W]) {
            *sum = weight.mul_add(x, *sum);
        }
    }
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
        combine(|d| q[d], q.len(), &self.values[first..], self.stride, s);
    }
}
