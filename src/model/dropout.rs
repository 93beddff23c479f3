//! lora_dropout: which elements of a LoRA branch's input a pass keeps (contract 10).
//!
//! On a CPU the trainer's masks follow from its generator: `F.dropout` calls `bernoulli_(1 − p)` on a tensor like the
//! input, padding included, once per adapted linear in the order in which they run, micro-batch by micro-batch.
//! Gradient checkpointing puts the generator back before it runs a block again. On a GPU they cannot be known.

use super::{Adapter, Ragged};
use crate::batches::Mt19937;
use crate::{Error, Result};

/// lora_dropout of a pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Dropout {
    /// Probability of a zero, in [0, 1).
    pub p: f64,
    pub masks: Masks,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Masks {
    /// Some masks, from this seed: one per adapted linear, whatever the cut of the window.
    Drawn { seed: u64 },
    /// Those of torch on a CPU.
    Torch(TorchMasks),
}

/// What torch draws masks with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TorchMasks {
    /// Each rank's generator, as it stands before the pass.
    pub generators: Vec<Mt19937>,
    /// Per micro-batch, the rank that runs it, and the numbers that others draw from the generator before it.
    pub units: Vec<(usize, u64)>,
}

/// Masks of a chunk by adapted linear, a bit per element of [tokens, in_features]; empty: they are drawn as they are used.
pub(super) type Kept = Vec<Vec<u32>>;

impl TorchMasks {
    /// Draws the masks of the micro-batches that `chunk` holds, of which the first is `first_unit` of the pass, and
    /// moves their generators past them.
    ///
    /// # Errors
    /// Micro-batches or ranks that are not among `units` and `generators`.
    pub(super) fn draw(&mut self, p: f64, adapter: &Adapter, chunk: &Ragged, first_unit: usize) -> Result<Kept> {
        let mut modules: Vec<(usize, usize)> = adapter.modules.iter().map(|m| m.a.columns()).enumerate().collect();
        modules.sort_by_key(|&(index, _)| (adapter.modules[index].layer, adapter.modules[index].projection as usize));
        let words = |&(_, columns): &(usize, usize)| (chunk.tokens() * columns).div_ceil(32);
        let mut kept: Kept = vec![Vec::new(); modules.len()];
        modules.iter().for_each(|module| kept[module.0] = vec![0; words(module)]);
        for (unit, tokens) in chunk.unit_tokens().windows(2).enumerate() {
            let known = self.units.get(first_unit + unit).and_then(|&(rank, before)| {
                let generator = self.generators.get_mut(rank)?;
                generator.skip(before);
                Some(generator)
            });
            let generator = known.ok_or_else(|| Error::internal("masks of a micro-batch that is not the step's"))?;
            for &(index, columns) in &modules {
                let mut place = 0;
                for token in tokens[0]..tokens[1] {
                    let here = chunk.places[token] as usize;
                    generator.skip((2 * (here - place) * columns) as u64);
                    generator.bernoulli(1.0 - p, columns, &mut kept[index], token * columns);
                    place = here + 1;
                }
                generator.skip((2 * (chunk.unit_padded[unit] - place) * columns) as u64);
            }
        }
        Ok(kept)
    }
}
