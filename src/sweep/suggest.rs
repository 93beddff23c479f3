//! Where a grid is stable, where the frontier runs, and which cell to take.
//!
//! Pure functions of results.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::folder::{CellResult, Manifest};
use super::grid::Axis;

/// Along one axis, everything else held: the numeric values that are stable from the lowest up.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frontier {
    pub axis: String,
    /// The other axes.
    pub held: BTreeMap<String, Value>,
    /// Highest value up to which every cell is stable; `None`: not even the lowest is.
    pub stable_to: Option<f64>,
    /// The next value, which is not; `None`: the grid ends in stable cells.
    pub unstable_from: Option<f64>,
}

/// The cell to take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suggestion {
    /// Index into the manifest's cells.
    pub cell: usize,
    pub axes: BTreeMap<String, Value>,
    #[serde(with = "crate::diagnosis::number")]
    pub final_loss: f64,
    /// What keeps it from the edge.
    pub reason: String,
    /// The replay with another seed.
    pub check: Option<Check>,
}

/// A replay at the suggested point with another seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    pub seed: u64,
    pub stable: bool,
    #[serde(with = "crate::diagnosis::number")]
    pub final_loss: f64,
    #[serde(with = "crate::diagnosis::number")]
    pub peak_loss: f64,
}

/// Cells that differ in one axis only: what they share, and (value on the axis, stable or not yet known).
type GridLine = (BTreeMap<String, Value>, Vec<(f64, Option<bool>)>);

/// One line of the grid a frontier: along learning_rate where it varies, else along the first numeric axis.
pub fn frontiers(manifest: &Manifest, results: &[Option<CellResult>]) -> Vec<Frontier> {
    let Some(axis) = ladder(&manifest.axes) else { return vec![] };
    let mut lines: Vec<GridLine> = Vec::new();
    for (cell, result) in manifest.cells.iter().zip(results) {
        let mut held = cell.axes.clone();
        let Some(value) = held.remove(&axis.key).and_then(|v| v.as_f64()) else { continue };
        let entry = (value, result.as_ref().map(|r| r.outcome.stable));
        match lines.iter_mut().find(|(h, _)| *h == held) {
            Some((_, line)) => line.push(entry),
            None => lines.push((held, vec![entry])),
        }
    }
    let frontier = |(held, mut line): GridLine| {
        line.sort_by(|a, b| a.0.total_cmp(&b.0));
        let stable = line.iter().take_while(|(_, stable)| *stable == Some(true)).count();
        Frontier {
            axis: axis.key.clone(),
            held,
            stable_to: stable.checked_sub(1).map(|i| line[i].0),
            unstable_from: line.get(stable).filter(|(_, stable)| *stable == Some(false)).map(|(v, _)| *v),
        }
    };
    lines.into_iter().map(frontier).collect()
}

/// A neighbour above that trains to more than this multiple of a cell's final loss is no reserve, stable or not.
const RESERVE: f64 = 2.0;

/// The stable cell with the lowest final loss that is not the last one before the frontier, nor before a neighbour that
/// hardly trains; where every stable cell is, the lowest of them.
pub fn suggest(manifest: &Manifest, results: &[Option<CellResult>]) -> Option<Suggestion> {
    let frontiers = frontiers(manifest, results);
    let axis = ladder(&manifest.axes).map(|a| a.key.clone());
    let margin = |result: &CellResult| {
        let Some(axis) = &axis else { return true };
        let value = result.cell.axes.get(axis).and_then(Value::as_f64).unwrap_or(f64::NAN);
        let mut held = result.cell.axes.clone();
        held.remove(axis);
        let line = frontiers.iter().find(|f| f.held == held);
        let above = results.iter().flatten().filter_map(|r| {
            let mut theirs = r.cell.axes.clone();
            let other = theirs.remove(axis).and_then(|v| v.as_f64()).filter(|v| *v > value && theirs == held)?;
            Some((other, r.outcome.final_loss))
        });
        let next = above.min_by(|a, b| a.0.total_cmp(&b.0));
        let trains = next.is_none_or(|(_, loss)| loss <= RESERVE * result.outcome.final_loss);
        line.is_some_and(|f| match (f.stable_to, f.unstable_from) {
            (Some(to), Some(_)) => value < to && trains,
            (Some(to), None) => value <= to && trains,
            (None, _) => false,
        })
    };
    let stable = |inside: bool| {
        let cells = results.iter().enumerate().filter_map(|(i, r)| r.as_ref().map(|r| (i, r)));
        let cells =
            cells.filter(|(_, r)| r.outcome.stable && r.outcome.final_loss.is_finite() && (!inside || margin(r)));
        cells.min_by(|a, b| a.1.outcome.final_loss.total_cmp(&b.1.outcome.final_loss))
    };
    let (found, reason) = match stable(true) {
        Some(found) => (found, "lowest final loss among stable cells with a stable neighbour above"),
        None => (stable(false)?, "lowest final loss among stable cells; it lies at the frontier"),
    };
    Some(Suggestion {
        cell: found.0,
        axes: found.1.cell.axes.clone(),
        final_loss: found.1.outcome.final_loss,
        reason: reason.into(),
        check: None,
    })
}

/// The axis instability grows along.
fn ladder(axes: &[Axis]) -> Option<&Axis> {
    let numeric = |a: &&Axis| a.values.len() > 1 && a.values.iter().all(Value::is_number) && !a.key.contains("seed");
    axes.iter().filter(numeric).find(|a| a.key == "learning_rate").or_else(|| axes.iter().find(numeric))
}
