//! The device's own products: linears with their LoRA branches, gradients of their inputs and weights.

use super::kernel::Kernel;
use super::{LowRank, Matrix, PANELS, Product, Then, narrow};
use crate::Result;
use crate::device::cpu::meter::Cells;
use crate::device::cpu::values::{elements, expect, expect_offsets, tensor, values};
use crate::device::cpu::{Buffer, CpuDevice, rounding};
use crate::device::{self, Compute, DType, Tensor};

impl CpuDevice {
    pub(in crate::device::cpu) fn linear_impl(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        (compute, out): (Compute, DType),
        branch: Option<(&device::LowRank<'_>, f32)>,
    ) -> Result<Tensor> {
        let (m, k, n) = (x.rows(), x.columns(), w.rows());
        expect(w.columns() == k && bias.is_none_or(|b| b.elements() == n), "linear", || {
            format!("x {:?}, w {:?}, bias {:?}", x.shape, w.shape, bias.map(|b| &b.shape))
        })?;
        let then = match branch {
            None => Then::Nothing,
            Some((branch, scaling)) => Then::AddScaled { term: low_rank(branch, (m, n), false)?, scaling },
        };
        let bias = bias.map(values).transpose()?;
        let mut y = Buffer::unset(m * n);
        if narrow::fits(compute, n) && bias.is_none() && branch.is_none() {
            narrow::by_rows(&self.workers, &values(x)?, &values(w)?, k, &mut y);
            rounding::round_slice(&mut y, out);
            return Ok(tensor(y, vec![m, n], out));
        }
        let (a, b) = (by_rows(x)?, by_rows(w)?);
        let cells = self.cells(compute, (m, n), out);
        let bias = bias.as_deref();
        let sums = self.gemm(&Product { m, n, k, a, b, compute, bias, out, then, cells: cells.as_ref() }, &mut y);
        cells.and_then(Cells::finish).into_iter().for_each(|measured| y.keep(measured));
        sums.into_iter().for_each(|sums| y.keep_sums(sums));
        Ok(tensor(y, vec![m, n], out))
    }

    /// `sum`: what to add the product to, if anything, the low-rank term, and the dtype of their sum.
    pub(in crate::device::cpu) fn linear_input_grad_impl(
        &self,
        dy: &Tensor,
        w: &Tensor,
        (compute, out): (Compute, DType),
        sum: Option<(Option<&Tensor>, Option<&device::LowRank<'_>>, DType)>,
    ) -> Result<Tensor> {
        let (m, k, n) = (dy.rows(), dy.columns(), w.columns());
        expect(w.rows() == k, "linear_input_grad", || format!("dy {:?}, w {:?}", dy.shape, w.shape))?;
        let before = match sum {
            Some((Some(before), ..)) => Some(values(before)?),
            _ => None,
        };
        expect(before.as_ref().is_none_or(|x| x.len() == m * n), "linear_input_grad", || "another sum".to_owned())?;
        let then = match sum {
            None => Then::Nothing,
            Some((_, branch, dtype)) => {
                let term = branch.map(|branch| low_rank(branch, (m, n), true)).transpose()?;
                Then::Accumulate { so_far: before.as_deref(), term, dtype }
            }
        };
        let mut dx = Buffer::unset(m * n);
        if narrow::fits(compute, n) && sum.is_none() {
            let dy = narrow::Strided { values: &values(dy)?, row: k, depth: 1 };
            narrow::by_columns(&self.workers, &dy, (&values(w)?, k, n), &mut dx);
            rounding::round_slice(&mut dx, out);
            return Ok(tensor(dx, vec![m, n], out));
        }
        let (a, b) = (by_rows(dy)?, by_columns(w)?);
        let dtype = sum.map_or(out, |(.., dtype)| dtype);
        let cells = self.cells(compute, (m, n), dtype);
        let sums =
            self.gemm(&Product { m, n, k, a, b, compute, bias: None, out, then, cells: cells.as_ref() }, &mut dx);
        cells.and_then(Cells::finish).into_iter().for_each(|measured| dx.keep(measured));
        sums.into_iter().for_each(|sums| dx.keep_sums(sums));
        Ok(tensor(dx, vec![m, n], dtype))
    }

    /// For what is to be measured of an (m, n) product, unless it is so narrow that it is computed transposed.
    fn cells(&self, compute: Compute, (m, n): (usize, usize), dtype: DType) -> Option<Cells> {
        let kernel = Kernel::best(compute);
        let meter = self.meter(&[m, n], dtype).filter(|_| n >= kernel.columns)?;
        Some(Cells::new(meter, kernel.rows * PANELS, kernel.columns))
    }

    pub(in crate::device::cpu) fn linear_weight_grad_impl(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: &[usize],
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (m, n) = (dy.columns(), x.columns());
        expect(dy.rows() == x.rows(), "linear_weight_grad", || format!("dy {:?}, x {:?}", dy.shape, x.shape))?;
        expect_offsets(units, x.rows(), "linear_weight_grad")?;
        let (a, b) = (elements(dy)?, elements(x)?);
        let count = units.len() - 1;
        let mut dw = Buffer::unset(count * m * n);
        if narrow::fits(compute, n) {
            let (dy, x) = (values(dy)?, values(x)?);
            for (unit, dw) in dw.chunks_exact_mut((m * n).max(1)).enumerate() {
                let (first, k) = (units[unit], units[unit + 1] - units[unit]);
                let dy = narrow::Strided { values: &dy[first * m..], row: 1, depth: m };
                narrow::by_columns(&self.workers, &dy, (&x[first * n..][..k * n], k, n), dw);
            }
            rounding::round_slice(&mut dw, out);
            return Ok(tensor(dw, vec![count, m, n], out));
        }
        let product = |unit: usize| {
            let (first, k) = (units[unit], units[unit + 1] - units[unit]);
            let a = Matrix { elements: a, at: first * m, lane: 1, depth: m, dtype: dy.dtype };
            let b = Matrix { elements: b, at: first * n, lane: 1, depth: n, dtype: x.dtype };
            Product { m, n, k, a, b, compute, bias: None, out, then: Then::Nothing, cells: None }
        };
        let kernel = Kernel::best(compute);
        if m.min(n) > kernel.columns {
            for (unit, dw) in dw.chunks_exact_mut((m * n).max(1)).enumerate() {
                self.gemm_with(&kernel, &product(unit), dw);
            }
        } else {
            let sums = self.narrow_products(&kernel, count, product, &mut dw);
            sums.into_iter().for_each(|sums| dw.keep_sums(sums));
        }
        Ok(tensor(dw, vec![count, m, n], out))
    }
}

/// Rows of x as lanes.
fn by_rows(x: &Tensor) -> Result<Matrix<'_>> {
    Ok(Matrix { elements: elements(x)?, at: 0, lane: x.columns(), depth: 1, dtype: x.dtype })
}

/// Columns of x as lanes.
fn by_columns(x: &Tensor) -> Result<Matrix<'_>> {
    Ok(Matrix { elements: elements(x)?, at: 0, lane: 1, depth: x.columns(), dtype: x.dtype })
}

/// The term x · w of an (m, n) product, or x · wᵀ with w's columns as lanes.
fn low_rank<'a>(of: &device::LowRank<'a>, (m, n): (usize, usize), columns: bool) -> Result<LowRank<'a>> {
    let device::LowRank { x, w, compute, dtype } = *of;
    let rank = x.columns();
    let (depth, lanes) = if columns { (w.rows(), w.columns()) } else { (w.columns(), w.rows()) };
    expect(x.rows() == m && depth == rank && lanes == n, "low-rank term", || {
        format!("x {:?}, w {:?} beside {m} x {n}", x.shape, w.shape)
    })?;
    Ok(LowRank { a: by_rows(x)?, b: if columns { by_columns(w)? } else { by_rows(w)? }, rank, compute, dtype })
}
