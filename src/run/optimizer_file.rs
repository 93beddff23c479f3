//! optimizer.pt, scheduler.pt, scaler.pt and rng_state.pth → plain values (contract 7.2).

use std::collections::HashMap;
use std::path::Path;

use super::pickle::View;
use super::torch_file::{TensorRecipe, TorchFile};
use super::{AdapterWeights, GeneratorFile, MatrixState, OptimizerConstants, OptimizerFile, ScalerFile, SchedulerFile};
use crate::{Error, Result};

/// Words of mt19937's state.
const STATE_WORDS: usize = 624;

impl OptimizerFile {
    /// Reads optimizer.pt and checks its tensors against the adapter's shapes.
    ///
    /// An optimizer without moments (SGD) has no states.
    ///
    /// # Errors
    /// Damaged file, missing entries, shapes that are not the adapter's.
    pub fn read(path: &Path, adapter: &AdapterWeights) -> Result<Self> {
        let mut file = TorchFile::open(path)?;
        let plan = Plan::of(file.pickle.root()).map_err(|e| e.at_path(path))?;
        if plan.states.is_empty() {
            return Ok(Self { states: Vec::new(), group_lr: plan.group_lr, constants: plan.constants });
        }
        let order = registration_order(&plan.groups, adapter.modules.len()).map_err(|e| e.at_path(path))?;
        let mut states = Vec::with_capacity(order.len());
        for (place, index) in order.into_iter().enumerate() {
            let module = &adapter.modules[place / 2];
            let shape = if place % 2 == 0 { [module.rank, module.fan_in] } else { [module.fan_out, module.rank] };
            let name = format!("{}.lora_{}", module.path, if place % 2 == 0 { 'A' } else { 'B' });
            let recipe = plan
                .states
                .get(&index)
                .ok_or_else(|| Error::input(format!("state {index} is missing")).at(&name).at_path(path))?;
            states.push(recipe.read(&mut file, &name, shape)?);
        }
        Ok(Self { states, group_lr: plan.group_lr, constants: plan.constants })
    }
}

/// What the pickle says before any tensor is read.
struct Plan {
    groups: Vec<Vec<i64>>,
    group_lr: Vec<f64>,
    constants: OptimizerConstants,
    states: HashMap<i64, StateRecipe>,
}

struct StateRecipe {
    step: StepRecipe,
    exp_avg: TensorRecipe,
    exp_avg_sq: TensorRecipe,
}

/// `step` is a tensor since torch 1.12, a number before.
enum StepRecipe {
    Number(f64),
    Tensor(TensorRecipe),
}

impl Plan {
    fn of(root: View<'_>) -> Result<Self> {
        let broken = |what: &str| {
            Error::input(format!("not an optimizer state: {what}"))
                .next("DeepSpeed keeps its state elsewhere (global_step*/); use a checkpoint of the plain Trainer")
        };
        let groups = root.get("param_groups").and_then(View::elements).ok_or_else(|| broken("no param_groups"))?;
        let mut plan = Self {
            groups: Vec::new(),
            group_lr: Vec::new(),
            constants: OptimizerConstants::default(),
            states: HashMap::new(),
        };
        let mut constants: Option<OptimizerConstants> = None;
        for group in groups {
            let indices =
                group.get("params").and_then(View::elements).ok_or_else(|| broken("a group without params"))?;
            if !indices.is_empty() {
                let here = OptimizerConstants::of(group)?;
                if constants.is_some_and(|first| first != here) {
                    return Err(Error::refused("its parameter groups have different betas, eps or weight_decay")
                        .at("param_groups")
                        .next("only learning rates may differ between groups (LoRA+)"));
                }
                constants = Some(here);
            }
            plan.groups.push(indices.into_iter().filter_map(View::as_i64).collect());
            plan.group_lr.push(group.get("lr").and_then(View::as_f64).ok_or_else(|| broken("a group without lr"))?);
        }
        plan.constants = constants.unwrap_or_default();
        let states = root.get("state").and_then(View::entries).ok_or_else(|| broken("no state"))?;
        for (index, state) in states {
            let index = index.as_i64().ok_or_else(|| broken("a state without an index"))?;
            if let Some(recipe) = StateRecipe::of(state) {
                plan.states.insert(index, recipe);
            }
        }
        Ok(plan)
    }
}

impl OptimizerConstants {
    /// # Errors
    /// Variants of Adam that nothing here computes.
    fn of(group: View<'_>) -> Result<Self> {
        for flag in ["amsgrad", "maximize", "nesterov", "momentum"] {
            if group.get(flag).and_then(View::as_f64).is_some_and(|value| value != 0.0) {
                return Err(Error::refused(format!("{flag} is not covered"))
                    .at("param_groups")
                    .next("replay from a checkpoint of torch's plain AdamW or SGD, or from initial"));
            }
        }
        let float = |key: &str| group.get(key).and_then(View::as_f64);
        let betas: Option<Vec<f64>> = group.get("betas").and_then(View::elements).and_then(|b| {
            let floats: Option<Vec<f64>> = b.into_iter().map(View::as_f64).collect();
            floats.filter(|f| f.len() == 2)
        });
        Ok(Self {
            betas: betas.map(|b| [b[0], b[1]]),
            eps: float("eps"),
            weight_decay: float("weight_decay"),
            fused: group.get("fused").and_then(View::as_i64).map(|flag| flag != 0),
        })
    }
}

impl StateRecipe {
    /// `None`: an entry without Adam's moments.
    fn of(state: View<'_>) -> Option<Self> {
        let step = state.get("step")?;
        Some(Self {
            step: match step.as_f64() {
                Some(number) => StepRecipe::Number(number),
                None => StepRecipe::Tensor(TensorRecipe::of(step)?),
            },
            exp_avg: TensorRecipe::of(state.get("exp_avg")?)?,
            exp_avg_sq: TensorRecipe::of(state.get("exp_avg_sq")?)?,
        })
    }

    fn read(&self, file: &mut TorchFile, name: &str, shape: [usize; 2]) -> Result<MatrixState> {
        for (what, recipe) in [("exp_avg", &self.exp_avg), ("exp_avg_sq", &self.exp_avg_sq)] {
            if recipe.shape != shape {
                return Err(Error::input(format!("{what} has shape {:?}, the adapter {shape:?}", recipe.shape))
                    .at(name)
                    .at_path(file.path())
                    .next("optimizer.pt and adapter_model.safetensors are not of the same run"));
            }
        }
        Ok(MatrixState {
            step: self.step.read(file, name)?,
            exp_avg: file.tensor(&self.exp_avg, name)?.values,
            exp_avg_sq: file.tensor(&self.exp_avg_sq, name)?.values,
        })
    }
}

impl StepRecipe {
    fn read(&self, file: &mut TorchFile, name: &str) -> Result<f64> {
        match self {
            StepRecipe::Number(number) => Ok(*number),
            StepRecipe::Tensor(recipe) => {
                let first = file.tensor(recipe, name)?.values.first().copied();
                first.map(f64::from).ok_or_else(|| Error::input("an empty step counter").at(name).at_path(file.path()))
            }
        }
    }
}

/// Adam's count of updates of state 0; `None` where there are no moments.
///
/// # Errors
/// Damaged file.
pub fn read_update_count(path: &Path) -> Result<Option<f64>> {
    let mut file = TorchFile::open(path)?;
    let plan = Plan::of(file.pickle.root()).map_err(|e| e.at_path(path))?;
    plan.states.get(&0).map(|state| state.step.read(&mut file, "state 0")).transpose()
}

/// State indices in the order A, B of each module. One group of all matrices keeps registration order; LoRA+ has
/// all A first, then all B (contract 6.5).
fn registration_order(groups: &[Vec<i64>], modules: usize) -> Result<Vec<i64>> {
    let all: Vec<i64> = groups.concat();
    if all.len() != 2 * modules {
        return Err(Error::input(format!("the optimizer holds {} tensors, the adapter {}", all.len(), 2 * modules))
            .next("optimizer.pt and adapter_model.safetensors are not of the same run"));
    }
    let plus = groups.first().is_some_and(|g| g.len() == modules) && modules > 0;
    if !plus {
        return Ok(all);
    }
    Ok((0..modules).flat_map(|m| [all[m], all[modules + m]]).collect())
}

impl SchedulerFile {
    /// Reads scheduler.pt.
    ///
    /// # Errors
    /// Damaged file or missing entries.
    pub fn read(path: &Path) -> Result<Self> {
        let file = TorchFile::open(path)?;
        let root = file.pickle.root();
        let floats =
            |key: &str| -> Option<Vec<f64>> { root.get(key)?.elements()?.into_iter().map(View::as_f64).collect() };
        let parse = || {
            Some(Self {
                base_lrs: floats("base_lrs")?,
                last_epoch: u64::try_from(root.get("last_epoch")?.as_i64()?).ok()?,
                last_lr: floats("_last_lr")?,
            })
        };
        parse().ok_or_else(|| Error::input("not the state of a LambdaLR schedule").at_path(path))
    }
}

impl ScalerFile {
    /// Reads scaler.pt.
    ///
    /// # Errors
    /// Damaged file or missing entries.
    pub fn read(path: &Path) -> Result<Self> {
        let file = TorchFile::open(path)?;
        let root = file.pickle.root();
        let float = |key: &str| root.get(key)?.as_f64();
        let whole = |key: &str| u64::try_from(root.get(key)?.as_i64()?).ok();
        let parse = || {
            Some(Self {
                scale: float("scale")?,
                growth_factor: float("growth_factor")?,
                backoff_factor: float("backoff_factor")?,
                growth_interval: whole("growth_interval")?,
                growth_tracker: whole("_growth_tracker")?,
            })
        };
        parse().ok_or_else(|| {
            Error::input("not the state of a GradScaler").at_path(path).next("a disabled scaler saves nothing to read")
        })
    }
}

impl GeneratorFile {
    /// Reads rng_state.pth: torch's CPU generator as `CPUGeneratorImplStateLegacy` lays it out (contract 7.2).
    ///
    /// # Errors
    /// Damaged file, no `cpu` entry.
    pub fn read(path: &Path) -> Result<Self> {
        let mut file = TorchFile::open(path)?;
        let recipe = file.pickle.root().get("cpu").and_then(TensorRecipe::of);
        let recipe = recipe.ok_or_else(|| Error::input("no state of the CPU generator").at("cpu").at_path(path))?;
        let bytes = file.storage(&recipe)?;
        // Seed u64, left i32, seeded i32, next u64, then the words, u64 each.
        let wide = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let parse = || {
            let state = (0..STATE_WORDS).map(|i| Some(wide(24 + 8 * i)? as u32)).collect::<Option<Vec<u32>>>()?;
            let next = usize::try_from(wide(16)?).ok().filter(|&next| next <= STATE_WORDS)?;
            // A generator that has made no number since it was seeded has one number left, of a state yet to be twisted.
            let left = wide(8)? as u32;
            let next = if left == 1 { STATE_WORDS } else { next };
            Some(Self { seed: wide(0)?, state, next, on_gpu: false })
        };
        let mut found =
            parse().ok_or_else(|| Error::input("the generator's state is short").at("cpu").at_path(path))?;
        found.on_gpu = file.pickle.root().get("cuda").is_some();
        Ok(found)
    }
}
