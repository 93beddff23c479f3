//! `spikeprobe diagnose`: why the loss spiked, with proof.
//!
//! Owns what is typed for it and which files it writes; what is decided is `diagnosis/`'s, what is shown `report/`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::{Value, json};

use super::Common;
use crate::batches::Dataset;
use crate::diagnosis::archive::Archive;
use crate::diagnosis::diagnose::{Answer, Options, diagnose};
use crate::diagnosis::laboratory::{ReplayLaboratory, Subject};
use crate::diagnosis::remembering::Remembering;
use crate::diagnosis::{Fix, RowBlame, Spike, patch};
use crate::probe::Measurement;
use crate::replay::Replayer;
use crate::report::page::{Pass, Piece, RowText, SiteRange, View};
use crate::report::terminal::Style;
use crate::run::patch::patched;
use crate::{Error, Result, output};

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    #[command(flatten)]
    pub wanted: Wanted,
}

/// What is wanted of a diagnosis; shared with `demo`.
#[derive(Debug, ClapArgs)]
pub struct Wanted {
    /// Explain the spike at this step instead of the largest.
    #[arg(long, value_name = "STEP")]
    pub spike: Option<u64>,
    /// Write the report as one HTML file.
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write the configuration that was replayed without the spike (and, for bad rows, the dataset without them).
    #[arg(long, value_name = "FILE.yaml")]
    pub fix: Option<PathBuf>,
    /// Optimizer steps that experiments may replay beyond the baseline.
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub windows: u64,
    /// Let experiments go on beyond --windows for so many seconds; the result then depends on the machine's speed.
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    pub seconds: Option<f64>,
}

/// A span that a clock can be set to: a year at most.
fn parse_seconds(typed: &str) -> std::result::Result<f64, String> {
    const MOST: f64 = 366.0 * 86_400.0;
    let span = typed.parse().ok().filter(|s| (0.0..=MOST).contains(s));
    span.ok_or_else(|| format!("expected a number of seconds from 0 to {MOST}"))
}

/// Diagnoses and prints.
///
/// # Errors
/// When the run cannot be read or a file cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[&args.wanted.html, &args.wanted.fix])?;
    let replayer = common.open_replayer(&args.run, &[])?;
    show(&replayer, &args.run.display().to_string(), &args.wanted, common)
}

/// Diagnoses `replayer`'s run and writes what is wanted. `name`: the run as the user knows it.
///
/// # Errors
/// Ctrl-C, and files that cannot be written.
pub fn show(replayer: &Replayer, name: &str, wanted: &Wanted, common: &Common) -> Result<()> {
    let subject = Subject::new(replayer.run(), *replayer.scene().engine.plan(), Some(replayer.corpus()));
    let options = Options {
        spike: wanted.spike,
        windows: wanted.windows,
        seconds: wanted.seconds,
        vocab_size: Some(replayer.scene().engine.config().vocab),
    };
    let mut real = ReplayLaboratory { replayer };
    let answer = match common.cache_folder() {
        None => diagnose(&subject, &mut real, &options)?,
        Some(folder) => {
            let archive = Archive::new(&folder.join("experiments"));
            let mut lab = Remembering::new(&mut real, &archive, replayer.identity()?);
            let answer = diagnose(&subject, &mut lab, &options);
            archive.notices().iter().for_each(|notice| common.remark(notice));
            answer?
        }
    };
    let ranges: Vec<SiteRange> = answer.measured.iter().map(site_range).collect();
    let rows: Vec<RowText> = answer.diagnosis.rows.iter().filter_map(|row| row_text(replayer, row)).collect();
    let view = View {
        name: name.to_string(),
        facts: facts(replayer),
        diagnosis: &answer.diagnosis,
        log: &subject.rows,
        baseline: &answer.baseline,
        ranges: &ranges,
        rows: &rows,
    };
    if let (Some(asked), Some(told)) = (wanted.spike, explained(&answer))
        && !(told.step..=told.until).contains(&asked)
    {
        common.remark(&format!("no spike at step {asked}: explained is the nearest, at step {}", told.step));
    }
    let value =
        serde_json::to_value(&answer.diagnosis).map_err(|e| Error::internal(format!("diagnosis as JSON: {e}")))?;
    let page = wanted.html.as_ref().map_or(Ok(()), |path| {
        output::write_text(path, &view.html())?;
        common.remark(&format!("report: {}", path.display()));
        Ok(())
    });
    let fix = wanted.fix.as_ref().map_or(Ok(()), |path| write_fix(replayer, &answer, path, common));
    // A full disk under one of them is no reason to lose the others.
    [common.print(&view.terminal(Style::stdout())), page, fix, common.write_json(&value)].into_iter().collect()
}

/// The spike that carries the top verdict.
fn explained(answer: &Answer) -> Option<&Spike> {
    let diagnosis = &answer.diagnosis;
    diagnosis.spikes.iter().find(|spike| spike.verdict == diagnosis.verdict)
}

fn facts(replayer: &Replayer) -> Vec<(String, String)> {
    let run = replayer.run();
    let config = &run.config;
    let mut facts = vec![
        ("model".to_string(), config.model_name_or_path.display().to_string()),
        ("learning_rate".to_string(), format!("{:e}", config.learning_rate)),
        ("gradient_accumulation_steps".to_string(), config.gradient_accumulation_steps.to_string()),
    ];
    if let Some((version, _)) = &run.versions.transformers {
        facts.push(("transformers".into(), format!("{}.{}.{}", version.0, version.1, version.2)));
    }
    if let Ok(evidence) = run.precision() {
        facts.push(("precision".into(), evidence.reasons.join("; ")));
    }
    facts
}

/// `layers.3.mlp.down_proj output` → layer 3, kind `mlp.down_proj output`.
fn site_range(measurement: &Measurement) -> SiteRange {
    let name = measurement.site.to_string();
    let kind = match measurement.site.layer {
        Some(layer) => name.replacen(&format!("layers.{layer}."), "", 1),
        None => name,
    };
    SiteRange {
        layer: measurement.site.layer,
        kind,
        pass: if measurement.site.is_backward() { Pass::Backward } else { Pass::Forward },
        max_abs: f64::from(measurement.statistics.max_abs),
        limit: crate::probe::largest(measurement.range),
        overflow: measurement.out_of_range(),
        inherited: 0,
        underflow_share: measurement.subnormal_share(),
    }
}

fn dataset<'a>(replayer: &'a Replayer, row: &RowBlame) -> Option<&'a Dataset> {
    replayer.corpus().datasets.iter().find(|d| d.name == row.dataset)
}

/// The text fields of a row of a single-file JSON dataset; `None` for other datasets.
fn row_text(replayer: &Replayer, blame: &RowBlame) -> Option<RowText> {
    let [file] = dataset(replayer, blame)?.files.as_slice() else { return None };
    let text = std::fs::read_to_string(file).ok()?;
    let row: Value = if text.trim_start().starts_with('[') {
        serde_json::from_str::<Vec<Value>>(&text).ok()?.into_iter().nth(blame.row as usize)?
    } else {
        serde_json::from_str(text.lines().filter(|l| !l.trim().is_empty()).nth(blame.row as usize)?).ok()?
    };
    let piece = |(field, value): (&String, &Value)| Piece {
        field: field.clone(),
        text: value.as_str().map_or_else(|| value.to_string(), str::to_string),
        blamed: false,
    };
    let pieces = row.as_object()?.iter().filter(|(_, v)| v.as_str() != Some("")).map(piece).collect();
    Some(RowText { dataset: blame.dataset.clone(), row: blame.row, pieces })
}

fn write_fix(replayer: &Replayer, answer: &Answer, path: &Path, common: &Common) -> Result<()> {
    let Some(fix) = &answer.diagnosis.fix else {
        common.remark("no fix written: no setting of this run was proved to remove the spike");
        return Ok(());
    };
    let config = &replayer.run().config_path;
    let text = std::fs::read_to_string(config)
        .map_err(|e| Error::input(format!("cannot be read again: {e}")).at_path(config))?;
    let changes = match fix.changes.contains_key("remove_rows") {
        true => {
            BTreeMap::from([("dataset_dir".to_string(), json!(write_rows(replayer, &answer.diagnosis.rows, path)?))])
        }
        false => settings(fix),
    };
    output::write_text(path, &patched(&text, &changes))?;
    common.remark(&format!("fixed configuration: {}", path.display()));
    Ok(())
}

/// The changes that are keys of the configuration.
fn settings(fix: &Fix) -> BTreeMap<String, Value> {
    let key = |key: &str| !matches!(key, "remove_rows" | "optimizer_state" | "trainer" | "window");
    fix.changes.iter().filter(|(k, _)| key(k)).map(|(k, v)| (k.clone(), v.clone())).collect()
}

/// A dataset folder beside `path` with dataset_info.json and every file, the blamed rows left out. Returns its path.
fn write_rows(replayer: &Replayer, rows: &[RowBlame], path: &Path) -> Result<PathBuf> {
    let run = replayer.run();
    let source = run.path(&run.config.dataset_dir);
    let folder = path.with_extension("data");
    std::fs::create_dir_all(&folder).map_err(|e| Error::output(format!("cannot be made: {e}")).at_path(&folder))?;
    let copy = |from: &Path, rows: &[u32]| -> Result<()> {
        let text =
            std::fs::read_to_string(from).map_err(|e| Error::input(format!("cannot be read: {e}")).at_path(from))?;
        let text =
            if rows.is_empty() { text } else { patch::without_rows(&text, rows).map_err(|e| e.at_path(from))? };
        let Some(name) = from.file_name() else { return Ok(()) };
        output::write_text(&folder.join(name), &text)
    };
    copy(&source.join("dataset_info.json"), &[])?;
    for dataset in &replayer.corpus().datasets {
        let bad: Vec<u32> = rows.iter().filter(|r| r.dataset == dataset.name).map(|r| r.row).collect();
        for (index, file) in dataset.files.iter().enumerate() {
            if !bad.is_empty() && dataset.files.len() > 1 {
                return Err(Error::refused("rows of a dataset in several files are not removed automatically")
                    .at_path(file)
                    .next("remove the rows that the report names by hand"));
            }
            copy(file, if index == 0 { &bad } else { &[] })?;
        }
    }
    Ok(folder)
}
