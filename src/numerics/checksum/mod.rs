//! Checksums of matrix products (algorithm-based fault tolerance: Huang, Abraham, IEEE Trans. Computers C-33, 1984).
//!
//! The sum of a row of y = x·wᵀ equals x · (sum of w's rows), for the cost of one more column. It is exact but for
//! rounding, whose bound is derived in `bound`. Results are summed at once, while they lie in the cache; left operands
//! when the products that share them are all known (q, k, v and their adapters read one tensor), in one pass. Sums of
//! frozen weights are kept, and of a result that the next operation adds to.

mod bound;
mod sums;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::Result;
use crate::device::checks::{Expect, Factors, Sums, Weights};
use crate::device::hooked::{Call, Hook, Product, Sees};
use crate::device::{Compute, DType, Device, LowRank, Tensor};
use bound::{Expected, Term};
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
    dtype: DType,
    /// Elements of each sum of the result.
    length: usize,
    unit: f64,
}

/// Which sums of the left operand predict those of the result.
enum Wanted {
    /// Its rows, with these factors.
    Rows(Arc<Factors>),
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
}

impl State {
    fn check(&mut self, device: &dyn Device, operation: &'static str, product: &Product<'_>, y: &Tensor) -> Result<()> {
        let has_branch = matches!(product, Product::Adapted { .. } | Product::Onto { branch: Some(_), .. });
        if let Some(sums) = device.product_sums(y)
            // Not those of a product that is only a part of this one.
            && sums.parts.iter().all(|part| part.branch.is_some() == has_branch)
        {
            let mut expected = self.taken(device, product)?;
            let unit = bound::unit(device, product.compute());
            let mut first = 0;
            for part in &sums.parts {
                expected.take(part);
                let wrong = expected.first_wrong(&part.got, (y.dtype, sums.length), unit);
                let wrong = wrong.map(|(row, difference, bound)| (first + row, difference, bound));
                if wrong.is_some() {
                    self.report((self.products, operation), wrong);
                    break;
                }
                first += part.got.sums.len();
            }
            return Ok(());
        }
        let (got, length) = self.got(device, product, y)?;
        let unit = bound::unit(device, product.compute());
        let Asked { left, compute, wanted, expected } = self.expected(device, product)?;
        let waiting =
            Waiting { product: self.products, operation, wanted, expected, got, dtype: y.dtype, length, unit };
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

    /// All but the sums of the operands, which the device took itself.
    fn taken(&mut self, device: &dyn Device, product: &Product<'_>) -> Result<Expected> {
        let (terms, bias, branch, scaling) = match *product {
            Product::Forward { x, bias, .. } => (x.columns(), bias, None, 1.0),
            Product::Adapted { x, bias, branch, scaling, .. } => (x.columns(), bias, Some(branch), scaling),
            Product::InputGrad { dy, .. } => (dy.columns(), None, None, 1.0),
            Product::Onto { dy, branch, .. } => (dy.columns(), None, branch, 1.0),
            Product::WeightGrad { units, .. } => (longest(units), None, None, 1.0),
        };
        let mut expected = Expected::of(terms);
        expected.bias = bias.map_or(Ok((0.0, 0.0)), |bias| of_all(device, bias))?;
        expected.branch = branch.map(|branch| {
            let term = Term { sums: Arc::default(), terms: branch.x.columns(), scaling };
            (term, branch.dtype)
        });
        if let Product::Onto { so_far, out, .. } = *product {
            expected.inner = Some(out);
            expected.so_far = so_far.map(|x| self.so_far(device, x)).transpose()?;
        }
        Ok(expected)
    }

    /// The row sums of what a product is added to.
    fn so_far(&mut self, device: &dyn Device, x: &Tensor) -> Result<Arc<Sums>> {
        match device.product_sums(x).map(|taken| &taken.parts[..]) {
            Some([whole]) if whole.got.sums.len() == x.rows() => Ok(Arc::clone(&whole.got)),
            _ => self.result.rows(device, x),
        }
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

    fn expected<'p>(&mut self, device: &dyn Device, product: &Product<'p>) -> Result<Asked<'p>> {
        match *product {
            Product::Forward { x, w, bias, compute } => {
                let mut asked = self.rows(device, (x, w, compute), true)?;
                asked.expected.bias = bias.map_or(Ok((0.0, 0.0)), |bias| of_all(device, bias))?;
                Ok(asked)
            }
            Product::Adapted { x, w, bias, compute, ref branch, scaling } => {
                let mut asked = self.rows(device, (x, w, compute), true)?;
                asked.expected.bias = bias.map_or(Ok((0.0, 0.0)), |bias| of_all(device, bias))?;
                asked.expected.branch = Some(self.branch(device, branch, scaling, true)?);
                Ok(asked)
            }
            Product::InputGrad { dy, w, compute } => self.rows(device, (dy, w, compute), false),
            Product::Onto { so_far, ref branch, dy, w, compute, out } => {
                let mut asked = self.rows(device, (dy, w, compute), false)?;
                asked.expected.inner = Some(out);
                asked.expected.branch = branch.as_ref().map(|b| self.branch(device, b, 1.0, false)).transpose()?;
                asked.expected.so_far = so_far.map(|x| self.so_far(device, x)).transpose()?;
                Ok(asked)
            }
            Product::WeightGrad { dy, x, units, compute } => {
                let (left, narrow) = if tall(dy, x) { (dy, x) } else { (x, dy) };
                let narrow = device.download(&operand(device, narrow, compute)?)?;
                let wanted = Wanted::Units { narrow, units: units.to_vec() };
                Ok(Asked { left, compute, wanted, expected: Expected::of(longest(units)) })
            }
        }
    }

    /// x · w, or x · wᵀ (`over_rows` of w).
    fn rows<'p>(
        &mut self,
        device: &dyn Device,
        (left, w, compute): (&'p Tensor, &Tensor, Compute),
        over_rows: bool,
    ) -> Result<Asked<'p>> {
        let wanted = Wanted::Rows(self.kept.factors(device, w, compute, over_rows)?);
        Ok(Asked { left, compute, wanted, expected: Expected::of(left.columns()) })
    }

    /// The low-rank part of a fused product, whose left operand is narrow.
    fn branch(
        &mut self,
        device: &dyn Device,
        of: &LowRank<'_>,
        scaling: f32,
        over_rows: bool,
    ) -> Result<(Term, DType)> {
        let factors = self.kept.factors(device, of.w, of.compute, over_rows)?;
        let sums = of_rows(device, &operand(device, of.x, of.compute)?, factors.weights())?;
        Ok((Term { sums: Arc::new(sums), terms: of.x.columns(), scaling }, of.dtype))
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
        for (mut one, sums) in waiting.into_iter().zip(all) {
            one.expected.main.sums = match &one.wanted {
                Wanted::Rows(_) => Arc::new(sums),
                Wanted::Units { narrow, units } => Arc::new(of_units(narrow, &sums, units)),
            };
            let wrong = one.expected.first_wrong(&one.got, (one.dtype, one.length), one.unit);
            self.report((one.product, one.operation), wrong);
        }
        Ok(())
    }
}

/// The most rows of any unit.
fn longest(units: &[usize]) -> usize {
    units.windows(2).map(|unit| unit[1] - unit[0]).max().unwrap_or(0)
}

/// Whether a weight's gradient dyᵀ·x has more rows than columns; its columns are then the fewer and longer sums.
fn tall(dy: &Tensor, x: &Tensor) -> bool {
    dy.columns() > x.columns()
}
