//! Single passes at states of the run: gradients in every precision against the reference, the loss scale that
//! fails, and what Adam's update would do to weights of another dtype.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::measure::{ErrorSums, Lost, adam_direction, half_lost_below};
use super::reference::Reference;
use super::trajectory::plan;
use super::{GradientError, LostUpdates, ScaleLimit};
use crate::device::hooked::Hooked;
use crate::device::{DType, Device};
use crate::model::{Adapter, BaseModel, Engine, Gradients, PassOptions, PassOutput, PrecisionPlan, Projection, Ragged};
use crate::probe::{Part, Probes, Role, Site};
use crate::replay::Replayer;
use crate::step::{Rule, TrainState};
use crate::{Error, Result};

/// Gradients of one precision against the reference.
pub struct Compared {
    pub total: GradientError,
    pub matrices: Vec<(String, GradientError)>,
    pub milliseconds: f64,
}

/// Scale of fp16's backward pass in the comparison: GradScaler's first (torch default), halved until it fits.
const FIRST_SCALE: f64 = 65536.0;
/// Largest finite fp16 number.
pub const FP16_MAX: f64 = 65504.0;
/// Multiply-adds that the reference may spend on one window; beyond it only the first micro-batches are compared.
const REFERENCE_BUDGET: f64 = 2e10;

/// A window with the seeds of its losses.
struct Work<'s> {
    state: &'s TrainState,
    /// The state's, in the dtype that is looked at.
    adapter: Adapter,
    batch: Ragged,
    seeds: Vec<f32>,
}

fn work<'s>(replayer: &Replayer, state: &'s TrainState) -> Result<Work<'s>> {
    let scene = replayer.scene();
    let segment =
        scene.segment(state.step).ok_or_else(|| Error::internal(format!("no segment for step {}", state.step)))?;
    let mut micro_batches = segment.plan.window(state.step)?.micro_batches;
    let weights: usize =
        state.adapter.modules.len().max(1) * scene.engine.config().hidden * scene.engine.config().intermediate;
    let mut tokens = 0f64;
    let within = micro_batches.iter().position(|m| {
        tokens += m.examples.iter().map(|&e| scene.corpus.train[e].input_ids.len()).sum::<usize>() as f64;
        tokens * weights as f64 * 3.0 > REFERENCE_BUDGET
    });
    micro_batches.truncate(within.unwrap_or(micro_batches.len()).max(1));
    let batch = Ragged::of(&scene.corpus, &micro_batches)?;
    let labels = batch.unit_labels.windows(2).map(|w| (w[1] - w[0]) as u64);
    let seeds = micro_batches.iter().zip(labels).map(|(m, c)| segment.rules.loss.of(&m.fetched, c).seed).collect();
    Ok(Work { state, adapter: state.adapter.clone(), batch, seeds })
}

impl Work<'_> {
    /// The same with the adapter's matrices, and so its gradients, in `dtype`.
    fn with_adapter(&self, device: &dyn Device, dtype: DType) -> Result<Self> {
        let mut adapter = self.adapter.clone();
        for matrix in adapter.matrices_mut() {
            *matrix = device.cast(matrix, dtype)?;
        }
        adapter.dtype = dtype;
        Ok(Self { adapter, batch: self.batch.clone(), seeds: self.seeds.clone(), ..*self })
    }

    /// Gradients per matrix, loss scale included.
    fn pass(&self, engine: &Engine, scale: f64, probes: Probes) -> Result<(Vec<Vec<f32>>, PassOutput)> {
        let device = engine.device();
        let seeds: Vec<f32> = self.seeds.iter().map(|s| s * scale as f32).collect();
        let mut gradients = Gradients::zeros(device, &self.adapter)?;
        let options = PassOptions { probes, ..PassOptions::default() };
        let output = engine.pass(&self.adapter, &self.batch, &seeds, &options, &mut gradients)?;
        let values = gradients.tensors.iter().map(|t| device.download(t)).collect::<Result<_>>()?;
        Ok((values, output))
    }
}

fn nonfinite(gradients: &[Vec<f32>]) -> u64 {
    gradients.iter().flatten().filter(|g| !g.is_finite()).count() as u64
}

/// The run's base model on a device in a precision.
fn engine(replayer: &Replayer, device: Arc<dyn Device>, plan: PrecisionPlan) -> Result<Engine> {
    let run = replayer.run();
    let base = Arc::new(BaseModel::open(&run.path(&run.config.model_name_or_path))?);
    Engine::new(device, base, plan)
}

/// Windows whose adapters have a dtype, and their reference gradients, matrix by matrix.
type AtDtype<'s> = (DType, Vec<Work<'s>>, Vec<Vec<Vec<f32>>>);

/// Every precision at every state.
///
/// # Errors
/// Those of the passes.
pub fn gradients(
    replayer: &Replayer,
    states: &[TrainState],
    precisions: &[String],
    told: &dyn Fn(&str),
) -> Result<Vec<Compared>> {
    let device = replayer.shared_device();
    let reference = engine(
        replayer,
        Arc::new(Hooked { inner: Arc::clone(&device), hook: Arc::new(Reference) }),
        PrecisionPlan::F32,
    )?;
    told("reference gradients with f64 accumulation");
    let works = states.iter().map(|s| work(replayer, s)).collect::<Result<Vec<_>>>()?;
    // A precision's error is that of its arithmetic, at the weights it can hold: by dtype of the adapter.
    let mut at_dtype: Vec<AtDtype<'_>> = Vec::new();
    let mut all = Vec::new();
    for name in precisions {
        let plan = plan(replayer.run().precision()?.plan, name);
        if !at_dtype.iter().any(|(dtype, ..)| *dtype == plan.adapter) {
            let held = works.iter().map(|w| w.with_adapter(&*device, plan.adapter)).collect::<Result<Vec<_>>>()?;
            let wide = held.iter().map(|w| w.with_adapter(&*device, DType::F32)?.pass(&reference, 1.0, Probes::Off));
            let exact = wide.map(|pass| Ok(pass?.0)).collect::<Result<_>>()?;
            at_dtype.push((plan.adapter, held, exact));
        }
        told(&format!("{name}: gradients"));
        let engine = engine(replayer, Arc::clone(&device), plan)?;
        if let Some((_, works, exact)) = at_dtype.iter().find(|(dtype, ..)| *dtype == plan.adapter) {
            all.push(compare(&engine, name, works, exact)?);
        }
    }
    Ok(all)
}

fn compare(engine: &Engine, name: &str, works: &[Work<'_>], exact: &[Vec<Vec<f32>>]) -> Result<Compared> {
    let count = exact.first().map_or(0, Vec::len);
    let mut matrices = vec![ErrorSums::default(); count];
    let mut milliseconds = 0.0;
    for (work, exact) in works.iter().zip(exact) {
        let mut scale = if name == "fp16" { FIRST_SCALE } else { 1.0 };
        let began = Instant::now();
        let mut values = work.pass(engine, scale, Probes::Off)?.0;
        milliseconds += began.elapsed().as_secs_f64() * 1e3 / works.len() as f64;
        // As the scaler would: halve until the gradient is finite.
        while name == "fp16" && nonfinite(&values) > 0 && scale > 1.0 {
            scale /= 2.0;
            values = work.pass(engine, scale, Probes::Off)?.0;
        }
        for ((sums, values), exact) in matrices.iter_mut().zip(&values).zip(exact) {
            sums.add(&ErrorSums::of(values, exact, 1.0 / scale));
        }
    }
    let mut total = ErrorSums::default();
    matrices.iter().for_each(|m| total.add(m));
    let names = works.first().map_or(vec![], |w| matrix_names(w.state));
    let matrices = names.into_iter().zip(matrices.iter().map(ErrorSums::error)).collect();
    Ok(Compared { total: total.error(), matrices, milliseconds })
}

fn matrix_names(state: &TrainState) -> Vec<String> {
    let of = |path: &str| [format!("{path} lora_A"), format!("{path} lora_B")];
    state.adapter.modules.iter().flat_map(|m| of(&m.projection.path(m.layer))).collect()
}

/// Predicts the loss scale at which fp16's backward pass overflows, and tries half and twice of it.
///
/// A backward tensor grows in proportion to the scale, so the scale that fails is 65504 over the largest magnitude
/// at a scale of 1 (times alpha / r where the tensor enters a LoRA branch).
///
/// # Errors
/// Those of the passes.
pub fn scale_limit(replayer: &Replayer, states: &[TrainState]) -> Result<ScaleLimit> {
    let own = replayer.run().precision()?.plan;
    let half = engine(replayer, replayer.shared_device(), plan(own, "fp16_unscaled"))?;
    let mut lowest: Option<(f64, String, &TrainState)> = None;
    let mut by_site: BTreeMap<String, f64> = BTreeMap::new();
    for state in states {
        let (values, output) = work(replayer, state)?.pass(&half, 1.0, Probes::PerSite)?;
        if nonfinite(&values) > 0 {
            let broken =
                output.measurements.iter().find(|m| m.statistics.nan + m.statistics.pos_inf + m.statistics.neg_inf > 0);
            let site = broken.map(|m| m.site.to_string());
            return Ok(ScaleLimit {
                fails_at: None,
                site,
                step: state.step,
                confirmed: false,
                at_half: 0,
                at_twice: 0,
                sites: Vec::new(),
            });
        }
        for m in output.measurements.iter().filter(|m| m.site.is_backward() && m.dtype == DType::F16) {
            let fails = FP16_MAX / (f64::from(m.statistics.max_abs) * branch(state, m.site));
            if !fails.is_finite() {
                continue;
            }
            let known = by_site.entry(m.site.to_string()).or_insert(fails);
            *known = known.min(fails);
            if lowest.as_ref().is_none_or(|(l, _, _)| fails < *l) {
                lowest = Some((fails, m.site.to_string(), state));
            }
        }
    }
    let (fails_at, site, state) = lowest.ok_or_else(|| Error::internal("no backward site was measured"))?;
    let work = work(replayer, state)?;
    let at_half = nonfinite(&work.pass(&half, fails_at / 2.0, Probes::Off)?.0);
    let at_twice = nonfinite(&work.pass(&half, fails_at * 2.0, Probes::Off)?.0);
    let confirmed = at_half == 0 && at_twice > 0;
    let mut sites: Vec<(String, f64)> = by_site.into_iter().collect();
    sites.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(ScaleLimit { fails_at: Some(fails_at), site: Some(site), step: state.step, confirmed, at_half, at_twice, sites })
}

/// Factor on a site's magnitude that the LoRA branch puts on it before the next product: the gradient of an adapted
/// linear's output is multiplied by alpha / r and rounded to fp16 on its way to B.
fn branch(state: &TrainState, site: Site) -> f64 {
    let adapted =
        |layer: usize, of: Projection| state.adapter.modules.iter().any(|m| m.layer == layer && m.projection == of);
    match (site.layer, site.part, site.role) {
        (Some(layer), Part::Projection(of), Role::OutputGrad) if adapted(layer, of) => {
            f64::from(state.adapter.scaling).max(1.0)
        }
        _ => 1.0,
    }
}

/// Multiples of the run's learning rate at which lost updates are counted.
const FACTORS: [f64; 7] = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

/// Shares of updates lost to rounding at the last state, by adapter dtype and learning rate; and the run's own rate.
///
/// # Errors
/// Those of the device.
pub fn lost_updates(replayer: &Replayer, states: &[TrainState]) -> Result<(Vec<LostUpdates>, f64)> {
    let Some(state) = states.last() else { return Ok((vec![], f64::NAN)) };
    let scene = replayer.scene();
    let Some(segment) = scene.segment(state.step) else { return Ok((vec![], f64::NAN)) };
    let rate = segment.config.learning_rate;
    let Rule::AdamW { beta1, beta2, epsilon, .. } = segment.rules.optimizer.rule else { return Ok((vec![], rate)) };
    let device = scene.engine.device();
    let (mut weights, mut directions, mut ends) = (Vec::new(), Vec::new(), Vec::new());
    for (matrix, moments) in state.adapter.matrices().zip(&state.moments) {
        weights.extend(device.download(matrix)?);
        let (m, v) = (device.download(&moments.exp_avg)?, device.download(&moments.exp_avg_sq)?);
        directions.extend(adam_direction(&m, &v, (beta1, beta2), epsilon, moments.updates));
        ends.push(weights.len());
    }
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let parts: Vec<(String, Range<usize>)> =
        matrix_names(state).into_iter().zip(starts.zip(&ends).map(|(start, &end)| start..end)).collect();
    let row = |(name, dtype): (&str, DType)| LostUpdates {
        dtype: name.into(),
        by_learning_rate: FACTORS
            .iter()
            .map(|f| (f * rate, Lost::count(&weights, &directions, f * rate, dtype).share()))
            .collect(),
        half_lost_below: half_lost_below(&weights, &directions, dtype),
        by_matrix: parts
            .iter()
            .map(|(name, part)| {
                (name.clone(), half_lost_below(&weights[part.clone()], &directions[part.clone()], dtype))
            })
            .collect(),
    };
    let dtypes = [("fp32", DType::F32), ("bf16", DType::BF16), ("fp16", DType::F16)];
    Ok((dtypes.into_iter().map(row).collect(), rate))
}
