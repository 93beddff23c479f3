//! CSV and JSON.

use serde_json::{Value, json};

use super::Sweep;
use crate::report::json::number;
use crate::report::page::value_text;
use crate::sweep::SWEEP_SCHEMA;
use crate::{Error, Result};

impl Sweep<'_> {
    /// One line a cell; a missing cell has empty measures.
    ///
    /// # Errors
    /// Only a failure of this program.
    pub fn csv(&self) -> Result<String> {
        let mut writer = csv::Writer::from_writer(Vec::new());
        let broken = |e: csv::Error| Error::internal(format!("CSV: {e}"));
        let keys: Vec<&str> = self.manifest.axes.iter().map(|a| a.key.as_str()).collect();
        let measures = [
            "stable",
            "final_loss",
            "peak_loss",
            "spikes",
            "nonfinite_steps",
            "skipped_steps",
            "clip_share",
            "max_update_rms",
            "steps",
            "samples",
            "samples_per_step",
            "tokens_per_second",
            "stopped",
            "machine",
        ];
        writer.write_record(keys.iter().chain(&measures)).map_err(broken)?;
        for (cell, result) in self.manifest.cells.iter().zip(self.results) {
            let mut record: Vec<String> =
                keys.iter().map(|k| cell.axes.get(*k).map_or(String::new(), value_text)).collect();
            match result {
                None => record.extend(measures.iter().map(|_| String::new())),
                Some(r) => {
                    let o = &r.outcome;
                    record.extend([
                        o.stable.to_string(),
                        o.final_loss.to_string(),
                        o.peak_loss.to_string(),
                        o.spikes.len().to_string(),
                        o.nonfinite_steps.to_string(),
                        o.skipped_steps.to_string(),
                        o.clip_share.to_string(),
                        o.max_update_rms.to_string(),
                        o.steps.to_string(),
                        o.samples.to_string(),
                        cell.samples_per_step.to_string(),
                        format!("{:.1}", o.tokens as f64 / r.seconds),
                        o.stopped.clone().unwrap_or_default(),
                        r.machine.clone(),
                    ]);
                }
            }
            writer.write_record(&record).map_err(broken)?;
        }
        let bytes = writer.into_inner().map_err(|e| Error::internal(format!("CSV: {e}")))?;
        String::from_utf8(bytes).map_err(|e| Error::internal(format!("CSV: {e}")))
    }

    /// Everything, for programs.
    ///
    /// # Errors
    /// Only a failure of this program.
    pub fn json(&self) -> Result<Value> {
        let value = |v: serde_json::Result<Value>| v.map_err(|e| Error::internal(format!("JSON: {e}")));
        let mut cells = Vec::new();
        for (cell, result) in self.manifest.cells.iter().zip(self.results) {
            cells.push(json!({
                "axes": cell.axes, "derived": cell.derived, "from": cell.from, "steps": cell.steps,
                "samples_per_step": cell.samples_per_step,
                "outcome": value(serde_json::to_value(result.as_ref().map(|r| &r.outcome)))?,
                "seconds": result.as_ref().map(|r| number(r.seconds)),
                "machine": result.as_ref().map(|r| &r.machine),
            }));
        }
        Ok(json!({
            "schema": SWEEP_SCHEMA,
            "run": self.manifest.run,
            "axes": value(serde_json::to_value(&self.manifest.axes))?,
            "keep": self.manifest.keep,
            "missing": self.missing(),
            "frontiers": value(serde_json::to_value(&self.frontiers))?,
            "suggestion": value(serde_json::to_value(&self.suggestion))?,
            "cells": cells,
        }))
    }
}
