//! What every part of one chunk's pass shares: device, weights, plan, batch, and the small helpers on them.

use super::dropout::{Dropout, Kept, Masks};
use super::held::{Held, flip_bit};
use super::ragged::Padding;
use super::{Adapter, ModelConfig, PassOptions, PrecisionPlan, Ragged, RopeTables};
use crate::Result;
use crate::device::{Compute, DType, Device, Keep, Tensor, noise};
use crate::probe::{Part, Recorder, Role, Site};

pub(super) struct Context<'a> {
    pub device: &'a dyn Device,
    pub config: &'a ModelConfig,
    pub plan: &'a PrecisionPlan,
    pub held: &'a Held,
    pub adapter: &'a Adapter,
    pub rope: &'a RopeTables,
    pub batch: &'a Ragged,
    /// Offsets of units in tokens.
    pub unit_tokens: Vec<usize>,
    /// Where the tokens lie in the trainer's padded micro-batches, if gradients of weights show it.
    pub padding: Option<&'a Padding>,
    /// Per row of the chunk, the length that the trainer pads it to.
    pub padded: &'a [usize],
    /// Per row of the chunk, as attention asks; empty: none is.
    pub grouped: Vec<bool>,
    /// Index in the window of the chunk's first micro-batch, and of its first token.
    pub first_unit: usize,
    pub first_token: usize,
    pub options: &'a PassOptions,
    pub masks: &'a Kept,
    pub recorder: &'a Recorder,
}

/// Streams of the counter-based generator: blocks' noise from 0, dropout masks from here.
const DROPOUT_STREAM: u64 = 1 << 32;

impl<'a> Context<'a> {
    /// This context with another recorder (a block's second run is not measured again).
    pub fn recording<'b>(&'b self, recorder: &'b Recorder) -> Context<'b> {
        Context { recorder, unit_tokens: self.unit_tokens.clone(), grouped: self.grouped.clone(), ..*self }
    }

    /// Per unit, dyᵀ · x over its tokens: [units, columns of dy, columns of x] in `out`. Summed over the trainer's
    /// padded positions where their number or parity decides the order of the sum.
    pub fn weight_grad(&self, dy: &Tensor, x: &Tensor, compute: Compute, out: DType) -> Result<Tensor> {
        let Some(Padding { index, units }) = self.padding else {
            return self.device.linear_weight_grad(dy, x, &self.unit_tokens, compute, out);
        };
        let positions = units.last().copied().unwrap_or(0);
        let dy = self.device.scatter_rows(dy, index, positions)?;
        let x = self.device.scatter_rows(x, index, positions)?;
        self.device.linear_weight_grad(&dy, &x, units, compute, out)
    }

    /// x in `dtype`; shared, not copied, when it already is.
    pub fn cast(&self, x: &Tensor, dtype: DType) -> Result<Tensor> {
        if x.dtype == dtype { Ok(x.clone()) } else { self.device.cast(x, dtype) }
    }

    /// Embedding output [n, hidden].
    pub fn embed(&self) -> Result<Tensor> {
        let x = self.device.embedding(&self.held.embedding, &self.batch.ids, self.plan.residual())?;
        self.observe(Site::outside(Part::Embedding, Role::Output), x)
    }

    /// The input of block `layer`, with noise when asked for.
    pub fn perturb(&self, layer: usize, h: Tensor) -> Result<Tensor> {
        match self.options.perturb {
            None => Ok(h),
            Some(seed) => {
                let stream = layer as u64;
                self.device.perturb(&h, self.seed_of(seed, stream, &h), stream, self.plan.linear())
            }
        }
    }

    /// Applies the dropout mask of adapted linear `module`; the same one on every call.
    pub fn dropout(&self, x: &Tensor, module: usize) -> Result<Tensor> {
        let Some(Dropout { p, masks }) = &self.options.dropout else { return Ok(x.clone()) };
        let keep = match masks {
            Masks::Torch(_) => Keep::Bits(&self.masks[module]),
            Masks::Drawn { seed } => {
                let stream = DROPOUT_STREAM + module as u64;
                Keep::Drawn { seed: self.seed_of(*seed, stream, x), stream }
            }
        };
        self.device.dropout(x, *p, keep)
    }

    /// The seed with which the chunk's part of `stream` is that of the whole window: x has a row per token.
    fn seed_of(&self, seed: u64, stream: u64, x: &Tensor) -> u64 {
        noise::shifted(seed, stream, (self.first_token * x.columns()) as u64)
    }

    /// The result of `f`, of whose tensors nothing is measured.
    pub fn unmeasured<T>(&self, f: impl FnOnce() -> T) -> T {
        self.device.pause_statistics(true);
        let result = f();
        self.device.pause_statistics(false);
        result
    }

    /// Measures a tensor with one row per token, and flips the bits of it that the options name.
    pub fn observe(&self, site: Site, mut x: Tensor) -> Result<Tensor> {
        for flip in self.options.activation_flips.iter().filter(|f| f.site == site) {
            let first = self.first_token * x.columns();
            if let Some(element) = flip.element.checked_sub(first).filter(|&e| e < x.elements()) {
                let dtype = x.dtype;
                x = flip_bit(self.device, &x, dtype, element, flip.bit).map_err(|e| e.at(site))?;
            }
        }
        self.recorder.measure(self.device, site, &x, &self.unit_tokens, self.first_unit)?;
        Ok(x)
    }
}
