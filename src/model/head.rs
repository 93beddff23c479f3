//! Final norm, lm_head and cross-entropy, on labelled tokens only and a tile of them at a time.

use super::context::Context;
use super::ragged::cascade_sum;
use super::{Ragged, UnitOutput, promote};
use crate::Result;
use crate::device::Tensor;
use crate::probe::{Part, Role, Site};

/// Elements of logits held at once: 32 MiB in f32, whatever the vocabulary. The weight of lm_head is read once per
/// tile, so a tile should have some hundred rows of a usual vocabulary.
const TILE: usize = 8 << 20;

/// h [n, hidden] → (loss per labelled token, gradient of h if there are seeds). Rows without a label contribute no
/// loss, and their gradient is zero.
pub(super) fn run(cx: &Context<'_>, h: &Tensor, seeds: Option<&[f32]>) -> Result<(Vec<f32>, Option<Tensor>)> {
    let batch = cx.batch;
    let tile = (TILE / cx.config.vocab.max(1)).clamp(16, 4096);
    let row_seeds = row_seeds(batch, seeds);
    let mut losses = Vec::with_capacity(batch.labelled.len());
    let mut d_h = match seeds {
        Some(_) => Some(cx.device.zeros(&h.shape, h.dtype)?),
        None => None,
    };
    for start in (0..batch.labelled.len()).step_by(tile) {
        let end = (start + tile).min(batch.labelled.len());
        let index = &batch.labelled[start..end];
        let x = cx.device.gather_rows(h, index)?;
        let (tile_losses, d_x) = run_tile(cx, &x, &batch.targets[start..end], &row_seeds[start..end], start)?;
        losses.extend(tile_losses);
        if let Some(d_h) = &mut d_h {
            cx.device.accumulate(d_h, &cx.device.scatter_rows(&d_x()?, index, h.rows())?)?;
        }
    }
    Ok((losses, d_h))
}

/// The seed of each labelled token: its unit's. Zeros without a backward pass.
fn row_seeds(batch: &Ragged, seeds: Option<&[f32]>) -> Vec<f32> {
    let counts = batch.unit_labels.windows(2).map(|w| w[1] - w[0]);
    let seed = |unit: usize| seeds.map_or(0.0, |s| s[unit]);
    counts.enumerate().flat_map(|(unit, count)| std::iter::repeat_n(seed(unit), count)).collect()
}

/// x: residual stream of the tile's tokens [m, hidden]. Returns their losses, and how to get the gradient of x.
fn run_tile<'t>(
    cx: &'t Context<'_>,
    x: &'t Tensor,
    targets: &[u32],
    seeds: &[f32],
    first_label: usize,
) -> Result<(Vec<f32>, impl FnOnce() -> Result<Tensor> + 't)> {
    let (device, plan) = (cx.device, cx.plan);
    let (weight, head) = (&cx.held.final_norm, &cx.held.head);
    let (normed, r) = device.rms_norm(x, weight, cx.config.rms_eps, promote(x.dtype, plan.norm_weight()))?;
    let measure = move |part, role, x: &Tensor| measure_labelled(cx, Site::outside(part, role), x, first_label);
    measure(Part::FinalNorm, Role::Output, &normed)?;
    let normed = cx.cast(&normed, plan.linear())?;
    let logits = device.linear(&normed, head, None, plan.compute(), plan.linear())?;
    measure(Part::Logits, Role::Output, &logits)?;
    let (losses, d_logits) = device.cross_entropy_owned(logits, targets, seeds)?;
    let grad = move || {
        measure(Part::Logits, Role::OutputGrad, &d_logits)?;
        let d = device.linear_input_grad(&d_logits, head, plan.compute(), plan.linear())?;
        let d = cx.cast(&d, promote(x.dtype, plan.norm_weight()))?;
        measure(Part::FinalNorm, Role::OutputGrad, &d)?;
        device.rms_norm_grad(&d, x, weight, &r)
    };
    Ok((losses, grad))
}

/// Measures a tensor with one row per labelled token, of which the first is `first_label`.
fn measure_labelled(cx: &Context<'_>, site: Site, x: &Tensor, first_label: usize) -> Result<()> {
    if cx.recorder.is_off() {
        return Ok(());
    }
    // A unit without labels in this tile has an empty range.
    let clamp = |&label: &usize| label.saturating_sub(first_label).min(x.rows());
    let offsets: Vec<usize> = cx.batch.unit_labels.iter().map(clamp).collect();
    cx.recorder.measure(cx.device, site, x, &offsets, cx.first_unit)
}

/// Losses per labelled token → per unit, without gradients yet.
pub(super) fn unit_losses(batch: &Ragged, losses: &[f32]) -> Vec<UnitOutput> {
    let tokens = batch.unit_tokens();
    (0..batch.units())
        .map(|unit| {
            let labels = batch.unit_labels[unit]..batch.unit_labels[unit + 1];
            UnitOutput {
                loss_sum: cascade_sum(&losses[labels.clone()], &batch.padded[labels.clone()], batch.unit_padded[unit]),
                label_tokens: labels.len(),
                tokens: tokens[unit + 1] - tokens[unit],
                ..UnitOutput::default()
            }
        })
        .collect()
}
