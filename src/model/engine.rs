//! One pass over a window: losses and LoRA gradients of every micro-batch, chunk by chunk.
//!
//! Owns chunking, recomputation and what a pass returns. Blocks and lm_head are `block` and `head`; what is done
//! with losses and gradients is `step`'s.

use std::collections::HashMap;
use std::sync::Arc;

use super::context::Context;
use super::dropout::{Dropout, Masks};
use super::held::{Held, WeightFlip};
use super::{Adapter, BaseModel, Gradients, ModelConfig, PrecisionPlan, Ragged, RopeTables, block, head};
use crate::batches::Mt19937;
use crate::device::{DType, Device, Tensor};
use crate::error::Kind;
use crate::probe::{Measurement, Probes, Recorder, Site};
use crate::{Error, Result, interrupt};

/// A base model on a device in one precision. Immutable; shared by every replay of a run.
pub struct Engine {
    device: Arc<dyn Device>,
    base: Arc<BaseModel>,
    plan: PrecisionPlan,
    held: Held,
}

/// What a pass does besides the plain computation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PassOptions {
    /// Relative noise of half an ulp of the compute dtype on every block's input, from this seed.
    pub perturb: Option<u64>,
    pub dropout: Option<Dropout>,
    pub probes: Probes,
    /// Dtype whose range probes count against (would this run fit fp16?); `None`: each tensor's own.
    pub probe_range: Option<DType>,
    pub weight_flips: Vec<WeightFlip>,
    pub activation_flips: Vec<ActivationFlip>,
    /// Micro-batches without padding attend in groups ([`AttentionShape::grouped`](crate::device::AttentionShape)).
    pub grouped_attention: bool,
    pub memory: Memory,
}

/// One bit of a tensor of the pass inverted where it arises. The element counts from the window's first token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ActivationFlip {
    pub site: Site,
    pub element: usize,
    pub bit: u32,
}

/// How much of a window is in memory at once. Results do not depend on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Memory {
    /// Chunks whose saved activations stay below [`ACTIVATION_BUDGET`]; blocks recomputed when a single
    /// micro-batch would need several times as much.
    #[default]
    Auto,
    /// Chunks of at most `tokens` tokens (a larger micro-batch alone), blocks recomputed in the backward pass or not.
    Chunks { tokens: usize, recompute: bool },
    /// One micro-batch at a time, blocks recomputed as under `Auto`: the trainer's own products, if rows are
    /// padded as its are ([`Ragged::with_padding`]).
    MicroBatches,
}

/// Bytes of saved activations that a chunk aims at. With the largest small model (SmolLM2-135M) this is about 400
/// tokens: enough rows for the matrix products to run at full speed, and a fifth of what PyTorch holds.
pub const ACTIVATION_BUDGET: usize = 256 << 20;

/// What a pass measured.
#[derive(Debug, Clone, PartialEq)]
pub struct PassOutput {
    /// Per micro-batch, in the order of the [`Ragged`].
    pub units: Vec<UnitOutput>,
    /// In execution order, chunk by chunk; empty unless asked for.
    pub measurements: Vec<Measurement>,
    /// Those of [`TorchMasks`], past the last micro-batch; empty without.
    pub generators: Vec<Mt19937>,
}

/// One micro-batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct UnitOutput {
    /// s_i: Σ cross-entropy over labelled positions, f32 as PyTorch sums it.
    pub loss_sum: f32,
    /// c_i.
    pub label_tokens: usize,
    pub tokens: usize,
    /// ‖gradient‖₂ of this micro-batch's own contribution, loss scale included; 0 without a backward pass.
    pub grad_norm: f64,
    /// Non-finite gradient elements.
    pub nonfinite: u64,
}

impl Engine {
    /// # Errors
    /// The plan is one the trainer refuses, or weights could not be moved to the device.
    pub fn new(device: Arc<dyn Device>, base: Arc<BaseModel>, plan: PrecisionPlan) -> Result<Self> {
        plan.check()?;
        let held = Held::new(&*device, &base, &plan)?;
        Ok(Self { device, base, plan, held })
    }

    /// The same weights, computed with by `device`, which must be able to read them where they lie.
    pub fn on(&self, device: Arc<dyn Device>) -> Self {
        Self { device, base: self.base(), plan: self.plan, held: self.held.clone() }
    }

    pub fn device(&self) -> &dyn Device {
        &*self.device
    }
    /// The frozen weights as read from disk.
    pub fn base(&self) -> Arc<BaseModel> {
        Arc::clone(&self.base)
    }
    pub fn config(&self) -> &ModelConfig {
        &self.base.config
    }
    pub fn plan(&self) -> &PrecisionPlan {
        &self.plan
    }

    /// Paths of the frozen weights by [`Storage::identity`](crate::device::Storage::identity).
    pub fn weight_names(&self) -> HashMap<usize, String> {
        // A tied lm_head is the embedding's memory; the first name is kept.
        let mut names = HashMap::new();
        for (name, weight) in self.held.named() {
            names.entry(weight.storage.identity()).or_insert(name);
        }
        names
    }

    /// Forward and backward over all micro-batches of `batch`. `seeds[i]` is d(back-propagated loss) / d(s_i) of
    /// micro-batch i, loss scale included (1/N, contract 5.1). Gradients are added to `gradients` micro-batch by
    /// micro-batch, those of each rank by themselves first.
    ///
    /// # Errors
    /// Token ids outside the vocabulary, flips of tensors that do not exist, or a device that runs out of memory.
    pub fn pass(
        &self,
        adapter: &Adapter,
        batch: &Ragged,
        seeds: &[f32],
        options: &PassOptions,
        gradients: &mut Gradients,
    ) -> Result<PassOutput> {
        if seeds.len() != batch.units() {
            return Err(Error::internal(format!("{} seeds for {} micro-batches", seeds.len(), batch.units())));
        }
        let output = self.run(adapter, batch, options, Some((seeds, &mut *gradients)))?;
        gradients.reduce(&*self.device)?;
        Ok(output)
    }

    /// Forward only: losses.
    ///
    /// # Errors
    /// As [`Engine::pass`].
    pub fn losses(&self, adapter: &Adapter, batch: &Ragged, options: &PassOptions) -> Result<PassOutput> {
        self.run(adapter, batch, options, None)
    }

    fn run(
        &self,
        adapter: &Adapter,
        batch: &Ragged,
        options: &PassOptions,
        mut backward: Option<(&[f32], &mut Gradients)>,
    ) -> Result<PassOutput> {
        self.check(batch)?;
        let flipped = match options.weight_flips.as_slice() {
            [] => None,
            flips => Some(self.held.flipped(&*self.device, &self.base, &self.plan, flips)?),
        };
        let held = flipped.as_ref().unwrap_or(&self.held);
        let (mut tokens, mut recompute) = self.memory(batch, options.memory);
        // What has been added before the device's memory runs out is taken back; a copy is made when it is added to.
        let before = backward.as_ref().map(|(_, gradients)| (**gradients).clone());
        loop {
            let again = backward.as_mut().map(|(seeds, gradients)| (*seeds, &mut **gradients));
            match self.run_chunks(adapter, batch, options, held, (tokens, recompute), again) {
                Err(e) if e.kind == Kind::Memory => match smaller(batch, tokens, recompute) {
                    Some(less) => (tokens, recompute) = less,
                    None => return Err(e.at("one micro-batch at a time, blocks recomputed in the backward pass")),
                },
                done => return done,
            }
            if let (Some((_, gradients)), Some(before)) = (&mut backward, &before) {
                (**gradients).clone_from(before);
            }
        }
    }

    fn run_chunks(
        &self,
        adapter: &Adapter,
        batch: &Ragged,
        options: &PassOptions,
        held: &Held,
        (tokens, recompute): (usize, bool),
        mut backward: Option<(&[f32], &mut Gradients)>,
    ) -> Result<PassOutput> {
        let rope = RopeTables::new(&*self.device, &self.base.config, batch.positions_end(), self.plan.residual())?;
        let recorder = Recorder::new(options.probes, options.probe_range);
        let mut units = Vec::with_capacity(batch.units());
        let mut torch = options.dropout.as_ref().and_then(|dropout| match &dropout.masks {
            Masks::Torch(masks) => Some((dropout.p, masks.clone())),
            Masks::Drawn { .. } => None,
        });
        for range in batch.chunks(tokens) {
            let first_unit = range.start;
            let chunk = batch.slice(range.clone());
            let padding = chunk.padding();
            let drawn = torch.as_mut().map(|(p, masks)| masks.draw(*p, adapter, &chunk, first_unit)).transpose()?;
            let masks = drawn.unwrap_or_default();
            let context = Context {
                device: &*self.device,
                config: &self.base.config,
                plan: &self.plan,
                held,
                adapter,
                rope: &rope,
                batch: &chunk,
                unit_tokens: chunk.unit_tokens(),
                padding: padding.as_ref(),
                padded: &chunk.padded_rows,
                grouped: if options.grouped_attention { chunk.unpadded_rows() } else { Vec::new() },
                first_unit,
                first_token: batch.rows[batch.unit_rows[first_unit]],
                options,
                masks: &masks,
                recorder: &recorder,
            };
            let backward = backward.as_mut().map(|(seeds, gradients)| (&seeds[range], &mut **gradients));
            let _expecting = recorder.expect(&*self.device, &context.unit_tokens, None);
            units.extend(run_chunk(&context, backward, recompute)?);
        }
        let generators = torch.map(|(_, masks)| masks.generators).unwrap_or_default();
        Ok(PassOutput { units, measurements: recorder.finish(&*self.device)?, generators })
    }

    fn check(&self, batch: &Ragged) -> Result<()> {
        let config = &self.base.config;
        let limit = config.vocab as u32;
        if let Some(id) = batch.ids.iter().chain(&batch.targets).find(|&&id| id >= limit) {
            let what = format!("token id {id} is outside the model's vocabulary of {limit}");
            return Err(Error::input(what).next("use the tokenizer that belongs to the base model"));
        }
        Ok(())
    }

    /// (tokens per chunk, recompute blocks).
    fn memory(&self, batch: &Ragged, memory: Memory) -> (usize, bool) {
        match memory {
            Memory::Chunks { tokens, recompute } => (tokens, recompute),
            Memory::Auto | Memory::MicroBatches => {
                let block = block::saved_bytes(&self.base.config);
                let all = block * self.base.config.layers;
                let largest = batch.unit_tokens().windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
                let recompute = largest * all > 4 * ACTIVATION_BUDGET;
                let kept = if recompute { 4 * self.base.config.hidden * self.base.config.layers + block } else { all };
                let tokens = if memory == Memory::Auto { ACTIVATION_BUDGET / kept.max(1) } else { 1 };
                (tokens.max(1), recompute)
            }
        }
    }
}

/// Less memory than chunks of `tokens` tokens take: half as many, then recomputed blocks; `None` when a single
/// micro-batch at a time is as small as it gets.
fn smaller(batch: &Ragged, tokens: usize, recompute: bool) -> Option<(usize, bool)> {
    let offsets = batch.unit_tokens();
    let several = batch.chunks(tokens).into_iter().filter(|chunk| chunk.len() > 1);
    match several.map(|chunk| offsets[chunk.end] - offsets[chunk.start]).max() {
        Some(largest) => Some((largest / 2, recompute)),
        None => (!recompute).then_some((tokens, true)),
    }
}

/// What the backward pass needs of one block.
enum Kept {
    Saved(Box<block::Saved>),
    /// The block's input; the block runs forward again.
    Input(Tensor),
}

/// Forward and, with seeds and gradients, backward over one chunk.
fn run_chunk(
    context: &Context<'_>,
    backward: Option<(&[f32], &mut Gradients)>,
    recompute: bool,
) -> Result<Vec<UnitOutput>> {
    let mut kept = Vec::new();
    let mut h = context.embed()?;
    for layer in 0..context.config.layers {
        // A block of a large model takes seconds; an interrupted pass returns nothing, so nothing is left half done.
        interrupt::check()?;
        h = context.perturb(layer, h)?;
        let (out, saved) = block::forward(context, layer, &h)?;
        if backward.is_some() {
            kept.push(if recompute { Kept::Input(h) } else { Kept::Saved(Box::new(saved)) });
        }
        h = out;
    }
    let (losses, d_h) = head::run(context, &h, backward.as_ref().map(|(seeds, _)| *seeds))?;
    let mut units = head::unit_losses(context.batch, &losses);
    let (Some((_, gradients)), Some(mut d_h)) = (backward, d_h) else { return Ok(units) };
    drop(h);
    // Asked for when everything is queued: waiting after each would keep the device from copying the next weights.
    let mut norms = Vec::new();
    let unmeasured = Recorder::default();
    let silent = context.recording(&unmeasured);
    while let Some(last) = kept.pop() {
        interrupt::check()?;
        let layer = kept.len();
        let saved = match last {
            Kept::Saved(saved) => *saved,
            Kept::Input(h) => silent.unmeasured(|| block::forward(&silent, layer, &h))?.1,
        };
        let mut sink = block::Sink { gradients: &mut *gradients, norms: &mut norms };
        // Nothing below the first block learns.
        match block::backward(context, layer, d_h, saved, &mut sink, layer > 0)? {
            Some(below) => d_h = below,
            None => break,
        }
    }
    for pending in norms {
        for (unit, (norm, nonfinite)) in units.iter_mut().zip(context.device.finish_norms(pending)?) {
            unit.grad_norm += f64::from(norm) * f64::from(norm);
            unit.nonfinite += nonfinite;
        }
    }
    for unit in &mut units {
        unit.grad_norm = unit.grad_norm.sqrt();
    }
    Ok(units)
}
