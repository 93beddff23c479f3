//! `spikeprobe eval`: the eval_loss the log should have had, per checkpoint.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args as ClapArgs;
use serde_json::json;

use super::Common;
use crate::Result;
use crate::batches::Corpus;
use crate::inspect::evaluate::{Evaluation, evaluate};
use crate::model::{BaseModel, Engine};
use crate::run::Run;

/// As typed.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
}

/// Evaluates and prints.
///
/// # Errors
/// When the run cannot be read, or has no evaluation rows or checkpoints.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let run = Run::open(&args.run, &common.root, &[], &common.versions)?;
    let base = Arc::new(BaseModel::open(&run.path(&run.config.model_name_or_path))?);
    let corpus = Corpus::load(&run, &run.config)?;
    let engine = Engine::new(common.open_device()?, base, run.precision()?.plan)?;
    let all = evaluate(&run, &corpus, &engine)?;
    common.print(&table(&all))?;
    common.write_json(&json!({"schema": "spikeprobe.eval/1", "evaluations": all}))
}

fn table(all: &[Evaluation]) -> String {
    let mut out = format!("{:>8}  {:<28} {:>12} {:>12}  rows\n", "step", "metric", "computed", "logged");
    for e in all {
        let logged = e.logged.map_or("-".to_owned(), |l| format!("{l:.6}"));
        let _ = writeln!(out, "{:>8}  {:<28} {:>12.6} {logged:>12}  {}", e.step, e.metric, e.loss, e.rows);
    }
    out
}
