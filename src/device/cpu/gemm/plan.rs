//! A product as the kernels see it: which operand is on which side, and where its sums are cut.

use std::ops::Range;

use super::order::Order;
use super::{Buffer, Kernel, LowRank, Matrix, Product, Then, pack};
use crate::device::{Compute, DType};

/// A product as the kernels see it. A narrow result (a LoRA rank) is computed transposed: the kernels waste no lanes
/// on few rows, but would on few columns. The sums are the same either way.
pub struct Plan<'a> {
    pub product: &'a Product<'a>,
    pub kernel: &'a Kernel,
    pub a: &'a Matrix<'a>,
    pub b: &'a Matrix<'a>,
    pub m: usize,
    pub n: usize,
    /// Elements of C between rows and between columns of this view.
    pub strides: (usize, usize),
    /// Units of depth.
    pub depth: usize,
    /// Where the depth is not summed in parts.
    pub order: Option<Order>,
}

impl<'a> Plan<'a> {
    pub fn new(product: &'a Product<'a>, kernel: &'a Kernel) -> Self {
        let depth = kernel.units(product.k);
        let order = order((&product.a, &product.b), product.k, product.compute);
        if product.n < kernel.columns
            && product.n < product.m
            && product.bias.is_none()
            && matches!(product.then, Then::Nothing)
        {
            let (m, n) = (product.n, product.m);
            return Self { product, kernel, a: &product.b, b: &product.a, m, n, strides: (1, product.n), depth, order };
        }
        let (m, n) = (product.m, product.n);
        Self { product, kernel, a: &product.a, b: &product.b, m, n, strides: (n, 1), depth, order }
    }

    pub fn transposed(&self) -> bool {
        std::ptr::eq(self.a, &self.product.b)
    }

    pub fn panels(&self) -> usize {
        self.m.div_ceil(self.kernel.rows)
    }

    /// Whether tiles need finishing after the last part of the depth.
    pub fn finishes(&self) -> bool {
        let Product { bias, out, then, .. } = self.product;
        bias.is_some() || *out != DType::F32 || !matches!(then, Then::Nothing)
    }

    /// The low-rank term with room for its rows.
    pub fn term(&self) -> Option<Term<'a>> {
        let of = self.product.then.term()?;
        let kernel = Kernel::best(of.compute);
        assert!(kernel.rows == self.kernel.rows && kernel.columns == self.kernel.columns, "one tile for both products");
        let order = order((&of.a, &of.b), of.rank, of.compute);
        Some(Term { of, kernel, order, a: Buffer::unset(self.panels() * kernel.rows * kernel.units(of.rank)) })
    }

    /// The depth in parts of [`depth_block`]; one empty part if there is none, which stores zeros.
    pub fn parts(&self) -> impl Iterator<Item = Range<usize>> {
        let whole = self.order.as_ref().map(|_| self.depth);
        let (depth, part) = (self.depth, whole.unwrap_or(depth_block(self.product) / self.kernel.per_unit));
        (0..depth.div_ceil(part.max(1)).max(1)).map(move |i| part * i..(part * (i + 1)).min(depth))
    }
}

/// Elements of depth that are summed in one chain before they are added to what is there.
fn depth_block(product: &Product<'_>) -> usize {
    match product.compute {
        Compute::F32 | Compute::Tf32 => mkl_block(product.k),
        Compute::Bf16 => onednn_block(product),
        // `gemm_transb_` of ATen; the other products of fp16 have an order of their own.
        Compute::F16 => product.k,
    }
}

/// The order of a product's terms if it is not that of parts of the depth.
fn order((a, b): (&Matrix<'_>, &Matrix<'_>), k: usize, compute: Compute) -> Option<Order> {
    match (compute, a.depth, b.depth) {
        (Compute::F16, 1, 1) => Some(Order::dot(k)),
        (Compute::F16, 1, _) => Some(Order::interleaved(k)),
        _ => None,
    }
}

/// MKL's sgemm: 192, or two halves of less than twice that (found from outside, on its AVX-512 kernels: an LCA of two
/// terms, masked by large ones, spans the sums that meet there).
pub fn mkl_block(k: usize) -> usize {
    if k > 192 { 192.min(k / 2) } else { k }
}

/// oneDNN (brgemm_matmul_utils.cpp, `compute_blocking_heuristic_avx512`): 512, and 1024 for more depth unless the first
/// operand is transposed, as in the gradient of a weight.
fn onednn_block(product: &Product<'_>) -> usize {
    let transposed = product.a.depth != 1;
    if product.k > 1024 && !transposed { 1024 } else { 512 }
}

/// A low-rank term, its rows packed.
pub struct Term<'a> {
    pub of: &'a LowRank<'a>,
    pub kernel: Kernel,
    pub order: Option<Order>,
    pub a: Buffer,
}

impl Term<'_> {
    pub fn units(&self) -> usize {
        self.kernel.units(self.of.rank)
    }
    /// Lays out the columns `lanes`, in panels.
    pub fn pack_columns(&self, lanes: Range<usize>, packed: &mut [u32]) {
        let width = self.kernel.columns;
        let out = &mut packed[..lanes.len().div_ceil(width) * width * self.units()];
        let layout = pack::Layout { kernel: &self.kernel, width, order: self.order.as_ref() };
        pack::pack(&self.of.b, lanes, 0..self.of.rank, &layout, out);
    }
}
