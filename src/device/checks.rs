//! Weighted sums of rows, for checksums of products: f64 in a fixed order, eight running sums wide.

/// Weights of a row's elements and of their magnitudes.
pub type Weights<'w> = (&'w [f64], &'w [f64]);

const LANES: usize = 8;

/// (Σ x·w, Σ |x|·a) of one row; without weights (Σ x, Σ |x|).
#[inline(always)]
pub fn row_check(row: &[f32], weights: Option<Weights<'_>>) -> (f64, f64) {
    let (mut sum, mut size) = ([0f64; LANES], [0f64; LANES]);
    let whole = row.len() / LANES * LANES;
    match weights {
        None => {
            for x in row[..whole].chunks_exact(LANES) {
                for lane in 0..LANES {
                    let x = f64::from(x[lane]);
                    sum[lane] += x;
                    size[lane] += x.abs();
                }
            }
            for &x in &row[whole..] {
                sum[0] += f64::from(x);
                size[0] += f64::from(x).abs();
            }
        }
        Some((w, a)) => {
            let parts = row[..whole].chunks_exact(LANES).zip(w.chunks_exact(LANES)).zip(a.chunks_exact(LANES));
            for ((x, w), a) in parts {
                for lane in 0..LANES {
                    let x = f64::from(x[lane]);
                    sum[lane] += x * w[lane];
                    size[lane] += x.abs() * a[lane];
                }
            }
            for ((&x, w), a) in row[whole..].iter().zip(&w[whole..]).zip(&a[whole..]) {
                sum[0] += f64::from(x) * w;
                size[0] += f64::from(x).abs() * a;
            }
        }
    }
    (sum.iter().sum(), size.iter().sum())
}

/// Per column of rows of `columns`: Σ x and Σ |x|.
pub fn column_checks(values: &[f32], columns: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut sums, mut sizes) = (vec![0f64; columns], vec![0f64; columns]);
    for row in values.chunks_exact(columns.max(1)) {
        for ((sum, size), &x) in sums.iter_mut().zip(&mut sizes).zip(row) {
            *sum += f64::from(x);
            *size += f64::from(x).abs();
        }
    }
    (sums, sizes)
}
