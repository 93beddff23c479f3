//! Final norm, lm_head and cross-entropy, on labelled tokens only and a tile of them at a time (on all of a
//! micro-batch at once where the trainer's own products are asked for).

use std::ops::Range;

use super::context::Context;
use super::ragged::cascade_sum;
use super::{Memory, Ragged, UnitOutput, promote};
use crate::Result;
use crate::device::Tensor;
use crate::probe::{Part, Role, Site};

/// Elements of logits held at once: 32 MiB in f32, whatever the vocabulary. The weight of lm_head is read once per
/// tile, so a tile should have some hundred rows of a usual vocabulary.
const TILE: usize = 8 << 20;

/// The positions whose logits are computed.
struct Places {
    index: Vec<u32>,
    targets: Vec<u32>,
    /// Each one's unit's seed, 0 without a label or a backward pass.
    seeds: Vec<f32>,
    /// Offsets of units in `index`.
    units: Vec<usize>,
}

impl Places {
    /// Those with a label: all that the losses and their gradients depend on.
    fn labelled(batch: &Ragged, seeds: Option<&[f32]>) -> Self {
        let counts = batch.unit_labels.windows(2).map(|w| w[1] - w[0]);
        let seed = |unit: usize| seeds.map_or(0.0, |s| s[unit]);
        let seeds = counts.enumerate().flat_map(|(unit, count)| std::iter::repeat_n(seed(unit), count)).collect();
        let (index, targets) = (batch.labelled.clone(), batch.targets.clone());
        Self { index, targets, seeds, units: batch.unit_labels.clone() }
    }

    /// Every position, as the trainer computes them.
    fn every(batch: &Ragged, seeds: Option<&[f32]>) -> Self {
        let labelled = Self::labelled(batch, seeds);
        let n = batch.tokens();
        let (mut targets, mut seeds) = (vec![0; n], vec![0.0; n]);
        for (i, &token) in labelled.index.iter().enumerate() {
            targets[token as usize] = labelled.targets[i];
            seeds[token as usize] = labelled.seeds[i];
        }
        Self { index: (0..n as u32).collect(), targets, seeds, units: batch.unit_tokens() }
    }

    /// Offsets of units in a tile of places; a unit without places in it has an empty range.
    fn units_of(&self, tile: &Range<usize>) -> Vec<usize> {
        self.units.iter().map(|&place| place.clamp(tile.start, tile.end) - tile.start).collect()
    }
}

/// h [n, hidden] → (loss per labelled token, gradient of h if there are seeds). Rows without a label contribute no
/// loss, and their gradient is zero.
pub(super) fn run(cx: &Context<'_>, h: &Tensor, seeds: Option<&[f32]>) -> Result<(Vec<f32>, Option<Tensor>)> {
    let as_trainer = cx.options.memory == Memory::MicroBatches;
    let places = if as_trainer { Places::every(cx.batch, seeds) } else { Places::labelled(cx.batch, seeds) };
    let count = places.index.len();
    let tile = if as_trainer { count.max(1) } else { (TILE / cx.config.vocab.max(1)).clamp(16, 4096) };
    let mut losses = Vec::with_capacity(count);
    let mut d_h = match seeds {
        Some(_) => Some(cx.device.zeros(&h.shape, h.dtype)?),
        None => None,
    };
    for start in (0..count).step_by(tile) {
        let range = start..(start + tile).min(count);
        let index = &places.index[range.clone()];
        let x = cx.device.gather_rows(h, index)?;
        let units = places.units_of(&range);
        let _expecting = cx.recorder.expect(cx.device, &units, Some(&cx.unit_tokens));
        let (tile_losses, d_x) = run_tile(cx, &x, &places, range, &units)?;
        losses.extend(tile_losses);
        if let Some(d_h) = &mut d_h {
            cx.device.accumulate(d_h, &cx.device.scatter_rows(&d_x()?, index, h.rows())?)?;
        }
    }
    if as_trainer {
        losses = cx.batch.labelled.iter().map(|&token| losses[token as usize]).collect();
    }
    Ok((losses, d_h))
}

/// x: residual stream of the tile's tokens [m, hidden], of the units that `units` delimit. Returns their losses, and how
/// to get the gradient of x.
fn run_tile<'t>(
    cx: &'t Context<'_>,
    x: &'t Tensor,
    places: &'t Places,
    range: Range<usize>,
    units: &'t [usize],
) -> Result<(Vec<f32>, impl FnOnce() -> Result<Tensor> + 't)> {
    let (device, plan) = (cx.device, cx.plan);
    let (weight, head) = (&cx.held.final_norm, &cx.held.head);
    let (normed, r) = device.rms_norm(x, weight, cx.config.rms_eps, promote(x.dtype, plan.norm_weight()))?;
    let measure =
        move |part, role, x: &Tensor| cx.recorder.measure(device, Site::outside(part, role), x, units, cx.first_unit);
    measure(Part::FinalNorm, Role::Output, &normed)?;
    let normed = cx.cast(&normed, plan.linear())?;
    let logits = device.linear(&normed, head, None, plan.compute(), plan.linear())?;
    measure(Part::Logits, Role::Output, &logits)?;
    let (targets, seeds) = (&places.targets[range.clone()], &places.seeds[range]);
    let (losses, d_logits) = device.cross_entropy_owned(logits, targets, seeds)?;
    let grad = move || {
        measure(Part::Logits, Role::OutputGrad, &d_logits)?;
        let d = device.linear_input_grad(&d_logits, head, plan.compute(), plan.linear())?;
        let d = cx.cast(&d, promote(x.dtype, plan.norm_weight()))?;
        measure(Part::FinalNorm, Role::OutputGrad, &d)?;
        device.rms_norm_grad(&d, x, weight, &r, None)
    };
    Ok((losses, grad))
}

/// Losses per labelled token → per unit, without gradients yet.
pub(super) fn unit_losses(batch: &Ragged, losses: &[f32]) -> Vec<UnitOutput> {
    (0..batch.units())
        .map(|unit| {
            let labels = batch.unit_labels[unit]..batch.unit_labels[unit + 1];
            let places = batch.labelled[labels.clone()].iter().map(|&token| batch.places[token as usize]);
            let placed = losses[labels.clone()].iter().copied().zip(places);
            UnitOutput {
                loss_sum: cascade_sum(placed, batch.unit_padded[unit]),
                label_tokens: labels.len(),
                tokens: batch.filled_tokens(unit),
                ..UnitOutput::default()
            }
        })
        .collect()
}
