//! `spikeprobe inspect`: what the files of a run show before anything is replayed.

use std::path::{Path, PathBuf};

use clap::Args as ClapArgs;
use serde_json::json;

use super::Common;
use crate::Result;
use crate::batches::Corpus;
use crate::inspect::{self, Finding, compare, text};
use crate::run::Run;

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), a folder with exactly one, or a trainer's output folder.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Another run to compare with.
    #[arg(long, value_name = "RUN2")]
    pub baseline: Option<PathBuf>,
    /// Replay the first windows, hold every historic loss normalisation against the log, and leaked windows too.
    #[arg(long)]
    pub confirm: bool,
}

/// Inspects and prints.
///
/// # Errors
/// When a run cannot be read. Data rows that cannot be read are a remark: the log is inspected all the same.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[])?;
    let open = |path: &Path| Run::open_for_inspection(path, &common.root, &common.versions);
    let run = open(&args.run)?;
    // A long log and many rows are both work: side by side.
    let (mut findings, corpus) = rayon::join(|| inspect::inspect(&run), || Corpus::load(&run, &run.config));
    let corpus = match corpus {
        Ok(corpus) => Some(corpus),
        Err(e) => {
            common.remark(&format!("the data rows were not inspected: {e}"));
            None
        }
    };
    if let Some(corpus) = &corpus {
        findings.extend(inspect::data::findings(&run, &corpus.datasets, &corpus.train, &corpus.dropped));
    }
    if args.confirm {
        findings.extend(inspect::confirm::findings(&common.open_replayer(&args.run, &[])?)?);
    }
    inspect::sort(&mut findings);
    let comparison = match &args.baseline {
        Some(path) => {
            let baseline = open(path)?;
            let mut comparison = compare::compare(&run, &baseline);
            // Rows that cannot be read on one side are told above; the files' hashes are compared all the same.
            let other = Corpus::load(&baseline, &baseline.config).ok();
            let rows = corpus.as_ref().zip(other.as_ref()).and_then(|(a, b)| compare::rows(a, b));
            comparison.differences.extend(rows);
            comparison.differences.sort_by_key(|d| d.rank);
            Some(comparison)
        }
        None => None,
    };
    common.print(&text::report(&run, &findings, comparison.as_ref(), common.verbose))?;
    let written = common.write_json(&to_json(&run, &findings, comparison.as_ref()));
    // The process ends here, and the system takes the memory of many rows back at once; dropping them costs a tenth of
    // the whole command.
    std::mem::forget((run, corpus));
    written
}

fn to_json(run: &Run, findings: &[Finding], comparison: Option<&compare::Comparison>) -> serde_json::Value {
    let versions: serde_json::Map<_, _> = run
        .versions
        .list()
        .into_iter()
        .map(|(name, version, origin)| (name.to_owned(), json!({"version": version.to_string(), "origin": origin})))
        .collect();
    let config: serde_json::Map<_, _> =
        compare::resolved(&run.config).into_iter().map(|(key, value)| (key.to_owned(), json!(value))).collect();
    let attempts: Vec<_> = run
        .attempts
        .iter()
        .map(|a| json!({"first_step": a.first_step, "last_step": a.last_step, "resumed_from": a.resumed_from, "total_steps": a.total_steps}))
        .collect();
    json!({
        "schema": "spikeprobe.inspect/1",
        "run": run.config_path.display().to_string(),
        "versions": versions,
        "evidence": run.evidence(),
        "attempts": attempts,
        "config": config,
        "findings": findings,
        "comparison": comparison,
    })
}
