//! `spikeprobe sweep`: a grid of settings over a run, and `sweep merge`: shards brought together.
//!
//! Owns what is typed for it and the order of work; grids, folders and outcomes are `sweep`'s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Common;
use crate::replay::Replayer;
use crate::report::terminal::Style;
use crate::run::patch;
use crate::sweep::folder::{CellResult, Folder, Manifest};
use crate::sweep::grid::{Axis, Grid, Keep};
use crate::sweep::present::Sweep;
use crate::sweep::queue::{self, Shard};
use crate::sweep::replayed::{self, Replayed};
use crate::sweep::suggest::Check;
use crate::sweep::{Cell, SWEEP_SCHEMA};
use crate::{Error, Result, output};

/// As typed.
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    pub merge: Option<Merge>,
    /// A LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(value_name = "RUN", required = true)]
    pub run: Option<PathBuf>,
    /// Learning rates; `x0.3` means 0.3 times the run's own.
    #[arg(long, value_name = "A,B,...")]
    pub lr: Option<String>,
    /// Gradient accumulation steps.
    #[arg(long, value_name = "A,B,...")]
    pub accumulation: Option<String>,
    /// fp32, tf32, bf16, fp16, pure_bf16.
    #[arg(long, value_name = "A,B,...")]
    pub precision: Option<String>,
    /// Any other axis (max_grad_norm, warmup_ratio, lora_rank, lora_alpha, seed, ...); may be repeated.
    #[arg(long, value_name = "KEY=A,B,...")]
    pub grid: Vec<String>,
    /// What stays the same while accumulation varies: the micro-batch, or the samples per update.
    #[arg(long, value_enum, default_value = "micro-batch")]
    pub keep: KeepTyped,
    /// Where cells start: initial (step 0) or the step of a checkpoint.
    #[arg(long, value_name = "initial|K", default_value = "initial")]
    pub from: String,
    /// Length of every cell in the run's own optimizer steps (other samples per update: as many samples)
    /// [default: to the end of the run].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub steps: Option<u64>,
    /// Folder of the results; a sweep that was stopped goes on there.
    #[arg(long, value_name = "DIR", default_value = "spikeprobe-sweep")]
    pub out: PathBuf,
    /// Run only every N-th cell, from the I-th (0 to N-1): one shard a machine.
    #[arg(long, value_name = "I/N", value_parser = Shard::parse)]
    pub shard: Option<Shard>,
    /// Cells at once [default: one a CPU thread, one on a GPU; fewer cells than threads share them out].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub jobs: Option<u16>,
}

#[derive(Debug, Subcommand)]
pub enum Merge {
    /// Bring the shards of a sweep together and write its results.
    Merge {
        /// Folders of the same sweep; everything is gathered in the first.
        #[arg(value_name = "DIR", required = true)]
        dirs: Vec<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KeepTyped {
    MicroBatch,
    Samples,
}

/// Runs the sweep, or merges.
///
/// # Errors
/// What cannot be read, replayed or written. Results so far stay in the folder.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[])?;
    match (&args.merge, &args.run) {
        (Some(Merge::Merge { dirs }), _) => merge(dirs, common),
        (None, Some(run)) => sweep(args, run, common),
        (None, None) => Err(Error::usage("no RUN given").next("spikeprobe sweep RUN --lr 1e-4,3e-4")),
    }
}

fn sweep(args: &Args, run: &Path, common: &Common) -> Result<()> {
    // Cells side by side rather than products spread over threads, which small ones do not fill.
    let (at_once, threads) = args.spread(common);
    let replayer = Common { threads: Some(threads), ..common.clone() }.open_replayer(run, &[])?;
    let base = replayed::base(&replayer, &args.from, args.steps)?;
    let grid = args.grid(&base)?;
    check_attempts(&replayer, &grid)?;
    let manifest = Manifest {
        schema: SWEEP_SCHEMA.into(),
        run: run.to_owned(),
        root: common.root.clone(),
        fingerprint: replayed::run_fingerprint(&replayer, &args.from)?,
        cells: grid.cells(&base)?,
        axes: grid.axes.clone(),
        keep: grid.keep,
        own: replayed::own(&replayer),
    };
    let folder = Folder::create(&args.out)?;
    folder.set_manifest(&manifest)?;
    let trainer = Replayed::new(&replayer);
    let shard = args.shard.unwrap_or(Shard::ALL);
    let progress = Progress::new(common, manifest.cells.iter().enumerate().filter(|(i, _)| shard.holds(*i)).count());
    let told = |_: usize, result: &CellResult| progress.finished(result);
    let context = replayed::context(&replayer);
    let workers = if replayer.device().name() == "cpu" { at_once } else { args.jobs.map_or(1, usize::from) };
    let done = queue::run(&folder, &manifest, shard, workers, &trainer, context, &told);
    progress.clear();
    let results = folder.results(&manifest)?;
    let mut sweep = Sweep::new(&manifest, &results);
    let done = match done {
        Ok(done) => done,
        Err(e) => {
            if results.iter().any(Option::is_some) {
                publish(&sweep, &folder, common, false)?;
            }
            return Err(e.or_next("the same command keeps the cells that are done and goes on with the others"));
        }
    };
    common.remark(&format!("{} cells computed, {} were there already", done.computed, done.kept));
    if sweep.missing() == 0 && shard == Shard::ALL {
        check(&mut sweep, &folder, &trainer, &replayer)?;
        write_suggestion(&sweep, &folder, replayer.run().config_path.as_path())?;
    }
    publish(&sweep, &folder, common, shard == Shard::ALL)
}

/// Accumulation cannot vary over a run that was resumed: positions in the data would no longer fit.
fn check_attempts(replayer: &Replayer, grid: &Grid) -> Result<()> {
    let moves = |axis: &Axis| axis.key == "gradient_accumulation_steps" || axis.key == "per_device_train_batch_size";
    match grid.axes.iter().find(|a| moves(a)) {
        Some(axis) if replayer.scene().segments.len() > 1 => {
            Err(Error::usage("cannot vary: the run was resumed, and its data positions would no longer fit")
                .at(&axis.key)
                .next("sweep the configuration of its first attempt on its own"))
        }
        _ => Ok(()),
    }
}

/// Replays the suggested cell with another seed, once; its result is kept like any other.
fn check(sweep: &mut Sweep<'_>, folder: &Folder, trainer: &Replayed<'_>, replayer: &Replayer) -> Result<()> {
    let Some(suggestion) = &mut sweep.suggestion else { return Ok(()) };
    let mut cell: Cell = sweep.manifest.cells[suggestion.cell].clone();
    let used = |seed: u64| {
        let of = |c: &Cell| c.axes.get("seed").and_then(Value::as_u64).unwrap_or(replayer.run().config.seed);
        sweep.manifest.cells.iter().any(|c| of(c) == seed)
    };
    let seed = (1..).map(|i| replayer.run().config.seed.wrapping_add(i)).find(|s| !used(*s)).unwrap_or(0);
    cell.axes.insert("seed".into(), json!(seed));
    let fingerprint = &sweep.manifest.fingerprint;
    let result = match folder.load(&cell, fingerprint)? {
        Some(result) => result,
        None => {
            let mut results = queue::several(&[&cell], fingerprint, trainer, replayed::context(replayer))?;
            let result = results.pop().ok_or_else(|| Error::internal("a cell without a result"))?;
            folder.store(&result)?;
            result
        }
    };
    let outcome = result.outcome;
    let (stable, final_loss, peak_loss) = (outcome.stable, outcome.final_loss, outcome.peak_loss);
    suggestion.check = Some(Check { seed, stable, final_loss, peak_loss });
    Ok(())
}

/// `suggested.yaml`: the run's configuration with the suggested settings.
fn write_suggestion(sweep: &Sweep<'_>, folder: &Folder, config: &Path) -> Result<()> {
    let Some(suggestion) = &sweep.suggestion else { return Ok(()) };
    let cell = &sweep.manifest.cells[suggestion.cell];
    let text =
        std::fs::read_to_string(config).map_err(|e| Error::input(format!("cannot be read: {e}")).at_path(config))?;
    let mut changes: BTreeMap<String, Value> = cell.settings();
    if let Some(word) = cell.precision() {
        let flags = patch::precision_flags(word);
        changes.extend(flags.into_iter().filter(|(key, on)| on == &json!(true) || text.contains(key.as_str())));
    }
    let ending = config.extension().and_then(|e| e.to_str()).unwrap_or("yaml");
    output::write_text(&folder.path(&format!("suggested.{ending}")), &patch::patched(&text, &changes))
}

/// Writes the results of a complete sweep; prints what there is.
fn publish(sweep: &Sweep<'_>, folder: &Folder, common: &Common, whole: bool) -> Result<()> {
    let json = sweep.json()?;
    if whole {
        output::write_text(&folder.path("results.csv"), &sweep.csv()?)?;
        output::write_text(&folder.path("results.json"), &format!("{json:#}\n"))?;
        output::write_text(&folder.path("sweep.html"), &sweep.html())?;
        let yaml = if sweep.suggestion.is_some() { ", suggested.yaml" } else { "" };
        common.remark(&format!("wrote sweep.html, results.csv, results.json{yaml} in {}", folder.path("").display()));
    }
    common.print(&sweep.terminal(Style::stdout()))?;
    common.write_json(&json)
}

fn merge(dirs: &[PathBuf], common: &Common) -> Result<()> {
    let (Some(first), rest) = (dirs.first(), dirs.get(1..).unwrap_or_default()) else {
        return Err(Error::usage("no folder given"));
    };
    let (folder, manifest) = Folder::open(first)?;
    for dir in rest {
        let copied = folder.absorb(dir, &manifest)?;
        common.remark(&format!("{copied} cells from {}", dir.display()));
    }
    let results = folder.results(&manifest)?;
    let sweep = Sweep::new(&manifest, &results);
    let mut machines: Vec<&str> = results.iter().flatten().map(|r| r.machine.as_str()).collect();
    machines.sort_unstable();
    machines.dedup();
    if machines.len() > 1 {
        common.remark(&format!("cells ran on different machines: {}", machines.join("; ")));
    }
    let config = manifest.root.join(&manifest.run);
    let config = [manifest.run.clone(), config].into_iter().find(|path| path.is_file());
    if let Some(config) = config.filter(|_| sweep.missing() == 0) {
        write_suggestion(&sweep, &folder, &config)?;
        common.remark("to check the suggestion with another seed, run the same sweep once without --shard");
    }
    publish(&sweep, &folder, common, true)
}

impl Args {
    fn grid(&self, base: &crate::sweep::grid::Base) -> Result<Grid> {
        let named = [
            ("learning_rate", &self.lr),
            ("gradient_accumulation_steps", &self.accumulation),
            ("precision", &self.precision),
        ];
        let typed = named.into_iter().filter_map(|(key, values)| values.as_ref().map(|v| format!("{key}={v}")));
        let axes =
            typed.chain(self.grid.iter().cloned()).map(|text| Axis::parse(&text, base)).collect::<Result<_>>()?;
        let keep = match self.keep {
            KeepTyped::MicroBatch => Keep::MicroBatch,
            KeepTyped::Samples => Keep::Samples,
        };
        Ok(Grid { axes, keep, from: self.from.trim_start_matches("checkpoint-").to_owned() })
    }

    /// Cells at once on a CPU, and threads for each: one, unless there are fewer cells than threads.
    fn spread(&self, common: &Common) -> (usize, u16) {
        let threads = common.threads.map_or_else(cores, usize::from);
        let at_once = self.jobs.map_or(threads, usize::from).min(self.most_cells()).max(1);
        (at_once, u16::try_from(threads / at_once).unwrap_or(u16::MAX).max(1))
    }

    /// No less than the cells of this call, counted before values are understood.
    fn most_cells(&self) -> usize {
        let axes = [&self.lr, &self.accumulation, &self.precision].into_iter().flatten().chain(&self.grid);
        let all = axes.map(|values| values.split(',').count()).fold(1, usize::saturating_mul);
        all.div_ceil(self.shard.map_or(1, |shard| shard.count))
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Says on standard error what is done, when someone is looking.
struct Progress {
    shown: bool,
    total: usize,
    done: AtomicUsize,
}

impl Progress {
    fn new(common: &Common, total: usize) -> Self {
        Self { shown: !common.quiet && output::progress(), total, done: AtomicUsize::new(0) }
    }
    fn finished(&self, result: &CellResult) {
        let done = self.done.fetch_add(1, Ordering::Relaxed) + 1;
        if self.shown {
            output::status(&format!("cell {done} of {}: {}", self.total, queue::name(&result.cell)));
        }
    }
    fn clear(&self) {
        if self.shown {
            output::status("");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Typed {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        args: Args,
    }

    fn spread(typed: &str) -> (usize, u16) {
        let typed = Typed::parse_from(typed.split(' '));
        typed.args.spread(&typed.common)
    }

    #[test]
    fn cells_take_a_thread_each_and_few_cells_share_all_threads() {
        assert_eq!(spread("sweep RUN --threads 8 --lr 1e-4,2e-4,3e-4,4e-4 --accumulation 1,8"), (8, 1));
        assert_eq!(spread("sweep RUN --threads 8 --lr 1e-4,2e-4,3e-4"), (3, 2));
        assert_eq!(spread("sweep RUN --threads 8 --lr 1e-4,2e-4 --grid seed=1,2 --shard 1/4"), (1, 8));
        assert_eq!(spread("sweep RUN --threads 2 --lr 1e-4 --jobs 4"), (1, 2));
        assert_eq!(spread("sweep RUN --threads 4 --lr 1e-4,2e-4,3e-4,4e-4 --jobs 2"), (2, 2));
    }
}
