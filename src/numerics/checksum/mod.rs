//! Checksums of matrix products (algorithm-based fault tolerance: Huang, Abraham, IEEE Trans. Computers C-33, 1984).
//!
//! The sum of a row of y = x·wᵀ equals x · (sum of w's rows), for the cost of one more column. It is exact but for
//! rounding, whose bound is derived in `bound`. Sums of frozen weights are kept from the first time they are seen. A
//! device that is told so beforehand sums operands and results where it computes (`Device::expect_sums`), and they are
//! judged as soon as they are there. Of what it did not sum, or what changed since, results are summed at once, and left
//! operands when the products that share them are all known (q, k, v and their adapters read one tensor), in one pass.

mod bound;
mod sums;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::Result;
use crate::device::checks::{Expect, ProductSums, Sums, Weights};
use crate::device::hooked::{Call, Hook, Product, Sees};
use crate::device::{Compute, DType, Device, LowRank, Tensor};
use bound::{Branch, Expected, Given};
pub(super) use sums::operand;
use sums::{Kept, Last, of_all, of_rows, of_units, same};

/// A row of a product whose sum is not what its operands say; of the gradient of a tall matrix, a column.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Violation {
    /// Products since the hook was made, counting from 0.
    pub product: u64,
    pub operation: &'static str,
    /// Which sum: a row of the result, or a column of a unit of a tall gradient (units · columns).
    pub row: usize,
    /// |sum of the row − sum from the operands|, and the bound of rounding.
    pub difference: f64,
    pub bound: f64,
}

/// The hook that checks every product.
pub struct Checksums {
    device: Arc<dyn Device>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    products: u64,
    violations: Vec<Violation>,
    kept: Kept,
    /// The last sum of input gradients.
    result: Last,
    /// By left operand, first the one that was asked for longest ago.
    queues: Vec<Queue>,
}

/// Products of one left operand that wait for its sums.
struct Queue {
    /// As the products were given it, and as they round it.
    left: Tensor,
    rounded: Tensor,
    compute: Compute,
    waiting: Vec<Waiting>,
}

/// A product of which everything is known but the sums of its left operand.
struct Waiting {
    product: u64,
    operation: &'static str,
    wanted: Wanted,
    expected: Expected,
    got: Arc<Sums>,
    branch: Option<Sums>,
    so_far: Option<Arc<Sums>>,
    dtype: DType,
    /// Elements of each sum of the result.
    length: usize,
    unit: f64,
}

/// Which sums of the left operand predict those of the result.
enum Wanted {
    /// Its rows, with these factors.
    Rows(Arc<Sums>),
    /// Its rows' plain sums, times each column of the narrow operand, unit by unit.
    Units { narrow: Vec<f32>, units: Vec<usize> },
}

/// A left operand of more elements is summed at once rather than held.
const HELD: usize = 1 << 22;
/// Left operands that are held: in a backward pass a linear's input returns after the gradients of one projection.
const QUEUES: usize = 3;

impl Checksums {
    /// Sums are taken by `device`, on which the operands lie.
    pub fn on(device: Arc<dyn Device>) -> Self {
        Self { device, state: Mutex::default() }
    }

    /// Products seen and what was wrong with them, first the earliest.
    ///
    /// # Errors
    /// Those of the device.
    pub fn found(&self) -> Result<(u64, Vec<Violation>)> {
        let mut state = self.state();
        state.flush(&*self.device, 0)?;
        state.violations.sort_by_key(|v| v.product);
        Ok((state.products, state.violations.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hook for Checksums {
    fn sees(&self) -> Sees {
        Sees::Products
    }

    fn before(&self, product: &Product<'_>) -> Result<Option<Expect>> {
        let (w, over_rows) = match *product {
            Product::Forward { w, .. } | Product::Adapted { w, .. } => (w, true),
            Product::InputGrad { w, .. } | Product::Onto { w, .. } => (w, false),
            Product::WeightGrad { .. } => return Ok(Some(Expect::default())),
        };
        let weight = self.state().kept.frozen(&*self.device, w, product.compute(), over_rows)?;
        Ok(Some(Expect { weight }))
    }

    fn after(&self, _: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        if let (Some(product), [y]) = (&call.product, result.as_slice()) {
            let mut state = self.state();
            state.check(&*self.device, call.operation, product, y)?;
            state.products += 1;
        }
        Ok(result)
    }
}

/// A product before its left operand is summed.
struct Asked<'p> {
    left: &'p Tensor,
    compute: Compute,
    wanted: Wanted,
    expected: Expected,
    branch: Option<Sums>,
    so_far: Option<Arc<Sums>>,
}

impl State {
    fn check(&mut self, device: &dyn Device, operation: &'static str, product: &Product<'_>, y: &Tensor) -> Result<()> {
        let has_branch = matches!(product, Product::Adapted { .. } | Product::Onto { branch: Some(_), .. });
        if let Some(sums) = device.product_sums(y)
            // Not those of a product that is only a part of this one.
            && sums.branch().is_some() == has_branch
        {
            return self.compare(device, operation, product, (y.dtype, sums));
        }
        let (got, length) = self.got(device, product, y)?;
        let unit = bound::unit(device, product.compute());
        let Asked { left, compute, wanted, expected, branch, so_far } = self.asked(device, product)?;
        let (product, dtype) = (self.products, y.dtype);
        let waiting = Waiting { product, operation, wanted, expected, got, branch, so_far, dtype, length, unit };
        let of_left = |queue: &Queue| queue.compute == compute && same(&queue.left, left);
        let mut queue = match self.queues.iter().position(of_left) {
            Some(at) => self.queues.remove(at),
            None => {
                self.flush(device, QUEUES - 1)?;
                let rounded = operand(device, left, compute)?;
                Queue { left: left.clone(), rounded, compute, waiting: vec![] }
            }
        };
        queue.waiting.push(waiting);
        self.queues.push(queue);
        if left.elements() > HELD { self.flush(device, 0) } else { Ok(()) }
    }

    /// Judges a product that the device summed itself.
    fn compare(
        &mut self,
        device: &dyn Device,
        operation: &'static str,
        product: &Product<'_>,
        (dtype, sums): (DType, &ProductSums),
    ) -> Result<()> {
        let (expected, unit) = (expected(device, product)?, bound::unit(device, product.compute()));
        let before = match *product {
            Product::Onto { so_far, .. } => so_far,
            _ => None,
        };
        let taken = before.and_then(|x| Some(device.product_sums(x)?.got()).filter(|got| got.sums.len() == x.rows()));
        let summed = match before {
            Some(x) if taken.is_none() => Some(self.result.rows(device, x)?),
            _ => None,
        };
        let so_far = taken.or(summed.as_ref().map(|sums| sums.view()));
        let given = Given { got: sums.got(), main: sums.main(), branch: sums.branch(), so_far };
        let wrong = expected.first_wrong(&given, (dtype, sums.length), unit);
        self.report((self.products, operation), wrong);
        Ok(())
    }

    fn report(&mut self, (product, operation): (u64, &'static str), wrong: Option<(usize, f64, f64)>) {
        let violation = |(row, difference, bound)| Violation { product, operation, row, difference, bound };
        self.violations.extend(wrong.map(violation));
    }

    /// Sums of a product's result: its rows, or the columns of each unit of a tall weight gradient.
    fn got(&mut self, device: &dyn Device, product: &Product<'_>, y: &Tensor) -> Result<(Arc<Sums>, usize)> {
        match *product {
            Product::WeightGrad { dy, x, units, .. } if tall(dy, x) => {
                let rows: Vec<usize> = (0..units.len()).map(|unit| unit * dy.columns()).collect();
                Ok((Arc::new(device.column_checks(y, &rows)?), dy.columns()))
            }
            Product::Onto { .. } => Ok((self.result.rows(device, y)?, y.columns())),
            _ => Ok((Arc::new(of_rows(device, y, Weights::Ones)?), y.columns())),
        }
    }

    fn asked<'p>(&mut self, device: &dyn Device, product: &Product<'p>) -> Result<Asked<'p>> {
        let expected = expected(device, product)?;
        let (mut branch, mut so_far) = (None, None);
        let (left, w, over_rows) = match *product {
            Product::Forward { x, w, .. } => (x, w, true),
            Product::InputGrad { dy, w, .. } => (dy, w, false),
            Product::Adapted { x, w, branch: ref of, .. } => {
                branch = Some(self.branch(device, of, true)?);
                (x, w, true)
            }
            Product::Onto { so_far: before, branch: ref of, dy, w, .. } => {
                branch = of.as_ref().map(|of| self.branch(device, of, false)).transpose()?;
                so_far = before.map(|x| self.result.rows(device, x)).transpose()?;
                (dy, w, false)
            }
            Product::WeightGrad { dy, x, units, compute } => {
                let (left, narrow) = if tall(dy, x) { (dy, x) } else { (x, dy) };
                let narrow = device.download(&operand(device, narrow, compute)?)?;
                let wanted = Wanted::Units { narrow, units: units.to_vec() };
                return Ok(Asked { left, compute, wanted, expected, branch, so_far });
            }
        };
        let compute = product.compute();
        let wanted = Wanted::Rows(self.kept.factors(device, w, compute, over_rows)?);
        Ok(Asked { left, compute, wanted, expected, branch, so_far })
    }

    /// The sums of the low-rank part of a fused product, whose left operand is narrow.
    fn branch(&mut self, device: &dyn Device, of: &LowRank<'_>, over_rows: bool) -> Result<Sums> {
        let factors = self.kept.factors(device, of.w, of.compute, over_rows)?;
        of_rows(device, &operand(device, of.x, of.compute)?, factors.weights())
    }

    /// Judges products until no more than so many left operands wait.
    fn flush(&mut self, device: &dyn Device, keep: usize) -> Result<()> {
        let done = self.queues.len().saturating_sub(keep);
        for queue in self.queues.drain(..done).collect::<Vec<_>>() {
            self.judge(device, queue)?;
        }
        Ok(())
    }

    /// Sums the left operand that products wait for, and judges them.
    fn judge(&mut self, device: &dyn Device, Queue { rounded, waiting, .. }: Queue) -> Result<()> {
        let weights = waiting.iter().map(|one| match &one.wanted {
            Wanted::Rows(factors) => factors.weights(),
            Wanted::Units { .. } => Weights::Ones,
        });
        let all = device.row_checks(&rounded, &weights.collect::<Vec<_>>())?;
        for (one, sums) in waiting.into_iter().zip(all) {
            let main = match &one.wanted {
                Wanted::Rows(_) => sums,
                Wanted::Units { narrow, units } => of_units(narrow, &sums, units),
            };
            let (branch, so_far) = (one.branch.as_ref().map(Sums::view), one.so_far.as_ref().map(|sums| sums.view()));
            let given = Given { got: one.got.view(), main: main.view(), branch, so_far };
            let wrong = one.expected.first_wrong(&given, (one.dtype, one.length), one.unit);
            self.report((one.product, one.operation), wrong);
        }
        Ok(())
    }
}

/// What a product's sums are judged by.
fn expected(device: &dyn Device, product: &Product<'_>) -> Result<Expected> {
    let (terms, bias, branch, scaling) = match *product {
        Product::Forward { x, bias, .. } => (x.columns(), bias, None, 1.0),
        Product::Adapted { x, bias, branch, scaling, .. } => (x.columns(), bias, Some(branch), scaling),
        Product::InputGrad { dy, .. } => (dy.columns(), None, None, 1.0),
        Product::Onto { dy, branch, .. } => (dy.columns(), None, branch, 1.0),
        Product::WeightGrad { units, .. } => (longest(units), None, None, 1.0),
    };
    let inner = match *product {
        Product::Onto { out, .. } => Some(out),
        _ => None,
    };
    let bias = bias.map_or(Ok((0.0, 0.0)), |bias| of_all(device, bias))?;
    let branch = branch.map(|branch| Branch { terms: branch.x.columns(), scaling, dtype: branch.dtype });
    Ok(Expected { terms, bias, branch, inner })
}

/// The most rows of any unit.
fn longest(units: &[usize]) -> usize {
    units.windows(2).map(|unit| unit[1] - unit[0]).max().unwrap_or(0)
}

/// Whether a weight's gradient dyᵀ·x has more rows than columns; its columns are then the fewer and longer sums.
fn tall(dy: &Tensor, x: &Tensor) -> bool {
    dy.columns() > x.columns()
}
