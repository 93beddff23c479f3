//! Which rows train and which validate: `datasets.train_test_split` as LLaMA-Factory calls it (contract 2.3).

use super::random::numpy_permutation;
use crate::{Error, Result};

/// LLaMA-Factory's threshold below which val_size means none.
const NO_SPLIT: f64 = 1e-6;

/// Positions of the training and of the validation rows, both in permuted order; `None`: no split.
///
/// # Errors
/// A val_size that leaves no training row, or 1.0, which the `datasets` library rejects.
pub fn split(rows: u32, val_size: f64, seed: u64) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
    if val_size.is_nan() || val_size <= NO_SPLIT {
        return Ok(None);
    }
    let refuse = |what: String| Err(Error::input(what).at("val_size").next("a fraction in (0, 1), or a row count"));
    if val_size == 1.0 {
        return refuse("1 is neither a fraction nor more than one row; the trainer stops on it".into());
    }
    let wanted = if val_size > 1.0 { val_size.trunc() } else { (val_size * f64::from(rows)).ceil() };
    if wanted >= f64::from(rows) {
        return refuse(format!("{val_size} takes {wanted} of {rows} rows: none is left to train on"));
    }
    let test = wanted as usize;
    let mut order = numpy_permutation(seed, rows);
    let train = order.split_off(test);
    Ok(Some((train, order)))
}
