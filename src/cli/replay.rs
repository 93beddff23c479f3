//! `spikeprobe replay`: re-run the optimizer steps of a run and hold them against its log.
//!
//! Owns what is typed for it; the replay is `replay::Replayer`'s.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Args as ClapArgs;
use serde_json::Value;

use super::Common;
use super::replay_text::{cross_check_lines, table};
use crate::batches::{Corpus, RowId};
use crate::numerics::Reorder;
use crate::replay::{
    Certificate, CrossCheck, Envelope, Intervention, Observer, Replayer, Start, StepRecord, Trace, certify,
    cross_check, step_json, trace_json,
};
use crate::{Error, Result, output};

/// Re-run the optimizer steps of a run and hold them against its log.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// Where to start: initial (step 0) or the step of a checkpoint.
    #[arg(long, value_name = "initial|K", default_value = "initial", value_parser = parse_start)]
    pub from: Start,
    /// Last step to replay [default: the last logged one].
    #[arg(long, value_name = "STEP", conflicts_with = "steps")]
    pub to: Option<u64>,
    /// How many steps to replay.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Change a configuration key for this replay; may be repeated.
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_setting)]
    pub set: Vec<(String, String)>,
    /// Mask the labels of these dataset rows (counted from 0), keeping order and windows: data:3,data:17
    #[arg(long, value_name = "DATASET:ROW,...", value_delimiter = ',', value_parser = parse_row)]
    pub neutralise_rows: Vec<(String, u32)>,
    /// Compute in another precision than the run did.
    #[arg(long, value_name = "PRECISION", value_parser = ["fp32", "tf32", "bf16", "fp16", "pure_bf16"])]
    pub precision: Option<String>,
    /// Add noise of half an ulp to every block's input, from this seed; several seeds show how far honest
    /// arithmetic may differ.
    #[arg(long, value_name = "SEED")]
    pub perturb: Option<u64>,
    /// Siblings from which the certificate's envelope and bands are taken: each with such noise, and with the terms
    /// of its products added in another order.
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub envelope: u64,
    /// Compute each micro-batch alone and padded as the trainer did: slower, and the way to the trainer's own
    /// matrix products on the same GPU.
    #[arg(long)]
    pub exact_shapes: bool,
    /// Compute the first step, and the one where the log jumps or the replay departs from it, a second time with
    /// candle's autograd in f32, and compare every gradient.
    #[arg(long)]
    pub cross_check: bool,
    /// Write each step as a line of JSON while it is replayed.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
}

fn parse_start(typed: &str) -> std::result::Result<Start, String> {
    if typed == "initial" {
        return Ok(Start::Initial);
    }
    let digits = typed.strip_prefix("checkpoint-").unwrap_or(typed);
    digits.parse().map(Start::Checkpoint).map_err(|_| "expected initial or the step of a checkpoint".to_owned())
}

pub(super) fn parse_setting(typed: &str) -> std::result::Result<(String, String), String> {
    let (key, value) = typed.split_once('=').filter(|(key, _)| !key.trim().is_empty()).ok_or("expected KEY=VALUE")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

fn parse_row(typed: &str) -> std::result::Result<(String, u32), String> {
    let (name, row) = typed.rsplit_once(':').ok_or("expected DATASET:ROW")?;
    let row = row.parse().map_err(|_| format!("`{row}` is not a row number"))?;
    Ok((name.to_owned(), row))
}

/// Replays and prints.
///
/// # Errors
/// When the run cannot be read or replayed.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[&args.trace])?;
    let replayer = common.open_replayer(&args.run, &[])?;
    let interventions = args.interventions(&replayer)?;
    let to = args.last_step(&replayer, &interventions)?;
    if common.verbose {
        for line in replayer.run().evidence() {
            common.remark(&line);
        }
    }
    let scene = replayer.scene_for(&interventions)?;
    if scene.run.config.lora_dropout > 0.0 && args.envelope == 0 && !scene.draws_torch_masks() {
        common.remark(
            "lora_dropout: nothing says that the run was trained on a CPU, and a GPU's masks cannot be known, so one replay \
             is one draw; --envelope 5 shows the band of several",
        );
    }
    let mut recorder = Recorder::new(common, &replayer, args, to);
    let outcome = replayer.replay(&args.from, to, &interventions, &mut recorder);
    let (trace, mut cut) = match outcome {
        Ok(trace) => (trace, None),
        // Ctrl-C, or a device that failed half-way: the steps that were done are results all the same.
        Err(e) if !recorder.steps.is_empty() => {
            (Trace { start: args.from.clone(), steps: std::mem::take(&mut recorder.steps) }, Some(e))
        }
        Err(e) => return Err(e),
    };
    let floor = Envelope::floor(scene.engine.plan());
    let certified =
        |siblings: &[Trace]| certify(&scene.run.log.rows, scene.run.semantics.rounds_loss, floor, &trace, siblings);
    let mut perturbed = Vec::new();
    if cut.is_none() {
        // A log that is met to the last bit was made with these masks; otherwise each sibling draws its own.
        let masks_known = certified(&[]).exact_to.is_some();
        cut = args.perturbed(&replayer, to, (&interventions, masks_known), &mut perturbed).err();
    }
    let traced = recorder.finish();
    let certificate = certified(&perturbed);
    let mut text = table(&trace, &certificate, &scene.corpus);
    let checks = match args.cross_check && cut.is_none() {
        true => cross_checked(&replayer, args, &interventions, &trace, &certificate),
        false => Ok(Vec::new()),
    };
    let checks = checks.unwrap_or_else(|e| {
        cut = Some(e);
        Vec::new()
    });
    let mut json = trace_json(&trace, &certificate, &scene.run.log.rows, &scene.corpus, cut.is_none());
    if !checks.is_empty() {
        checks.iter().for_each(|check| text.push_str(&cross_check_lines(check)));
        json["cross_check"] = checks.iter().map(CrossCheck::json).collect();
    }
    let written = [traced, common.print(&text), common.write_json(&json)];
    cut.map_or(Ok(()), Err)?;
    written.into_iter().collect()
}

impl Args {
    fn interventions(&self, replayer: &Replayer) -> Result<Vec<Intervention>> {
        let mut all: Vec<Intervention> = self
            .set
            .iter()
            .map(|(key, value)| Intervention::Set { key: key.clone(), value: Value::from(value.as_str()) })
            .collect();
        if !self.neutralise_rows.is_empty() {
            let rows = self.neutralise_rows.iter().map(|(name, row)| find_row(replayer.corpus(), name, *row));
            all.push(Intervention::NeutraliseRows(rows.collect::<Result<_>>()?));
        }
        if let Some(precision) = &self.precision {
            all.push(Intervention::Precision(replayer.run().precision()?.plan.with_arithmetic(precision)));
        }
        if self.exact_shapes {
            all.push(Intervention::ExactShapes);
        }
        if let Some(seed) = self.perturb {
            all.push(Intervention::Perturb { seed });
        }
        Ok(all)
    }

    fn last_step(&self, replayer: &Replayer, interventions: &[Intervention]) -> Result<u64> {
        let first = match self.from {
            Start::Initial => 0,
            Start::Checkpoint(step) => step,
        };
        let end = replayer.scene_for(interventions)?.last_step();
        let logged = replayer.run().log.rows.iter().map(|r| r.step).max();
        Ok(match (self.to, self.steps) {
            (Some(to), _) => to,
            (None, Some(steps)) => first.saturating_add(steps).min(end),
            // The end of the plan where the log ends before the start: an unlogged run, or a changed one.
            (None, None) => logged.filter(|&l| l > first).map_or(end, |l| l.min(end)),
        })
    }

    /// Siblings that honest arithmetic could have made: half an ulp of noise before every block, and the terms of every
    /// product of activations with weights added in another order, as another kernel would.
    fn perturbed(
        &self,
        replayer: &Replayer,
        to: u64,
        (interventions, masks_known): (&[Intervention], bool),
        siblings: &mut Vec<Trace>,
    ) -> Result<()> {
        for seed in 1..=self.envelope {
            let seed = self.perturb.unwrap_or(0).wrapping_mul(1000) + seed;
            let mut noisy = interventions.to_vec();
            noisy.push(Intervention::Perturb { seed });
            noisy.extend((!masks_known).then_some(Intervention::Dropout { seed }));
            let sibling = replayer.watched(Arc::new(Reorder { seed }))?;
            siblings.push(sibling.replay(&self.from, to, &noisy, &mut crate::replay::Silent)?);
        }
        Ok(())
    }
}

fn find_row(corpus: &Corpus, name: &str, row: u32) -> Result<RowId> {
    let names: Vec<&str> = corpus.datasets.iter().map(|d| d.name.as_str()).collect();
    let wrong = |what: String, next: String| Error::usage(what).at("--neutralise-rows").next(next);
    let dataset = names
        .iter()
        .position(|n| *n == name)
        .ok_or_else(|| wrong(format!("the run has no dataset `{name}`"), format!("it has {}", names.join(", "))))?;
    let id = RowId { dataset: dataset as u16, row };
    if !corpus.train.iter().any(|e| e.row == id) {
        let what = format!("row {row} of {name} is not among the training rows");
        return Err(wrong(what, "rows count from 0 in the dataset file".to_owned()));
    }
    Ok(id)
}

/// Collects the steps, writes `--trace`, shows progress.
struct Recorder<'a> {
    common: &'a Common,
    replayer: &'a Replayer,
    trace: Option<&'a PathBuf>,
    lines: String,
    steps: Vec<StepRecord>,
    to: u64,
    began: Instant,
    progress: bool,
}

/// Seconds of remaining work from which the first step's time is announced.
const LONG: f64 = 60.0;

impl<'a> Recorder<'a> {
    fn new(common: &'a Common, replayer: &'a Replayer, args: &'a Args, to: u64) -> Self {
        Self {
            common,
            replayer,
            trace: args.trace.as_ref(),
            lines: String::new(),
            steps: Vec::new(),
            to,
            began: Instant::now(),
            progress: !common.quiet && output::progress(),
        }
    }

    /// Puts `--trace` in place, whole.
    fn finish(&mut self) -> Result<()> {
        if self.progress {
            output::status("");
        }
        match self.trace {
            Some(path) => output::write_text(path, &self.lines),
            None => Ok(()),
        }
    }
}

impl Observer for Recorder<'_> {
    fn step(&mut self, record: &StepRecord) -> Result<()> {
        if self.trace.is_some() {
            let rows = &self.replayer.run().log.rows;
            let logged = rows.iter().find(|r| r.attempt == record.attempt && r.step == record.step);
            let _ = writeln!(self.lines, "{}", step_json(record, logged, self.replayer.corpus()));
        }
        self.steps.push(record.clone());
        let done = self.steps.len() as f64;
        let left = self.began.elapsed().as_secs_f64() / done * self.to.saturating_sub(record.step) as f64;
        if self.steps.len() == 1 && left > LONG {
            self.common.remark(&format!("about {:.0} minutes for {} more steps", left / 60.0, self.to - record.step));
        }
        if self.progress {
            output::status(&format!("step {} of {}, {left:.0} s left", record.step, self.to));
        }
        Ok(())
    }
}

/// The first replayed step computed again by candle, and the one where the log jumps or the replay departs.
fn cross_checked(
    replayer: &Replayer,
    args: &Args,
    interventions: &[Intervention],
    trace: &Trace,
    certificate: &Certificate,
) -> Result<Vec<CrossCheck>> {
    let first = trace.steps.first().map(|s| s.step);
    let telling = certificate.departs_at.or(certificate.bump_at).filter(|&s| Some(s) != first);
    let steps = first.into_iter().chain(telling);
    steps.map(|step| cross_check(replayer, &args.from, step, interventions)).collect()
}
