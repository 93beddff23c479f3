//! The eval_loss that the log should have had: the trainer's batches, weighting and arithmetic (contract 9).
//!
//! Owns the loss of one adapter over the evaluation rows, and a run's curve of it. Which rows those are is `batches`',
//! why the log has none is [`super::eval`]'s.

use serde_json::{Value, json};

use crate::batches::{Example, Shards};
use crate::device::Device;
use crate::model::{Adapter, Engine, PassOptions, Ragged, Row};
use crate::replay::{Observer, Replayer, Scene, Start};
use crate::report::json::{number, optional};
use crate::run::{Checkpoint, EvalRow, Packing, TrainConfig};
use crate::step::TrainState;
use crate::{Error, Result, interrupt};

/// One point of one set's curve.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Empty: the split, or the merged evaluation data; else the data set's name.
    pub set: String,
    pub step: u64,
    /// Mean over batches of their token means; NaN if a batch has no label.
    pub loss: f64,
    /// Rows whose batch has no label to predict.
    pub unlabelled_rows: usize,
    /// What the log has at this step for this set.
    pub logged: Option<f64>,
    /// The adapter was read from checkpoint-K; otherwise it was replayed.
    pub from_checkpoint: bool,
}

impl Evaluation {
    /// |computed − logged| / |logged|, where the log has a number.
    pub fn deviation(&self) -> Option<f64> {
        self.logged.map(|logged| ((self.loss - logged) / logged).abs())
    }
}

/// Batches evaluated between two looks at Ctrl-C: enough rows to keep the device busy.
const BATCHES_AT_ONCE: usize = 16;

/// The mean over batches of their f32 token means, a short last batch counting as much as a full one:
/// `Seq2SeqTrainer.evaluate`, whose trainer LLaMA-Factory uses, repeats each batch's loss per_device_eval_batch_size
/// times and gathers with `accelerator.gather`, which drops nothing (plain `Trainer` weights the last batch by its rows).
/// Over several ranks the missing batches and rows are filled as in training, and count.
///
/// Returns the loss and the number of rows in batches without a label (whose loss is NaN).
///
/// # Errors
/// No rows, token ids outside the vocabulary, a device that fails.
pub fn eval_loss(
    engine: &Engine,
    adapter: &Adapter,
    rows: &[Example],
    config: &TrainConfig,
    vocab: usize,
) -> Result<(f64, usize)> {
    if config.packing != Packing::Off {
        return Err(Error::refused("packed evaluation rows are not covered")
            .at("packing")
            .next("evaluate a copy of the configuration without packing: the loss of the same rows, each on its own"));
    }
    let count = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    let (batch, world) = (count(config.per_device_eval_batch_size), count(config.world_size).max(1));
    let shards = Shards::new(count(rows.len()), batch, world, config.dataloader_drop_last);
    let batches: Vec<Vec<Row<'_>>> = (0..shards.per_rank())
        .flat_map(|index| (0..world).map(move |rank| (index, rank)))
        .map(|(index, rank)| shards.positions(index, rank).iter().map(|&i| Row::from(&rows[i as usize])).collect())
        .collect();
    if batches.is_empty() {
        return Err(Error::input("no rows to evaluate").at("per_device_eval_batch_size").next("set it lower"));
    }
    let (mut sum, mut unlabelled) = (0f64, 0usize);
    for group in batches.chunks(BATCHES_AT_ONCE) {
        interrupt::check()?;
        let output = engine.losses(adapter, &Ragged::build(group, vocab)?, &PassOptions::default())?;
        for (batch, unit) in group.iter().zip(&output.units) {
            if unit.label_tokens == 0 {
                unlabelled += batch.len();
            }
            // 0 / 0 is NaN, as in the trainer.
            sum += f64::from(unit.loss_sum / unit.label_tokens as f32);
        }
    }
    Ok((sum / batches.len() as f64, unlabelled))
}

/// Every evaluation set of the run at every checkpoint, and with `every` also after every so many replayed steps (and
/// after the last). `told` hears of each point as it is found.
///
/// # Errors
/// A run without evaluation rows or without anything to evaluate; unreadable checkpoints; replays that fail.
pub fn curve(replayer: &Replayer, every: Option<u64>, told: &mut dyn FnMut(&Evaluation)) -> Result<Vec<Evaluation>> {
    let scene = replayer.scene();
    if scene.corpus.eval.iter().all(|(_, rows)| rows.is_empty()) {
        return Err(Error::input("the run has no evaluation rows").at_path(&scene.run.config_path).next(
            "give it some with --set eval_dataset=NAME (a data set of dataset_info.json), or --set val_size=0.1, whose \
             rows this run has trained on",
        ));
    }
    let mut points = Vec::new();
    for checkpoint in &scene.run.checkpoints {
        let adapter = adapter(scene, checkpoint).map_err(|e| e.at_path(&checkpoint.dir))?;
        evaluate(scene, &adapter, checkpoint.step, true, &mut points, told)?;
    }
    if let Some(every) = every {
        let known: Vec<u64> = scene.run.checkpoints.iter().map(|checkpoint| checkpoint.step).collect();
        let last = scene.last_step();
        let mut evaluator = Evaluator { scene, every, last, known, points: &mut points, told };
        replayer.replay(&Start::Initial, last, &[], &mut evaluator)?;
        points.sort_by(|a, b| (a.step, &a.set).cmp(&(b.step, &b.set)));
    }
    if points.is_empty() {
        return Err(Error::input("the run has no checkpoint to evaluate")
            .at_path(&scene.run.path(&scene.run.config.output_dir))
            .next("give --every N to replay the run and evaluate after every N steps"));
    }
    Ok(points)
}

fn evaluate(
    scene: &Scene,
    adapter: &Adapter,
    step: u64,
    from_checkpoint: bool,
    points: &mut Vec<Evaluation>,
    told: &mut dyn FnMut(&Evaluation),
) -> Result<()> {
    let run = &scene.run;
    for (set, rows) in scene.corpus.eval.iter().filter(|(_, rows)| !rows.is_empty()) {
        let (loss, unlabelled_rows) = eval_loss(&scene.engine, adapter, rows, &run.config, scene.corpus.vocab_size)
            .map_err(|error| error.at(format!("step {step}")))?;
        let logged = logged(&run.log.eval_rows, set, step);
        let point = Evaluation { set: set.clone(), step, loss, unlabelled_rows, logged, from_checkpoint };
        told(&point);
        points.push(point);
    }
    Ok(())
}

/// The last logged value for this set at this step: a resumed run may have evaluated there twice.
fn logged(rows: &[EvalRow], set: &str, step: u64) -> Option<f64> {
    let key = metric(set);
    rows.iter().rev().filter(|row| row.step == step).find_map(|row| row.metrics.get(&key).copied())
}

/// Name under which the trainer logs a set's loss.
pub fn metric(set: &str) -> String {
    if set.is_empty() { "eval_loss".to_owned() } else { format!("eval_{set}_loss") }
}

/// The checkpoint's adapter, scaled as its own adapter_config.json says.
fn adapter(scene: &Scene, checkpoint: &Checkpoint) -> Result<Adapter> {
    let weights = checkpoint.adapter()?;
    let config = &scene.run.config;
    let stored = checkpoint.adapter_config();
    let number = |key: &str| stored.as_ref().and_then(|c| c.get(key)?.as_f64());
    let rank = number("r").unwrap_or(config.lora_rank as f64);
    let alpha = number("lora_alpha").unwrap_or(config.lora_alpha);
    let rooted = stored.as_ref().and_then(|c| c.get("use_rslora")?.as_bool()).unwrap_or(config.use_rslora);
    let scaling = alpha / if rooted { rank.sqrt() } else { rank };
    let engine = &scene.engine;
    Adapter::new(engine.device(), engine.config(), &config.lora_target, &weights, scaling, engine.plan().adapter)
}

/// Evaluates every so many steps of a replay.
struct Evaluator<'a> {
    scene: &'a Scene,
    every: u64,
    last: u64,
    /// Steps whose checkpoint was evaluated already.
    known: Vec<u64>,
    points: &'a mut Vec<Evaluation>,
    told: &'a mut dyn FnMut(&Evaluation),
}

impl Observer for Evaluator<'_> {
    fn wants_state(&mut self, step: u64) -> bool {
        (step.is_multiple_of(self.every) || step == self.last) && !self.known.contains(&step)
    }
    fn state(&mut self, _device: &dyn Device, state: &TrainState) -> Result<()> {
        evaluate(self.scene, &state.adapter, state.step, false, self.points, self.told)
    }
}

/// `spikeprobe.eval/1`.
pub fn to_json(scene: &Scene, points: &[Evaluation]) -> Value {
    let sets: Vec<Value> = scene
        .corpus
        .eval
        .iter()
        .map(|(set, rows)| {
            let labels: usize = rows.iter().map(Example::label_tokens).sum();
            let points: Vec<Value> = points.iter().filter(|point| point.set == *set).map(point_json).collect();
            json!({"set": set, "metric": metric(set), "rows": rows.len(), "label_tokens": labels, "evaluations": points})
        })
        .collect();
    json!({
        "schema": "spikeprobe.eval/1",
        "run": scene.run.config_path.display().to_string(),
        "batch_size": scene.run.config.per_device_eval_batch_size,
        "sets": sets,
    })
}

fn point_json(point: &Evaluation) -> Value {
    json!({
        "step": point.step,
        "loss": number(point.loss),
        "logged": optional(point.logged),
        "unlabelled_rows": point.unlabelled_rows,
        "adapter": if point.from_checkpoint { "checkpoint" } else { "replayed" },
    })
}
