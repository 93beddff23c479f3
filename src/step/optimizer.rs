//! AdamW and SGD over the adapter: parameter groups, state, one update (contract 6.2, 6.3, 6.5).
//!
//! Owns which matrix belongs to which group and the moments; the arithmetic of one tensor is the device's.

use crate::device::{AdamW, Device, Tensor, Update, UpdateRule};
use crate::model::{Adapter, Gradients};
use crate::run::{OptimizerConstants, OptimizerFile, TrainConfig};
use crate::{Error, Result};

/// Moments of one matrix, in its shape and dtype.
#[derive(Debug, Clone)]
pub struct Moments {
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// Updates this matrix has had (`step` of the state).
    pub updates: f64,
}

/// The update rule of a run and its constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    AdamW {
        beta1: f64,
        beta2: f64,
        epsilon: f64,
        /// One kernel per tensor (adamw_torch_fused).
        fused: bool,
    },
    /// torch.optim.SGD without momentum, as the trainer makes it.
    Sgd,
}

/// Rule and groups of a run. It travels with the state: a resume keeps the constants of the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Optimizer {
    pub rule: Rule,
    pub weight_decay: f64,
    /// LoRA+: B matrices form a group of their own with this multiple of the learning rate.
    pub b_ratio: Option<f64>,
}

impl Optimizer {
    /// # Errors
    /// [`crate::error::Kind::Refused`] for an optimizer that contract 6 does not cover.
    pub fn new(config: &TrainConfig) -> Result<Self> {
        let rule = match config.optim.as_str() {
            "adamw_torch" | "adamw_torch_fused" => Rule::AdamW {
                beta1: config.adam_beta1,
                beta2: config.adam_beta2,
                epsilon: config.adam_epsilon,
                fused: config.optim == "adamw_torch_fused",
            },
            "sgd" => Rule::Sgd,
            other => {
                return Err(Error::refused(format!("optimizer `{other}` is not covered"))
                    .at("optim")
                    .next("replay with --set optim=adamw_torch to see what AdamW would have done"));
            }
        };
        Ok(Self { rule, weight_decay: config.weight_decay, b_ratio: config.loraplus_lr_ratio })
    }

    /// With the constants that a checkpoint stored: torch's load_state_dict puts the file's groups in the place of
    /// the new ones, so that betas, eps and weight_decay of a resumed run's configuration have no effect.
    #[must_use]
    pub fn loaded(mut self, stored: &OptimizerConstants) -> Self {
        if let Rule::AdamW { beta1, beta2, epsilon, fused } = &mut self.rule {
            [*beta1, *beta2] = stored.betas.unwrap_or([*beta1, *beta2]);
            *epsilon = stored.eps.unwrap_or(*epsilon);
            *fused = stored.fused.unwrap_or(*fused);
        }
        self.weight_decay = stored.weight_decay.unwrap_or(self.weight_decay);
        self
    }

    /// Learning-rate multiple of each group; the first group's is what the trainer logs.
    pub fn group_ratios(&self) -> Vec<f64> {
        match self.b_ratio {
            Some(ratio) => vec![1.0, ratio],
            None => vec![1.0],
        }
    }

    /// Group of matrix `index` (A, B, A, B, … in registration order).
    fn group(&self, index: usize) -> usize {
        if self.b_ratio.is_some() { index % 2 } else { 0 }
    }

    /// Zero moments in the shapes of `adapter`; none for SGD.
    ///
    /// # Errors
    /// Those of the device.
    pub fn fresh(&self, device: &dyn Device, adapter: &Adapter) -> Result<Vec<Moments>> {
        if self.rule == Rule::Sgd {
            return Ok(Vec::new());
        }
        let zero = |w: &Tensor| device.zeros(&w.shape, adapter.dtype);
        adapter.matrices().map(|w| Ok(Moments { exp_avg: zero(w)?, exp_avg_sq: zero(w)?, updates: 0.0 })).collect()
    }

    /// The moments of optimizer.pt.
    ///
    /// # Errors
    /// When the file holds another number of states, or another shape.
    pub fn restore(&self, device: &dyn Device, adapter: &Adapter, file: &OptimizerFile) -> Result<Vec<Moments>> {
        if self.rule == Rule::Sgd {
            return Ok(Vec::new());
        }
        let matrices: Vec<&Tensor> = adapter.matrices().collect();
        if file.states.len() != matrices.len() {
            let what = format!("{} states for {} LoRA matrices", file.states.len(), matrices.len());
            return Err(Error::input(what).at("optimizer.pt").next("the file belongs to another adapter or optimizer"));
        }
        matrices
            .iter()
            .enumerate()
            .map(|(index, w)| {
                let state = &file.states[index];
                if state.exp_avg.len() != w.elements() || state.exp_avg_sq.len() != w.elements() {
                    let what = format!("{} elements for a matrix of shape {:?}", state.exp_avg.len(), w.shape);
                    return Err(Error::input(what)
                        .at(format!("optimizer.pt: matrix {index}"))
                        .next("the file belongs to another adapter, or was written by another PEFT"));
                }
                Ok(Moments {
                    exp_avg: device.upload(&state.exp_avg, &w.shape, adapter.dtype)?,
                    exp_avg_sq: device.upload(&state.exp_avg_sq, &w.shape, adapter.dtype)?,
                    updates: state.step,
                })
            })
            .collect()
    }

    /// One update of every matrix; `learning_rates` per group; gradients are multiplied by each of `factors` first.
    /// Returns ‖Δw‖₂ over the adapter.
    ///
    /// # Errors
    /// Those of the device.
    pub fn update(
        &self,
        device: &dyn Device,
        adapter: &mut Adapter,
        moments: &mut [Moments],
        gradients: &Gradients,
        learning_rates: &[f64],
        factors: [f32; 2],
    ) -> Result<f64> {
        let mut states = moments.iter_mut();
        let mut updates = Vec::with_capacity(gradients.tensors.len());
        for (index, (p, g)) in adapter.matrices_mut().zip(&gradients.tensors).enumerate() {
            let learning_rate = learning_rates[self.group(index)];
            let rule = match self.rule {
                Rule::Sgd => UpdateRule::Sgd { learning_rate, weight_decay: self.weight_decay },
                Rule::AdamW { beta1, beta2, epsilon, fused } => {
                    let state = states.next().ok_or_else(|| Error::internal("a matrix without moments"))?;
                    state.updates += 1.0;
                    let with = AdamW {
                        learning_rate,
                        beta1,
                        beta2,
                        epsilon,
                        weight_decay: self.weight_decay,
                        step: state.updates,
                        fused,
                    };
                    UpdateRule::AdamW { m: &mut state.exp_avg, v: &mut state.exp_avg_sq, with }
                }
            };
            updates.push(Update { p, g, rule });
        }
        device.update(&mut updates, factors)
    }
}
