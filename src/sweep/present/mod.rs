//! A sweep as people and programs read it: terminal heat map, CSV, JSON, HTML page.

mod files;
mod html;
mod terminal;

use std::collections::BTreeMap;

use serde_json::Value;

use super::folder::{CellResult, Manifest};
use super::grid::Axis;
use super::suggest::{self, Frontier, Suggestion};
use crate::report::page::value_text;

/// Everything that is shown. Cells without a result (another shard's) are shown as missing.
#[derive(Debug, Clone)]
pub struct Sweep<'a> {
    pub manifest: &'a Manifest,
    /// In the manifest's order.
    pub results: &'a [Option<CellResult>],
    pub frontiers: Vec<Frontier>,
    pub suggestion: Option<Suggestion>,
}

impl<'a> Sweep<'a> {
    pub fn new(manifest: &'a Manifest, results: &'a [Option<CellResult>]) -> Self {
        let frontiers = suggest::frontiers(manifest, results);
        // A cell that is still missing may be the unstable neighbour.
        let complete = results.iter().all(Option::is_some);
        let suggestion = if complete { suggest::suggest(manifest, results) } else { None };
        Self { manifest, results, frontiers, suggestion }
    }

    pub fn missing(&self) -> usize {
        self.results.iter().filter(|r| r.is_none()).count()
    }

    /// The run's own settings are this cell.
    fn is_own(&self, axes: &BTreeMap<String, Value>) -> bool {
        axes.iter().all(|(key, value)| match (self.manifest.own.get(key), value.as_f64()) {
            (Some(own), Some(number)) => own.as_f64() == Some(number),
            (Some(own), None) => own == value,
            (None, _) => false,
        })
    }

    fn is_suggested(&self, index: usize) -> bool {
        self.suggestion.as_ref().is_some_and(|s| s.cell == index)
    }

    /// One heat map a combination of all axes but the first two that vary (learning rate down, the other across).
    fn panels(&self) -> Vec<Panel> {
        let axes = &self.manifest.axes;
        let down = axes.iter().find(|a| a.key == "learning_rate").or(axes.first());
        let Some(down) = down else { return vec![] };
        let others = || axes.iter().filter(|a| a.key != down.key);
        let across = others().find(|a| a.key != "precision" && a.values.len() > 1).or_else(|| others().next());
        let mut panels: Vec<Panel> = Vec::new();
        for (index, cell) in self.manifest.cells.iter().enumerate() {
            let mut rest = cell.axes.clone();
            let row = rest.remove(&down.key);
            let column = across.and_then(|a| rest.remove(&a.key));
            let at = |axis: Option<&Axis>, value: &Option<Value>| {
                axis.and_then(|a| a.values.iter().position(|v| Some(v) == value.as_ref())).unwrap_or(0)
            };
            // Highest value on top: instability rises upwards.
            let place = (down.values.len() - 1 - at(Some(down), &row), at(across, &column));
            let panel = match panels.iter_mut().find(|p| p.held == rest) {
                Some(panel) => panel,
                None => {
                    let columns = across.map_or(vec![String::new()], |a| a.values.iter().map(value_text).collect());
                    let rows: Vec<String> = down.values.iter().rev().map(value_text).collect();
                    panels.push(Panel {
                        held: rest,
                        down: down.key.clone(),
                        across: across.map_or(String::new(), |a| a.key.clone()),
                        cells: vec![vec![None; columns.len()]; rows.len()],
                        rows,
                        columns,
                    });
                    let last = panels.len() - 1;
                    &mut panels[last]
                }
            };
            panel.cells[place.0][place.1] = Some(index);
        }
        panels
    }
}

/// One heat map: indices into the manifest's cells.
struct Panel {
    held: BTreeMap<String, Value>,
    down: String,
    across: String,
    rows: Vec<String>,
    columns: Vec<String>,
    cells: Vec<Vec<Option<usize>>>,
}

/// `0.062`, `0.34 spike`, `diverged`: a cell in a word.
fn verdict(result: Option<&CellResult>) -> String {
    use crate::report::number;
    let Some(outcome) = result.map(|r| &r.outcome) else { return "…".into() };
    match (outcome.stable, &outcome.stopped) {
        (true, _) => number(outcome.final_loss),
        (false, Some(_)) => "diverged".into(),
        (false, None) if outcome.nonfinite_steps > 0 || outcome.final_loss.is_nan() => "not finite".into(),
        (false, None) if outcome.spikes.iter().any(|s| s.harmful()) => format!("{} spike", number(outcome.final_loss)),
        (false, None) => format!("{} rises", number(outcome.final_loss)),
    }
}
