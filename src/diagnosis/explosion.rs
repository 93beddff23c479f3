//! Spikes that only the gradient norm shows: skipped steps of a loss scaler, explosions that clipping hid.

use super::SpikeKind;
use super::detect::{Context, Found, NOISE, height};
use super::past::ENOUGH;
use crate::run::LogRow;

/// A pre-clip norm wanders by factors of a few in healthy runs; an explosion is an order of magnitude.
const MIN_EXPLOSION: f64 = 10.0;
/// GradScaler doubles its scale after so many good steps and halves it at the skip that follows (torch default).
const GROWTH_INTERVAL: u64 = 2000;

/// Skipped steps and explosions of the gradient norm outside the loss spikes.
pub(super) fn gradient_spikes(rows: &[LogRow], context: &Context, taken: &[Found]) -> Vec<Found> {
    let covered = |step: u64| taken.iter().any(|f| step + 1 >= f.step && step <= f.until + 2);
    let mut found = Vec::new();
    let mut past: Vec<f64> = Vec::new();
    let mut last_skip = 0;
    for (index, row) in rows.iter().enumerate() {
        let (Some(norm), Some(loss)) = (row.grad_norm, row.loss) else { continue };
        if !norm.is_finite() {
            // Before the first finite norm the scale calibrates; after GROWTH_INTERVAL good steps it probes upwards.
            let calibrating = context.loss_scaling && (past.is_empty() || row.step >= last_skip + GROWTH_INTERVAL);
            last_skip = row.step;
            if !calibrating && loss.is_finite() && loss != 0.0 && !covered(row.step) {
                found.push(gradient_found(rows, index, SpikeKind::SkippedStep, &past));
            }
            continue;
        }
        if norm > 0.0 && !covered(row.step) && explodes(norm, &past) {
            found.push(gradient_found(rows, index, SpikeKind::GradientExplosion, &past));
        } else if norm > 0.0 {
            past.push(norm);
        }
    }
    found
}

fn explodes(norm: f64, past: &[f64]) -> bool {
    let recent = &past[past.len().saturating_sub(NOISE)..];
    if recent.len() <= ENOUGH {
        return false;
    }
    let mut moves: Vec<f64> = recent.windows(2).map(|w| (w[1] / w[0]).ln().abs()).collect();
    moves.sort_by(f64::total_cmp);
    let threshold = MIN_EXPLOSION.ln().max(4.0 * moves[moves.len() / 2]).max(1.6 * moves[moves.len() * 9 / 10]);
    (norm / middle(recent)).ln() >= threshold
}

/// Median of the last eight.
fn middle(norms: &[f64]) -> f64 {
    let mut recent = norms[norms.len().saturating_sub(8)..].to_vec();
    recent.sort_by(f64::total_cmp);
    recent.get(recent.len() / 2).copied().unwrap_or(f64::NAN)
}

fn gradient_found(rows: &[LogRow], index: usize, kind: SpikeKind, past: &[f64]) -> Found {
    let at = rows[index].grad_norm.unwrap_or(f64::NAN);
    let before = Some(middle(past)).filter(|b| b.is_finite());
    let height = if at.is_finite() { before.map_or(1.0, |b| height(at, b)) } else { 1.0 };
    Found { index, step: rows[index].step, until: rows[index].step, kind, before, at, height }
}
