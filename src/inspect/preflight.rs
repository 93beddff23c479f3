//! What can be known before training: the data's numbers, and the first windows run at the planned peak learning rate
//! in the planned precision.
//!
//! Owns the measurements and what they mean ([`judge`]). Findings about configuration and rows are the other files of
//! this folder's; the windows are run by `replay`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Code, Finding, Severity};
use crate::Result;
use crate::batches::{Corpus, Example};
use crate::device::{DType, Device};
use crate::probe::{Measurement, Probes, Site, largest};
use crate::replay::{Intervention, Observer, Replayer, Start, StepRecord, step_json};
use crate::report::json::number;
use crate::step::TrainState;

/// Counts of the training rows as the trainer will batch them.
#[derive(Debug, Clone, PartialEq)]
pub struct DataNumbers {
    pub rows: usize,
    pub dropped: usize,
    pub tokens: usize,
    /// Predicted labels.
    pub label_tokens: usize,
    pub longest: usize,
    pub median: usize,
    pub steps_per_epoch: u64,
    pub total_steps: u64,
}

/// Largest magnitude seen at a site, over all windows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Headroom {
    pub site: Site,
    /// Dtype of the tensor in the planned precision.
    pub dtype: DType,
    pub max_abs: f64,
    /// NaN and infinities.
    pub nonfinite: u64,
    /// Place in the order of execution, forward then backward.
    pub order: usize,
}

impl Headroom {
    /// max_abs / 65504: 1 and more overflows in fp16.
    pub fn of_fp16(&self) -> f64 {
        self.max_abs / largest(DType::F16)
    }
}

/// What the first windows did.
#[derive(Debug, Clone)]
pub struct Preflight {
    pub data: DataNumbers,
    pub learning_rate: f64,
    pub steps: Vec<StepRecord>,
    /// Sites with non-finite values first, in the order of execution; then by magnitude.
    pub headroom: Vec<Headroom>,
    /// Of one step on this device, the slowest left out if there are three or more.
    pub seconds_per_step: f64,
    /// Elements of all LoRA matrices.
    pub trainable: usize,
    /// Bytes of the base model's weight files.
    pub base_bytes: u64,
    /// Peak memory of this process, bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

/// Runs the first `windows` windows with the learning rate held at its planned peak: no warmup softens them.
///
/// # Errors
/// A run that cannot be replayed.
pub fn preflight(replayer: &Replayer, windows: u64) -> Result<Preflight> {
    let scene = replayer.scene();
    let learning_rate = scene.run.config.learning_rate;
    let hold = [Intervention::HoldLearningRate { from_step: 1, value: learning_rate }];
    let mut watcher = Watcher { sites: HashMap::new(), times: Vec::new(), last: Instant::now(), trainable: 0 };
    let trace = replayer.replay(&Start::Initial, windows.clamp(1, scene.last_step().max(1)), &hold, &mut watcher)?;
    let mut headroom: Vec<Headroom> = watcher.sites.into_values().collect();
    let rank = |h: &Headroom| if h.nonfinite > 0 { (0, h.order) } else { (1, 0) };
    // Ties by order: the map has none.
    headroom.sort_by(|a, b| rank(a).cmp(&rank(b)).then(b.max_abs.total_cmp(&a.max_abs)).then(a.order.cmp(&b.order)));
    let plan = scene.segments.first().map(|segment| (segment.plan.steps_per_epoch, segment.plan.total_steps));
    Ok(Preflight {
        data: data_numbers(&scene.corpus, plan.unwrap_or_default()),
        learning_rate,
        steps: trace.steps,
        headroom,
        seconds_per_step: typical(watcher.times),
        trainable: watcher.trainable,
        base_bytes: weight_bytes(&scene.run.path(&scene.run.config.model_name_or_path)),
        peak_memory: peak_memory(),
    })
}

fn data_numbers(corpus: &Corpus, (steps_per_epoch, total_steps): (u64, u64)) -> DataNumbers {
    let mut lengths: Vec<usize> = corpus.train.iter().map(|example| example.input_ids.len()).collect();
    lengths.sort_unstable();
    DataNumbers {
        rows: lengths.len(),
        dropped: corpus.dropped.len(),
        tokens: lengths.iter().sum(),
        label_tokens: corpus.train.iter().map(Example::label_tokens).sum(),
        longest: lengths.last().copied().unwrap_or(0),
        median: lengths.get(lengths.len() / 2).copied().unwrap_or(0),
        steps_per_epoch,
        total_steps,
    }
}

/// Mean of the durations without the longest, which pays for the first touch of every weight.
fn typical(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    if times.len() > 2 {
        times.pop();
    }
    times.iter().map(Duration::as_secs_f64).sum::<f64>() / times.len().max(1) as f64
}

/// Bytes of the safetensors files in a model's folder.
fn weight_bytes(folder: &std::path::Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let weights = files.filter(|path| path.extension().is_some_and(|e| e == "safetensors"));
    weights.filter_map(|path| std::fs::metadata(path).ok()).map(|m| m.len()).sum()
}

/// Peak host memory of this process in bytes: VmHWM of /proc/self/status, where there is one.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

/// Keeps the largest magnitude of every site and the time of every step.
struct Watcher {
    sites: HashMap<Site, Headroom>,
    times: Vec<Duration>,
    last: Instant,
    trainable: usize,
}

impl Observer for Watcher {
    fn step(&mut self, _record: &StepRecord) -> Result<()> {
        self.times.push(self.last.elapsed());
        self.last = Instant::now();
        Ok(())
    }
    fn probes(&mut self, _step: u64) -> Probes {
        Probes::PerSite
    }
    fn measured(&mut self, _step: u64, measurements: &[Measurement]) -> Result<()> {
        for Measurement { site, dtype, statistics, .. } in measurements {
            let order = self.sites.len();
            let new = Headroom { site: *site, dtype: *dtype, max_abs: 0.0, nonfinite: 0, order };
            let entry = self.sites.entry(*site).or_insert(new);
            entry.max_abs = entry.max_abs.max(f64::from(statistics.max_abs));
            entry.nonfinite += statistics.nan + statistics.pos_inf + statistics.neg_inf;
        }
        Ok(())
    }
    fn wants_state(&mut self, step: u64) -> bool {
        step == 1
    }
    fn state(&mut self, _device: &dyn Device, state: &TrainState) -> Result<()> {
        self.trainable = state.adapter.modules.iter().map(|m| m.a.elements() + m.b.elements()).sum();
        Ok(())
    }
}

/// A loss this many times the first window's, at the peak learning rate, is called divergence: windows hold different
/// rows, whose losses differ by less.
const DIVERGED: f64 = 1.5;
/// A site beyond a quarter of fp16's range leaves less than two doublings.
const THIN: f64 = 0.25;

/// What the measurements mean. `place`: where the configuration says the learning rate.
pub fn judge(flight: &Preflight, place: &str) -> Vec<Finding> {
    let mut found = Vec::new();
    let steps = &flight.steps;
    let rate = flight.learning_rate;
    found.extend(not_finite(steps, &flight.headroom, place));
    found.extend(diverges(steps, rate, place));
    let fullest = flight.headroom.iter().filter(|h| h.nonfinite == 0).max_by(|a, b| a.max_abs.total_cmp(&b.max_abs));
    if let Some(full) = fullest.filter(|h| h.of_fp16() > THIN) {
        let half = full.dtype == DType::F16;
        found.push(Finding::new(
            Code::ThinHeadroom,
            if half { Severity::Warning } else { Severity::Note },
            full.site.to_string(),
            format!(
                "values reach {:.3e}, {:.0} % of fp16's range{}",
                full.max_abs,
                100.0 * full.of_fp16(),
                if half { ": train in bf16" } else { "; harmless in the planned precision, but do not switch to fp16" }
            ),
        ));
    }
    found
}

/// A forward pass out of range cannot be helped by a loss scale; a backward pass can, and some skips are its price.
fn not_finite(steps: &[StepRecord], sites: &[Headroom], place: &str) -> Option<Finding> {
    let first = sites.first().filter(|h| h.nonfinite > 0);
    let at = first.map_or_else(|| place.to_owned(), |h| h.site.to_string());
    let from = first.map(|h| format!("; {} is the first place that is not finite", h.site)).unwrap_or_default();
    let of = |severity, text: String| Some(Finding::new(Code::PeakNotFinite, severity, at.clone(), text));
    if let Some(bad) = steps.iter().find(|s| !s.loss_raw.is_finite()) {
        return of(
            Severity::Error,
            format!(
                "the loss of window {} is {}: the forward pass leaves the range of the planned precision, which no loss \
                 scale mends{from}",
                bad.step, bad.loss_raw
            ),
        );
    }
    if let Some(bad) = steps.iter().find(|s| s.nonfinite > 0 && !s.skipped) {
        return of(
            Severity::Error,
            format!(
                "{} gradient elements of window {} are not finite and the planned precision applies them: the adapter \
                 would be NaN from there on{from}",
                bad.nonfinite, bad.step
            ),
        );
    }
    let scale = steps.first()?.loss_scale.unwrap_or(0.0);
    steps.iter().all(|s| s.skipped).then(|| {
        Finding::new(
            Code::PeakNotFinite,
            Severity::Warning,
            at.clone(),
            format!(
                "all {} windows overflow in fp16 and would be skipped{from}; the loss scale, {scale} at first, halves \
                 each time: some skips at the start are normal, bf16 needs none",
                steps.len()
            ),
        )
    })
}

fn diverges(steps: &[StepRecord], rate: f64, place: &str) -> Option<Finding> {
    let first = steps.first()?.loss_raw;
    let worst = steps.iter().filter(|s| s.loss_raw.is_finite()).max_by(|a, b| a.loss_raw.total_cmp(&b.loss_raw))?;
    (worst.step > 1 && worst.loss_raw > DIVERGED * first).then(|| {
        Finding::new(
            Code::PeakDiverges,
            Severity::Warning,
            place,
            format!(
                "held at the peak learning rate {rate:e}, the loss goes from {first:.4} to {:.4} at window {}: the rate is \
                 too high for this adapter or its warmup must carry it; `spikeprobe sweep` finds a rate that holds",
                worst.loss_raw, worst.step
            ),
        )
    })
}

/// `spikeprobe.preflight/1`; `findings` are all of them.
pub fn to_json(replayer: &Replayer, flight: &Preflight, findings: &[Finding]) -> Value {
    let data = &flight.data;
    let sites: Vec<Value> = flight
        .headroom
        .iter()
        .map(|h| {
            json!({"site": h.site.to_string(), "dtype": format!("{:?}", h.dtype).to_lowercase(),
                "max_abs": number(h.max_abs), "share_of_fp16_range": number(h.of_fp16()), "nonfinite": h.nonfinite})
        })
        .collect();
    json!({
        "schema": "spikeprobe.preflight/1",
        "run": replayer.run().config_path.display().to_string(),
        "data": {"rows": data.rows, "dropped": data.dropped, "tokens": data.tokens, "label_tokens": data.label_tokens,
            "longest": data.longest, "median": data.median, "steps_per_epoch": data.steps_per_epoch,
            "total_steps": data.total_steps},
        "learning_rate": number(flight.learning_rate),
        "steps": flight.steps.iter().map(|s| step_json(s, None, replayer.corpus())).collect::<Vec<_>>(),
        "sites": sites,
        "seconds_per_step": number(flight.seconds_per_step),
        "trainable_parameters": flight.trainable,
        "base_bytes": flight.base_bytes,
        "peak_memory_bytes": flight.peak_memory,
        "findings": findings,
    })
}
