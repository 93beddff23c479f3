//! The eval_loss that the log should have had: each checkpoint's adapter over the evaluation rows, in the trainer's
//! batches and weighting (contract 9).

use serde::Serialize;

use crate::batches::{Corpus, Example};
use crate::model::{Adapter, Engine, PassOptions, Ragged, Row};
use crate::run::{Checkpoint, Run};
use crate::{Error, Result, interrupt};

/// One evaluation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Checkpoint; 0 is the base model before training.
    pub step: u64,
    /// `eval_loss`, or `eval_<dataset>_loss` where several sets are evaluated apart.
    pub metric: String,
    #[serde(serialize_with = "finite")]
    pub loss: f64,
    /// The same metric in the log at this step.
    pub logged: Option<f64>,
    pub rows: usize,
}

fn finite<S: serde::Serializer>(x: &f64, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&crate::report::json::number(*x), serializer)
}

/// Evaluates every checkpoint of a run.
///
/// # Errors
/// No evaluation rows, no checkpoint, checkpoints that cannot be read.
pub fn evaluate(run: &Run, corpus: &Corpus, engine: &Engine) -> Result<Vec<Evaluation>> {
    if corpus.eval.iter().all(|(_, rows)| rows.is_empty()) {
        return Err(Error::input("the run has no evaluation rows")
            .at_path(&run.config_path)
            .next("add val_size: 0.1 or eval_dataset: … to a copy of the configuration and evaluate that"));
    }
    if run.checkpoints.is_empty() {
        return Err(Error::input("the run has no checkpoint to evaluate").at_path(&run.path(&run.config.output_dir)));
    }
    let mut all = Vec::new();
    for checkpoint in &run.checkpoints {
        let adapter = adapter(run, checkpoint, engine).map_err(|e| e.at_path(&checkpoint.dir))?;
        for (name, rows) in &corpus.eval {
            let metric = if name.is_empty() { "eval_loss".to_owned() } else { format!("eval_{name}_loss") };
            let loss = loss(rows, run.config.per_device_eval_batch_size, &adapter, engine, corpus.vocab_size)?;
            let row = run.log.eval_rows.iter().find(|r| r.step == checkpoint.step);
            let logged = row.and_then(|r| r.metrics.get(&metric).or(r.metrics.get("eval_loss")).copied());
            all.push(Evaluation { step: checkpoint.step, metric, loss, logged, rows: rows.len() });
        }
    }
    Ok(all)
}

/// The checkpoint's adapter, scaled as its own adapter_config.json says.
fn adapter(run: &Run, checkpoint: &Checkpoint, engine: &Engine) -> Result<Adapter> {
    let weights = checkpoint.adapter()?;
    let config = &run.config;
    let stored = checkpoint.adapter_config();
    let number = |key: &str| stored.as_ref().and_then(|c| c.get(key)?.as_f64());
    let rank = number("r").unwrap_or(config.lora_rank as f64);
    let alpha = number("lora_alpha").unwrap_or(config.lora_alpha);
    let rooted = stored.as_ref().and_then(|c| c.get("use_rslora")?.as_bool()).unwrap_or(config.use_rslora);
    let scaling = alpha / if rooted { rank.sqrt() } else { rank };
    Adapter::new(engine.device(), engine.config(), &config.lora_target, &weights, scaling, engine.plan().adapter)
}

/// Mean over rows of their batch's token mean, batches in file order.
fn loss(rows: &[Example], batch: usize, adapter: &Adapter, engine: &Engine, vocab: usize) -> Result<f64> {
    // Batches per pass: enough rows to keep the device busy, few enough to stop soon after Ctrl-C.
    const PER_PASS: usize = 16;
    let batches: Vec<Vec<Row<'_>>> = rows.chunks(batch.max(1)).map(|b| b.iter().map(Row::from).collect()).collect();
    let (mut total, mut count) = (0.0, 0usize);
    for group in batches.chunks(PER_PASS) {
        interrupt::check()?;
        let output = engine.losses(adapter, &Ragged::build(group, vocab)?, &PassOptions::default())?;
        for (unit, rows) in output.units.iter().zip(group) {
            // A batch without any label is 0 / 0 in the trainer, too.
            let mean = unit.loss_sum / unit.label_tokens as f32;
            total += f64::from(mean) * rows.len() as f64;
            count += rows.len();
        }
    }
    Ok(total / count as f64)
}
