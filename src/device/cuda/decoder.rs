//! The decoder's own operations: kernels of norm.cu, rope.cu, attention.cu, gate.cu and loss.cu.

use super::kernels::{Launch, Plain, compute_tag};
use super::{CudaDevice, Operand, expect, expect_offsets, narrow};
use crate::Result;
use crate::device::{AttentionShape, Compute, DType, Storage, Tensor};

/// Largest head_dim of the narrow and of the wide attention kernels.
const NARROW: usize = 128;
const WIDE: usize = 256;
/// Threads that share a row (`LANES` in attention.cu).
const LANES: usize = 8;

/// `struct Geometry` of attention.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Geometry {
    heads: u32,
    kv_heads: u32,
    dim: u32,
    window: u32,
    scale: f32,
    compute: i32,
    result: i32,
}
// SAFETY: seven fields of four bytes, the same as in attention.cu.
unsafe impl Plain for Geometry {}

impl Geometry {
    fn new(shape: &AttentionShape, compute: Compute) -> Result<Self> {
        Ok(Self {
            heads: narrow(shape.heads, "head count")?,
            kv_heads: narrow(shape.kv_heads, "key head count")?,
            dim: narrow(shape.head_dim, "head_dim")?,
            window: shape.window.map_or(Ok(u32::MAX), |w| narrow(w, "sliding window"))?,
            scale: shape.scale,
            compute: compute_tag(compute),
            result: compute_tag(if compute == Compute::Tf32 { Compute::F32 } else { compute }),
        })
    }
}

/// Dtype of attention's output.
fn output_dtype(compute: Compute) -> DType {
    match compute {
        Compute::F32 | Compute::Tf32 => DType::F32,
        Compute::Bf16 => DType::BF16,
        Compute::F16 => DType::F16,
    }
}

/// Threads for a row of `columns`: by columns alone, so that a row's reduction order never depends on the call.
fn row_threads(columns: usize) -> u32 {
    columns.next_power_of_two().clamp(32, 256) as u32
}

/// `struct Tile` of attention.cu, flattened: {first row, begin, end} of each `tile` rows of each sequence.
fn tiles(rows: &[usize], tile: usize) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for sequence in rows.windows(2) {
        let (begin, end) = (narrow(sequence[0], "row")?, narrow(sequence[1], "row")?);
        all.extend((begin..end).step_by(tile).flat_map(|first| [first, begin, end]));
    }
    Ok(all)
}

fn check_attention(q: &Tensor, k: &Tensor, v: &Tensor, rows: &[usize], shape: &AttentionShape) -> Result<()> {
    expect_offsets(rows, q.rows(), "attention")?;
    let fits = shape.kv_heads > 0
        && shape.heads.is_multiple_of(shape.kv_heads)
        && q.columns() == shape.heads * shape.head_dim
        && [k, v].iter().all(|t| t.rows() == q.rows() && t.columns() == shape.kv_heads * shape.head_dim);
    expect(fits, "attention", || format!("q {:?}, k {:?}, v {:?}, {shape:?}", q.shape, k.shape, v.shape))?;
    if shape.head_dim > WIDE {
        return Err(crate::Error::refused(format!("head_dim {} is beyond the GPU kernels' {WIDE}", shape.head_dim))
            .next("use --device cpu"));
    }
    Ok(())
}

impl CudaDevice {
    pub(super) fn norm(&self, x: &Tensor, w: &Tensor, eps: f32, dtype: DType) -> Result<(Tensor, Tensor)> {
        let columns = w.elements();
        expect(columns > 0 && x.elements().is_multiple_of(columns), "rms_norm", || {
            format!("shape {:?} does not divide into rows of {columns}", x.shape)
        })?;
        let rows = x.elements() / columns;
        let (y, r) = (self.empty(&x.shape, dtype)?, self.empty(&[rows], DType::F32)?);
        let (from, weight, to, scale) = (self.operand(x)?, self.operand(w)?, self.operand(&y)?, self.operand(&r)?);
        // Norms of single heads have more rows than the pass has tokens and are not measured.
        let meter = if x.columns() == columns { self.meter(&y, 1)? } else { None };
        let name = if meter.is_some() { "rms_norm_measured" } else { "rms_norm" };
        let launch = self.kernels.launch(name).tagged(to.address, dtype).value(scale.address);
        let launch = launch.tagged(from.address, from.dtype).tagged(weight.address, weight.dtype);
        let (launch, threads) = (launch.value(columns as u64).value(eps), row_threads(columns));
        // SAFETY: norm.cu; shapes were checked; a measured run is whole rows.
        match meter {
            None => unsafe { launch.run((narrow(rows, "row count")?, 1), threads)? },
            Some(meter) => unsafe { self.make_measured(launch, meter, &[&y], threads)? },
        }
        Ok((y, r))
    }

    pub(super) fn norm_grad(
        &self,
        dy: &Tensor,
        (x, w, r): (&Tensor, &Tensor, &Tensor),
        so_far: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (columns, rows) = (w.elements(), r.elements());
        expect(so_far.is_none_or(|s| s.elements() == x.elements() && s.dtype == x.dtype), "rms_norm_grad", || {
            format!("x {:?} in {:?}, and another sum so far", x.shape, x.dtype)
        })?;
        expect(
            columns > 0 && x.elements() == rows * columns && dy.elements() == x.elements(),
            "rms_norm_grad",
            || format!("dy {:?}, x {:?}, w {columns}, r {rows}", dy.shape, x.shape),
        )?;
        let dx = self.empty(&x.shape, x.dtype)?;
        let (d, from, weight) = (self.operand(dy)?, self.operand(x)?, self.operand(w)?);
        let (scale, to) = (self.operand(r)?, self.operand(&dx)?);
        let so_far = so_far.map(|x| self.operand(x)).transpose()?;
        let before = so_far.as_ref().map_or(0, |operand| operand.address);
        let launch = self.kernels.launch("rms_norm_grad").value(to.address).value(before).tagged(d.address, d.dtype);
        let launch = launch.tagged(from.address, from.dtype).tagged(weight.address, weight.dtype).value(scale.address);
        // SAFETY: norm.cu; shapes were checked.
        unsafe { launch.value(columns as u64).run((narrow(rows, "row count")?, 1), row_threads(columns))? };
        Ok(dx)
    }

    pub(super) fn rotate(
        &self,
        x: &Tensor,
        positions: &[u32],
        (cos, sin): (&Tensor, &Tensor),
        heads: usize,
        inverse: bool,
        dtype: DType,
    ) -> Result<Tensor> {
        let (n, half) = (x.rows(), cos.columns());
        let known = cos.rows().min(sin.rows());
        let fits = x.columns() == heads * half * 2 && positions.len() == n && cos.dtype == sin.dtype;
        expect(fits && positions.iter().all(|&p| (p as usize) < known), "rope", || {
            format!(
                "x {:?}, {heads} heads, tables [{known}, {half}], {} positions up to {:?}",
                x.shape,
                positions.len(),
                positions.iter().max()
            )
        })?;
        let out = self.empty(&x.shape, dtype)?;
        let (from, to, places) = (self.operand(x)?, self.operand(&out)?, self.put(positions)?);
        let (cosine, sine) = (self.operand(cos)?, self.operand(sin)?);
        let meter = self.meter(&out, 1)?;
        let name = if meter.is_some() { "rope_measured" } else { "rope" };
        let launch = self.kernels.launch(name).tagged(to.address, dtype).tagged(from.address, from.dtype);
        let launch = launch.buffer(&places).value(cosine.address).tagged(sine.address, sine.dtype);
        let launch = launch.value(narrow(heads, "head count")?).value(narrow(2 * half, "head_dim")?);
        // SAFETY: rope.cu; shapes and positions were checked.
        unsafe { self.make(launch.value(i32::from(inverse)), meter, &[&out], x.elements())? };
        Ok(out)
    }

    pub(super) fn attend(
        &self,
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        rows: &[usize],
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor)> {
        check_attention(q, k, v, rows, shape)?;
        let o = self.empty(&q.shape, output_dtype(compute))?;
        let lse = self.empty(&[q.rows(), shape.heads], DType::F32)?;
        let (name, tile) = if shape.head_dim <= NARROW { ("attention_narrow", 32) } else { ("attention_wide", 16) };
        let table = tiles(rows, tile)?;
        let places = self.put(&table)?;
        let (qs, ks, vs) = (self.operand(q)?, self.operand(k)?, self.operand(v)?);
        let (to, sums) = (self.operand(&o)?, self.operand(&lse)?);
        let launch = self.kernels.launch(name).tagged(to.address, o.dtype).value(sums.address);
        let launch = launch.tagged(qs.address, qs.dtype).tagged(ks.address, ks.dtype).tagged(vs.address, vs.dtype);
        let launch = launch.buffer(&places).value(Geometry::new(shape, compute)?);
        let grid = (narrow(table.len() / 3, "tile count")?, narrow(shape.heads, "head count")?);
        // SAFETY: attention.cu; shapes were checked, the tiles cover the rows.
        unsafe { launch.run(grid, (tile * LANES) as u32)? };
        Ok((o, lse))
    }

    pub(super) fn attend_grad(
        &self,
        (d_o, o, lse): (&Tensor, &Tensor, &Tensor),
        (q, k, v): (&Tensor, &Tensor, &Tensor),
        rows: &[usize],
        shape: &AttentionShape,
        compute: Compute,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        check_attention(q, k, v, rows, shape)?;
        let pairs = q.rows() * shape.heads;
        expect(d_o.shape == q.shape && o.shape == q.shape && lse.elements() == pairs, "attention_grad", || {
            format!("d_o {:?}, o {:?}, q {:?}, lse {:?}", d_o.shape, o.shape, q.shape, lse.shape)
        })?;
        let geometry = Geometry::new(shape, compute)?;
        let (ds, os, sums) = (self.operand(d_o)?, self.operand(o)?, self.operand(lse)?);
        let delta = self.empty(&[q.rows(), shape.heads], DType::F32)?;
        let deltas = self.operand(&delta)?;
        let launch = self.kernels.launch("attention_delta").value(deltas.address).tagged(ds.address, ds.dtype);
        let launch =
            launch.tagged(os.address, os.dtype).value(pairs as u64).value(geometry.dim).value(geometry.compute);
        // SAFETY: attention.cu; eight warps a block, one warp a (row, head).
        unsafe { launch.run((narrow(pairs.div_ceil(8), "row count")?, 1), 256)? };

        let narrow_heads = shape.head_dim <= NARROW;
        let tile = if narrow_heads { 16 } else { 8 };
        let table = tiles(rows, tile)?;
        let (places, threads) = (self.put(&table)?, (tile * LANES) as u32);
        let (qs, ks, vs) = (self.operand(q)?, self.operand(k)?, self.operand(v)?);
        let grids = narrow(table.len() / 3, "tile count")?;
        let finish = |launch: Launch<'_>, heads: u32| {
            let launch = launch.value(sums.address).value(deltas.address).buffer(&places).value(geometry);
            // SAFETY: attention.cu; shapes were checked, the tiles cover the rows.
            unsafe { launch.run((grids, heads), threads) }
        };
        let (dq, dk, dv) =
            (self.empty(&q.shape, q.dtype)?, self.empty(&k.shape, k.dtype)?, self.empty(&v.shape, v.dtype)?);
        let at = |x: &Tensor| self.operand(x).map(|operand: Operand| operand.address);
        let name = if narrow_heads { "attention_query_grad_narrow" } else { "attention_query_grad_wide" };
        let launch = self.kernels.launch(name).tagged(at(&dq)?, q.dtype).tagged(ds.address, ds.dtype).value(qs.address);
        finish(launch.tagged(ks.address, ks.dtype).tagged(vs.address, vs.dtype), geometry.heads)?;
        let name = if narrow_heads { "attention_key_grad_narrow" } else { "attention_key_grad_wide" };
        let launch = self.kernels.launch(name).tagged(at(&dk)?, k.dtype).tagged(at(&dv)?, v.dtype);
        let launch = launch.tagged(ds.address, ds.dtype).tagged(qs.address, qs.dtype);
        finish(launch.value(ks.address).value(vs.address), geometry.kv_heads)?;
        Ok((dq, dk, dv))
    }

    pub(super) fn gated(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        expect(gate.shape == up.shape, "gate", || format!("shapes {:?} and {:?}", gate.shape, up.shape))?;
        let out = self.empty(&gate.shape, gate.dtype)?;
        let (g, u, to, n) = (self.operand(gate)?, self.operand(up)?, self.operand(&out)?, gate.elements());
        let meter = self.meter(&out, 1)?;
        let name = if meter.is_some() { "gate_measured" } else { "gate" };
        let launch = self.kernels.launch(name).value(to.address).tagged(g.address, g.dtype).tagged(u.address, u.dtype);
        // SAFETY: gate.cu; all hold n elements.
        unsafe { self.make(launch, meter, &[&out], n)? };
        Ok(out)
    }

    pub(super) fn gated_grad(&self, d_out: &Tensor, gate: &Tensor, up: &Tensor) -> Result<(Tensor, Tensor)> {
        expect(gate.shape == up.shape && gate.shape == d_out.shape, "gate_grad", || {
            format!("shapes {:?}, {:?} and {:?}", d_out.shape, gate.shape, up.shape)
        })?;
        let (d_gate, d_up) = (self.empty(&gate.shape, gate.dtype)?, self.empty(&up.shape, up.dtype)?);
        let (d, g, u, n) = (self.operand(d_out)?, self.operand(gate)?, self.operand(up)?, gate.elements());
        let (to_gate, to_up) = (self.operand(&d_gate)?, self.operand(&d_up)?);
        // One table of limits serves both gradients, so they must be of one dtype to be measured here.
        let meter = if gate.dtype == up.dtype { self.meter(&d_gate, 2)? } else { None };
        let name = if meter.is_some() { "gate_grad_measured" } else { "gate_grad" };
        let launch = self.kernels.launch(name).value(to_gate.address).value(to_up.address);
        let launch = launch.tagged(d.address, d.dtype).tagged(g.address, g.dtype).tagged(u.address, u.dtype);
        // SAFETY: gate.cu; all hold n elements.
        unsafe { self.make(launch, meter, &[&d_gate, &d_up], n)? };
        Ok((d_gate, d_up))
    }

    pub(super) fn loss(&self, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        let d_logits = self.empty(&logits.shape, logits.dtype)?;
        Ok((self.loss_into(&d_logits, logits, labels, seed)?, d_logits))
    }

    /// [`Self::loss`] with the gradient in the logits' own memory, if nobody else holds it.
    pub(super) fn loss_owned(&self, mut logits: Tensor, labels: &[u32], seed: &[f32]) -> Result<(Vec<f32>, Tensor)> {
        let unshared = match &mut logits.storage {
            Storage::Cuda(buffer) => buffer.is_unique(),
            Storage::Cpu(_) | Storage::Mapped(_) => false,
        };
        if unshared {
            return Ok((self.loss_into(&logits, &logits, labels, seed)?, logits));
        }
        self.loss(&logits, labels, seed)
    }

    /// Losses per row; the gradient goes to `d_logits`, which may be `logits`.
    fn loss_into(&self, d_logits: &Tensor, logits: &Tensor, labels: &[u32], seed: &[f32]) -> Result<Vec<f32>> {
        let (rows, vocabulary) = (logits.rows(), logits.columns());
        expect(labels.len() == rows && seed.len() == rows && vocabulary > 0, "cross_entropy", || {
            format!("logits {:?}, {} labels, {} seeds", logits.shape, labels.len(), seed.len())
        })?;
        expect(labels.iter().all(|&l| (l as usize) < vocabulary), "cross_entropy", || {
            format!("label {:?} of {vocabulary}", labels.iter().max())
        })?;
        if let Storage::Cuda(buffer) = &d_logits.storage {
            buffer.set_stash(None);
        }
        let losses = self.bytes(rows * size_of::<f32>())?;
        let (from, to) = (self.operand(logits)?, self.operand(d_logits)?);
        let (targets, seeds) = (self.put(labels)?, self.put(seed)?);
        let launch = self.kernels.launch("cross_entropy").buffer(&losses).value(to.address);
        let launch = launch.tagged(from.address, from.dtype).buffer(&targets).buffer(&seeds).value(vocabulary as u64);
        // SAFETY: loss.cu; labels were checked, both hold rows · vocabulary elements of one dtype.
        unsafe { launch.run((narrow(rows, "row count")?, 1), 256)? };
        self.get(&losses, rows)
    }
}
