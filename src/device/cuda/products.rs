//! Matrix products: operands brought to the compute dtype, one cuBLAS call, one rounding to the output's dtype.
//!
//! Row-major matrices are column-major transposes, so every product is asked for transposed: Cᵀ = Bᵀ·Aᵀ.

use super::cublas::Gemm;
use super::{CudaDevice, Operand, expect, expect_offsets, lock};
use crate::Result;
use crate::device::{Compute, DType, Tensor};

/// The dtype that operands of a product are stored in.
fn operand_dtype(compute: Compute) -> DType {
    match compute {
        Compute::F32 | Compute::Tf32 => DType::F32,
        Compute::Bf16 => DType::BF16,
        Compute::F16 => DType::F16,
    }
}

/// cuBLAS writes f32 or the operands' dtype; another output is f32 first, then cast (one rounding still).
fn result_dtype(operands: DType, out: DType) -> DType {
    if out == operands { out } else { DType::F32 }
}

impl CudaDevice {
    /// x as an operand of `compute`; cast only where its dtype differs.
    fn product_operand(&self, x: &Tensor, compute: Compute) -> Result<Operand> {
        let wanted = operand_dtype(compute);
        if x.dtype == wanted { self.operand(x) } else { self.operand(&self.cast_to(x, wanted)?) }
    }

    /// y [n, out] = x [n, in] · w [out, in]ᵀ + bias.
    pub(super) fn product(
        &self,
        x: &Tensor,
        w: &Tensor,
        bias: Option<&Tensor>,
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (n, inner, width) = (x.rows(), x.columns(), w.rows());
        expect(w.columns() == inner && bias.is_none_or(|b| b.elements() == width), "linear", || {
            format!("x {:?}, w {:?}, bias {:?}", x.shape, w.shape, bias.map(|b| &b.shape))
        })?;
        let operands = operand_dtype(compute);
        let result = match bias {
            // The bias lies in C, so C must hold it exactly.
            Some(bias) if bias.dtype != out => DType::F32,
            _ => result_dtype(operands, out),
        };
        let y = self.empty(&[n, width], result)?;
        if let Some(bias) = bias {
            self.fill_rows(&y, bias)?;
        }
        let (a, b, c) = (self.product_operand(w, compute)?, self.product_operand(x, compute)?, self.operand(&y)?);
        let gemm = Gemm {
            transpose_a: true,
            transpose_b: false,
            m: width,
            n,
            k: inner,
            a: a.address,
            lda: inner,
            b: b.address,
            ldb: inner,
            operands,
            beta: if bias.is_some() { 1.0 } else { 0.0 },
            c: c.address,
            ldc: width,
            result,
            compute,
        };
        self.multiply(&gemm)?;
        self.cast_to(&y, out)
    }

    /// dx [n, in] = dy [n, out] · w [out, in].
    pub(super) fn product_input_grad(&self, dy: &Tensor, w: &Tensor, compute: Compute, out: DType) -> Result<Tensor> {
        let (n, width, inner) = (dy.rows(), dy.columns(), w.columns());
        expect(w.rows() == width, "linear_input_grad", || format!("dy {:?}, w {:?}", dy.shape, w.shape))?;
        let operands = operand_dtype(compute);
        let dx = self.empty(&[n, inner], result_dtype(operands, out))?;
        let (a, b, c) = (self.product_operand(w, compute)?, self.product_operand(dy, compute)?, self.operand(&dx)?);
        let gemm = Gemm {
            transpose_a: false,
            transpose_b: false,
            m: inner,
            n,
            k: width,
            a: a.address,
            lda: inner,
            b: b.address,
            ldb: width,
            operands,
            beta: 0.0,
            c: c.address,
            ldc: inner,
            result: dx.dtype,
            compute,
        };
        self.multiply(&gemm)?;
        self.cast_to(&dx, out)
    }

    /// Per unit u: dw_u [out, in] = dy[u]ᵀ · x[u].
    pub(super) fn product_weight_grad(
        &self,
        dy: &Tensor,
        x: &Tensor,
        units: &[usize],
        compute: Compute,
        out: DType,
    ) -> Result<Tensor> {
        let (width, inner) = (dy.columns(), x.columns());
        expect(dy.rows() == x.rows(), "linear_weight_grad", || format!("dy {:?}, x {:?}", dy.shape, x.shape))?;
        expect_offsets(units, x.rows(), "linear_weight_grad")?;
        let operands = operand_dtype(compute);
        let result = result_dtype(operands, out);
        let count = units.len() - 1;
        let dw = if units.windows(2).any(|unit| unit[0] == unit[1]) {
            self.zeros_of(&[count, width, inner], result)? // an empty unit has no product to fill its part
        } else {
            self.empty(&[count, width, inner], result)?
        };
        let (a, b, c) = (self.product_operand(x, compute)?, self.product_operand(dy, compute)?, self.operand(&dw)?);
        for (u, unit) in units.windows(2).enumerate() {
            let at = |base: u64, index: usize, dtype: DType| base + (index * dtype.size()) as u64;
            let gemm = Gemm {
                transpose_a: false,
                transpose_b: true,
                m: inner,
                n: width,
                k: unit[1] - unit[0],
                a: at(a.address, unit[0] * inner, operands),
                lda: inner,
                b: at(b.address, unit[0] * width, operands),
                ldb: width,
                operands,
                beta: 0.0,
                c: at(c.address, u * width * inner, result),
                ldc: inner,
                result,
                compute,
            };
            self.multiply(&gemm)?;
        }
        self.cast_to(&dw, out)
    }

    fn multiply(&self, gemm: &Gemm) -> Result<()> {
        if gemm.m == 0 || gemm.n == 0 || gemm.k == 0 {
            return Ok(());
        }
        // SAFETY: the callers above took the addresses from operands of these shapes, which they still hold.
        unsafe { lock(&self.blas).run(gemm) }
    }
}
