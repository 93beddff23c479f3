//! f32 products with at most eight columns, as MKL's sgemm computes them on the processors measured: multiplied and
//! added in two roundings, in chains over the whole depth. These are a LoRA branch's own products (rank 8 or less): A x,
//! the gradient of A x, the gradient of B.

use crate::device::Compute;
use crate::device::cpu::simd::vectorised;
use crate::device::cpu::threads::Workers;

/// Most columns of such a product.
const COLUMNS: usize = 8;
/// Rows side by side: one chain alone would wait for each of its own additions.
const ROWS: usize = 8;
/// The same where a row has four chains a column.
const ABREAST: usize = 4;
/// Chains of an element whose operands both lie along the depth.
const LANES: usize = 4;
/// Elements of a register.
const REGISTER: usize = 16;

pub fn fits(compute: Compute, columns: usize) -> bool {
    compute == Compute::F32 && (1..=COLUMNS).contains(&columns)
}

/// c [m, n] = a [m, k] · b [n, k]ᵀ: four chains an element, by index modulo 4; what is left of the depth follows their
/// sum.
pub fn by_rows(workers: &Workers, a: &[f32], b: &[f32], k: usize, c: &mut [f32]) {
    let n = b.len() / k.max(1);
    if k == 0 || n == 0 {
        return c.fill(0.0);
    }
    let whole = k / LANES * LANES;
    // Zeros in the columns that do not exist.
    let mut packed = vec![Chains::default(); k / LANES];
    for (column, b) in b.chunks_exact(k).enumerate() {
        for (packed, lanes) in packed.iter_mut().zip(b.chunks_exact(LANES)) {
            packed.as_flattened_mut()[column * LANES..][..LANES].copy_from_slice(lanes);
        }
    }
    workers.rows(c, n, k, |first, c| {
        vectorised(
            #[inline(always)]
            || {
                for (block, c) in c.chunks_mut(ABREAST * n).enumerate() {
                    let first = first + block * ABREAST;
                    // Rows past the end repeat the last one.
                    let row = |row: usize| &a[(first + row.min(c.len() / n - 1)) * k..][..k];
                    let rows = std::array::from_fn(row);
                    let sums = chains(rows, &packed);
                    for ((c, sums), a) in c.chunks_exact_mut(n).zip(&sums).zip(rows) {
                        for (column, c) in c.iter_mut().enumerate() {
                            let [s0, s1, s2, s3] = [0, 1, 2, 3].map(|lane| sums.as_flattened()[column * LANES + lane]);
                            let rest = a[whole..].iter().zip(&b[column * k + whole..][..k - whole]);
                            *c = rest.fold((s0 + s2) + (s1 + s3), |sum, (a, b)| sum + a * b);
                        }
                    }
                }
            },
        );
    });
}

/// Sums, or operands, of the four chains of eight columns, in registers.
type Chains = [[f32; REGISTER]; COLUMNS * LANES / REGISTER];

/// The chains of each row over `packed`. Loops over arrays of known length, or the compiler leaves them to scalars.
#[inline(always)]
fn chains(rows: [&[f32]; ABREAST], packed: &[Chains]) -> [Chains; ABREAST] {
    let rows = rows.map(|row| &row.as_chunks::<LANES>().0[..packed.len()]);
    let mut sums = [Chains::default(); ABREAST];
    for (j, b) in packed.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(&rows) {
            add_products(sums, &row[j], b);
        }
    }
    sums
}

#[inline(always)]
fn add_products(sums: &mut Chains, a: &[f32; LANES], b: &Chains) {
    let mut repeated = [0f32; REGISTER];
    for lanes in repeated.as_chunks_mut::<LANES>().0 {
        *lanes = *a;
    }
    for (sums, b) in sums.iter_mut().zip(b) {
        for i in 0..REGISTER {
            sums[i] += repeated[i] * b[i];
        }
    }
}

/// The first operand of [`by_columns`]: element (i, j) lies at i·`row` + j·`depth`.
pub struct Strided<'a> {
    pub values: &'a [f32],
    pub row: usize,
    pub depth: usize,
}

/// c [m, n] = a [m, k] · b [k, n]: one chain an element.
pub fn by_columns(workers: &Workers, a: &Strided<'_>, (b, k, n): (&[f32], usize, usize), c: &mut [f32]) {
    // [k][8 columns], zeros in the columns that do not exist.
    let mut packed = vec![0f32; k * COLUMNS];
    for (out, b) in packed.chunks_exact_mut(COLUMNS).zip(b.chunks_exact(n)) {
        out[..n].copy_from_slice(b);
    }
    workers.rows(c, n, k, |first, c| {
        vectorised(
            #[inline(always)]
            || {
                for (block, c) in c.chunks_mut(ROWS * n).enumerate() {
                    let first = first + block * ROWS;
                    // Rows past the end repeat the last one.
                    let at: [usize; ROWS] = std::array::from_fn(|row| (first + row.min(c.len() / n - 1)) * a.row);
                    let mut sums = [[0f32; COLUMNS]; ROWS];
                    for (j, b) in packed.chunks_exact(COLUMNS).enumerate() {
                        for (sums, at) in sums.iter_mut().zip(at) {
                            let a = a.values[at + j * a.depth];
                            for (sum, b) in sums.iter_mut().zip(b) {
                                *sum += a * b;
                            }
                        }
                    }
                    for (c, sums) in c.chunks_exact_mut(n).zip(&sums) {
                        c.copy_from_slice(&sums[..n]);
                    }
                }
            },
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::noise::symmetric;

    /// Both layouts against their definitions, at awkward sizes.
    #[test]
    fn every_chain_is_the_one_that_is_described() {
        let workers = Workers::new(2).expect("threads");
        let draw = |stream, n: usize| -> Vec<f32> { (0..n as u64).map(|i| symmetric(1, stream, i)).collect() };
        for (m, n, k) in [(1, 8, 1), (9, 8, 130), (40, 4, 127), (17, 8, 352), (3, 1, 5)] {
            let (a, b) = (draw(0, m * k), draw(1, n * k));
            let (mut rows, mut columns) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
            by_rows(&workers, &a, &b, k, &mut rows);
            by_columns(&workers, &Strided { values: &a, row: 1, depth: m }, (&b, k, n), &mut columns);
            for (i, c) in (0..m * n).map(|e| (e, (e / n, e % n))) {
                let term = |j: usize| a[c.0 * k + j] * b[c.1 * k + j];
                let lane = |lane: usize| (lane..k / 4 * 4).step_by(4).fold(0f32, |sum, j| sum + term(j));
                let whole = (lane(0) + lane(2)) + (lane(1) + lane(3));
                assert_eq!(rows[i], (k / 4 * 4..k).fold(whole, |sum, j| sum + term(j)), "{m} {n} {k} rows");
                let chain = (0..k).fold(0f32, |sum, j| sum + a[j * m + c.0] * b[j * n + c.1]);
                assert_eq!(columns[i], chain, "{m} {n} {k} columns");
            }
        }
    }
}
