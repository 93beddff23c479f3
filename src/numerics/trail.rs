//! Marks of every operation of a step: enough to see where two runs of the same step part.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::Result;
use crate::device::hooked::{Call, Hook};
use crate::device::{Device, Tensor};

/// One operation's results, digested row by row.
#[derive(Debug, Clone)]
pub struct Mark {
    pub operation: &'static str,
    /// Memory of its operands, to find the weight among them.
    operands: Vec<usize>,
    /// Per result: digests of its rows.
    results: Vec<Vec<u64>>,
}

/// A place in a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Location {
    /// Operations since the beginning of the step, counting from 0.
    pub call: usize,
    pub operation: &'static str,
    /// The weight it uses, or the last one used before it.
    pub near: Option<String>,
    /// Which of its results, and which row of that.
    pub result: usize,
    pub row: usize,
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ", self.operation)?;
        if let Some(near) = &self.near {
            write!(f, "at {near} ")?;
        }
        write!(f, "(operation {} of the step), row {}", self.call, self.row)
    }
}

/// The hook that marks.
#[derive(Default)]
pub struct Trail(Mutex<Vec<Mark>>);

impl Trail {
    pub fn marks(&self) -> Vec<Mark> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Hook for Trail {
    fn after(&self, device: &dyn Device, call: &Call<'_>, result: Vec<Tensor>) -> Result<Vec<Tensor>> {
        let mut results = Vec::with_capacity(result.len());
        for x in &result {
            results.push(device.download(x)?.chunks(x.columns().max(1)).map(digest).collect());
        }
        let operands = call.operands.iter().map(|x| x.storage.identity()).collect();
        let mark = Mark { operation: call.operation, operands, results };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(mark);
        Ok(result)
    }
}

/// FNV-1a over the elements' bits (Fowler, Noll, Vo): not against malice, against chance.
fn digest(row: &[f32]) -> u64 {
    row.iter().fold(0xcbf2_9ce4_8422_2325, |hash, x| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x0100_0000_01b3))
}

/// The first place at which two runs of one step differ.
pub fn parting(ours: &[Mark], theirs: &[Mark], names: &HashMap<usize, String>) -> Option<Location> {
    let call = (0..ours.len().max(theirs.len())).find(|&i| match (ours.get(i), theirs.get(i)) {
        (Some(a), Some(b)) => a.results != b.results,
        _ => true,
    })?;
    let (Some(a), Some(b)) = (ours.get(call), theirs.get(call)) else {
        return Some(Location { call, operation: "end", near: None, result: 0, row: 0 });
    };
    let result = a.results.iter().zip(&b.results).position(|(x, y)| x != y).unwrap_or(0);
    let rows = |mark: &Mark| mark.results.get(result).cloned().unwrap_or_default();
    let row = rows(a).iter().zip(&rows(b)).position(|(x, y)| x != y).unwrap_or(0);
    Some(Location { call, operation: a.operation, near: near(ours, call, names), result, row })
}

/// The weight that an operation uses, or the last one used before it.
pub fn near(marks: &[Mark], call: usize, names: &HashMap<usize, String>) -> Option<String> {
    let used = |mark: &Mark| mark.operands.iter().find_map(|id| names.get(id).cloned());
    marks.get(..=call)?.iter().rev().find_map(used)
}
