//! Moves, casts and elementwise arithmetic: kernels of cast.cu and elementwise.cu.

use super::{CudaDevice, expect};
use crate::device::{DType, Keep, Storage, Tensor, noise};
use crate::{Error, Result};

impl CudaDevice {
    pub(super) fn upload_values(&self, values: &[f32], shape: &[usize], dtype: DType) -> Result<Tensor> {
        expect(values.len() == shape.iter().product::<usize>(), "upload", || {
            format!("{} values for shape {shape:?}", values.len())
        })?;
        let wide = Tensor { shape: shape.to_vec(), dtype: DType::F32, storage: Storage::Cuda(self.put(values)?) };
        self.cast_to(&wide, dtype)
    }

    pub(super) fn download_values(&self, x: &Tensor) -> Result<Vec<f32>> {
        match &x.storage {
            Storage::Cuda(buffer) if x.dtype == DType::F32 => self.get(buffer, x.elements()),
            Storage::Cuda(buffer) => {
                let halves: Vec<u16> = self.get(buffer, x.elements())?;
                let widen = if x.dtype == DType::BF16 {
                    |h: u16| half::bf16::from_bits(h).to_f32()
                } else {
                    |h: u16| half::f16::from_bits(h).to_f32()
                };
                Ok(halves.into_iter().map(widen).collect())
            }
            Storage::Mapped(_) => self.download_values(&self.cast_to(x, DType::F32)?),
            Storage::Cpu(_) => Err(Error::internal("a tensor of the CPU reached the GPU")),
        }
    }

    pub(super) fn zeros_of(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let x = self.empty(shape, dtype)?;
        let place = self.operand(&x)?;
        // SAFETY: the buffer was made for this shape.
        unsafe { self.driver.zero(place.address, x.elements() * dtype.size())? };
        Ok(x)
    }

    /// x in another dtype; x itself (shared) where it already has it.
    pub(super) fn cast_to(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if x.dtype == dtype && matches!(x.storage, Storage::Cuda(_)) {
            return Ok(x.clone());
        }
        let out = self.empty(&x.shape, dtype)?;
        let (from, to) = (self.operand(x)?, self.operand(&out)?);
        let n = x.elements();
        let launch = self.kernels.launch("cast").tagged(to.address, dtype).tagged(from.address, from.dtype);
        // SAFETY: cast.cu; both hold n elements.
        unsafe { launch.value(n as u64).run_over(n)? };
        Ok(out)
    }

    pub(super) fn gather(&self, x: &Tensor, index: &[u32], dtype: DType) -> Result<Tensor> {
        let (rows, columns) = (x.rows(), x.columns());
        expect(index.iter().all(|&i| (i as usize) < rows), "gather_rows", || {
            format!("row {:?} of {rows}", index.iter().max())
        })?;
        let out = self.empty(&[index.len(), columns], dtype)?;
        let (from, to, places) = (self.operand(x)?, self.operand(&out)?, self.put(index)?);
        let launch = self.kernels.launch("gather_rows").tagged(to.address, dtype).tagged(from.address, from.dtype);
        let launch = launch.buffer(&places).value(index.len() as u64).value(columns as u64);
        // SAFETY: cast.cu; indices were checked.
        unsafe { launch.run_over(out.elements())? };
        Ok(out)
    }

    pub(super) fn scatter(&self, x: &Tensor, index: &[u32], rows: usize) -> Result<Tensor> {
        let columns = x.columns();
        expect(x.rows() == index.len() && index.iter().all(|&i| (i as usize) < rows), "scatter_rows", || {
            format!("x {:?}, {} indices up to {:?} of {rows} rows", x.shape, index.len(), index.iter().max())
        })?;
        let out = self.zeros_of(&[rows, columns], x.dtype)?;
        let (from, to, places) = (self.operand(x)?, self.operand(&out)?, self.put(index)?);
        let launch = self.kernels.launch("scatter_rows").value(to.address).tagged(from.address, from.dtype);
        let launch = launch.buffer(&places).value(index.len() as u64).value(columns as u64);
        // SAFETY: cast.cu; indices were checked and are distinct by the trait's contract.
        unsafe { launch.run_over(x.elements())? };
        Ok(out)
    }

    /// Every row of `out` becomes `row`.
    pub(super) fn fill_rows(&self, out: &Tensor, row: &Tensor) -> Result<()> {
        let (from, to) = (self.operand(row)?, self.operand(out)?);
        let launch = self.kernels.launch("fill_rows").tagged(to.address, out.dtype).tagged(from.address, from.dtype);
        // SAFETY: cast.cu; `product` checked that row has out's columns.
        unsafe { launch.value(out.rows() as u64).value(out.columns() as u64).run_over(out.elements()) }
    }

    pub(super) fn sum(&self, a: &Tensor, b: &Tensor, dtype: DType) -> Result<Tensor> {
        expect(a.shape == b.shape, "add", || format!("shapes {:?} and {:?}", a.shape, b.shape))?;
        let out = self.empty(&a.shape, dtype)?;
        let (left, right, to, n) = (self.operand(a)?, self.operand(b)?, self.operand(&out)?, a.elements());
        let meter = self.meter(&out, 1)?;
        let name = if meter.is_some() { "add_measured" } else { "add" };
        let launch = self.kernels.launch(name).tagged(to.address, dtype);
        let launch = launch.tagged(left.address, left.dtype).tagged(right.address, right.dtype);
        // SAFETY: elementwise.cu; all hold n elements.
        unsafe { self.make(launch, meter, &[&out], n)? };
        Ok(out)
    }

    pub(super) fn scaled(&self, x: &Tensor, s: f32, dtype: DType) -> Result<Tensor> {
        let out = self.empty(&x.shape, dtype)?;
        let (from, to, n) = (self.operand(x)?, self.operand(&out)?, x.elements());
        let launch = self.kernels.launch("scale").tagged(to.address, dtype).tagged(from.address, from.dtype);
        // SAFETY: elementwise.cu; both hold n elements.
        unsafe { launch.value(s).value(n as u64).run_over(n)? };
        Ok(out)
    }

    pub(super) fn scale_by(&self, x: &mut Tensor, s: f32) -> Result<()> {
        let (at, n) = (self.exclusive(x)?, x.elements());
        // SAFETY: elementwise.cu, in place: each element is read before it is written, by one thread.
        unsafe {
            self.kernels.launch("scale").tagged(at, x.dtype).tagged(at, x.dtype).value(s).value(n as u64).run_over(n)
        }
    }

    pub(super) fn add_to(&self, acc: &mut Tensor, g: &Tensor) -> Result<()> {
        expect(acc.elements() == g.elements(), "accumulate", || format!("shapes {:?} and {:?}", acc.shape, g.shape))?;
        let (at, from, n) = (self.exclusive(acc)?, self.operand(g)?, acc.elements());
        let launch = self.kernels.launch("accumulate").tagged(at, acc.dtype).tagged(from.address, from.dtype);
        // SAFETY: elementwise.cu; both hold n elements.
        unsafe { launch.value(n as u64).run_over(n) }
    }

    pub(super) fn perturbed(&self, x: &Tensor, seed: u64, stream: u64, ulp_of: DType) -> Result<Tensor> {
        let out = self.empty(&x.shape, x.dtype)?;
        let (from, to, n) = (self.operand(x)?, self.operand(&out)?, x.elements());
        let launch = self.kernels.launch("perturb").value(to.address).tagged(from.address, from.dtype);
        let launch = launch.value(noise::half_ulp(ulp_of)).value(noise::start(seed, stream));
        // SAFETY: elementwise.cu; both hold n elements.
        unsafe { launch.value(n as u64).run_over(n)? };
        Ok(out)
    }

    pub(super) fn dropped(&self, x: &Tensor, p: f64, keep: Keep<'_>) -> Result<Tensor> {
        let factor = keep.factor(p, x)?;
        let out = self.empty(&x.shape, x.dtype)?;
        let (from, to, n) = (self.operand(x)?, self.operand(&out)?, x.elements());
        let launch = |name| self.kernels.launch(name).value(to.address).tagged(from.address, from.dtype).value(factor);
        match keep {
            Keep::Drawn { seed, stream } => {
                let launch = launch("dropout").value(p as f32).value(noise::start(seed, stream));
                // SAFETY: elementwise.cu; both hold n elements.
                unsafe { launch.value(n as u64).run_over(n)? };
            }
            Keep::Bits(words) => {
                let words = self.put(words)?;
                // SAFETY: elementwise.cu; both hold n elements, and `factor` saw a bit for each.
                unsafe { launch("dropout_bits").buffer(&words).value(n as u64).run_over(n)? };
            }
        }
        Ok(out)
    }
}
