//! The LoRA matrices of a run on a device, and the gradients that belong to them.
//!
//! Owns their order (contract 6.5), scaling and initial values. Reading adapter files is `run`'s.

use super::{ModelConfig, Projection, select};
use crate::device::{DType, Device, Offsets, PendingNorms, Tensor};
use crate::run::{AdapterModule, AdapterWeights};
use crate::{Error, Result};

/// One adapted linear: y += scaling · B(A x).
#[derive(Debug, Clone)]
pub struct LoraModule {
    pub layer: usize,
    pub projection: Projection,
    /// [rank, in].
    pub a: Tensor,
    /// [out, rank].
    pub b: Tensor,
}

/// Every adapted linear in registration order.
#[derive(Debug, Clone)]
pub struct Adapter {
    pub modules: Vec<LoraModule>,
    /// alpha / r, or alpha / √r with rslora; PyTorch multiplies by it in f32.
    pub scaling: f32,
    /// Dtype of the matrices and of their gradients.
    pub dtype: DType,
    /// Index into `modules` by layer · 7 + projection.
    index: Vec<Option<usize>>,
}

impl Adapter {
    /// Moves matrices read from disk, or drawn by [`super::initial_weights`], to the device in `dtype`.
    ///
    /// # Errors
    /// Names the module whose path is not one of `targets` or whose shape does not fit the model, and the one that
    /// is missing.
    pub fn new(
        device: &dyn Device,
        config: &ModelConfig,
        targets: &[String],
        weights: &AdapterWeights,
        scaling: f64,
        dtype: DType,
    ) -> Result<Self> {
        let selected = select(targets, config)?;
        if weights.modules.len() != selected.len() {
            let what = format!("{} adapted modules, but lora_target selects {}", weights.modules.len(), selected.len());
            return Err(Error::input(what).at("adapter").next("check lora_target and the adapter's own configuration"));
        }
        let mut index = vec![None; config.layers * Projection::ALL.len()];
        let mut modules = Vec::with_capacity(selected.len());
        for (layer, projection) in selected {
            let path = projection.path(layer);
            let stored = weights.modules.iter().find(|m| m.path == path);
            let stored = stored.ok_or_else(|| Error::input("the adapter has no matrices for it").at(&path))?;
            check_shape(stored, projection.shape(config))?;
            index[layer * Projection::ALL.len() + projection as usize] = Some(modules.len());
            let a = device.upload(&stored.a, &[stored.rank, stored.fan_in], dtype)?;
            let b = device.upload(&stored.b, &[stored.fan_out, stored.rank], dtype)?;
            modules.push(LoraModule { layer, projection, a, b });
        }
        Ok(Self { modules, scaling: scaling as f32, dtype, index })
    }

    /// The matrices as f32 values, as a checkpoint would hold them.
    pub fn weights(&self, device: &dyn Device) -> Result<AdapterWeights> {
        let modules = self.modules.iter().map(|m| {
            Ok(AdapterModule {
                path: m.projection.path(m.layer),
                a: device.download(&m.a)?,
                b: device.download(&m.b)?,
                rank: m.a.shape[0],
                fan_in: m.a.shape[1],
                fan_out: m.b.shape[0],
            })
        });
        let stored = match self.dtype {
            DType::F32 => "F32",
            DType::BF16 => "BF16",
            DType::F16 => "F16",
        };
        Ok(AdapterWeights { modules: modules.collect::<Result<_>>()?, stored: stored.to_owned() })
    }

    /// A and B of each module in optimizer order.
    pub fn matrices(&self) -> impl Iterator<Item = &Tensor> {
        self.modules.iter().flat_map(|m| [&m.a, &m.b])
    }
    /// A and B of each module in optimizer order.
    pub fn matrices_mut(&mut self) -> impl Iterator<Item = &mut Tensor> {
        self.modules.iter_mut().flat_map(|m| [&mut m.a, &mut m.b])
    }

    /// Whether both have the same modules, shapes, scaling and dtype.
    fn is_shaped_like(&self, other: &Self) -> bool {
        let places = |adapter: &Self| adapter.modules.iter().map(|m| (m.layer, m.projection)).collect::<Vec<_>>();
        self.scaling == other.scaling
            && self.dtype == other.dtype
            && self.matrices().map(|m| &m.shape).eq(other.matrices().map(|m| &m.shape))
            && places(self) == places(other)
    }

    /// Whether they are the same, every weight bit for bit.
    ///
    /// # Errors
    /// Those of the device.
    pub fn equals(&self, other: &Self, device: &dyn Device) -> Result<bool> {
        if !self.is_shaped_like(other) {
            return Ok(false);
        }
        let bits = |x: &Tensor| Ok(device.download(x)?.iter().map(|w| w.to_bits()).collect::<Vec<_>>());
        for (one, other) in self.matrices().zip(other.matrices()) {
            if one.storage.identity() != other.storage.identity() && bits(one)? != bits(other)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Index and matrices of the module on this linear, if it is adapted.
    pub(super) fn at(&self, layer: usize, projection: Projection) -> Option<(usize, &LoraModule)> {
        let index = self.index.get(layer * Projection::ALL.len() + projection as usize).copied().flatten()?;
        Some((index, &self.modules[index]))
    }
}

fn check_shape(module: &AdapterModule, (fan_in, fan_out): (usize, usize)) -> Result<()> {
    let fits = module.fan_in == fan_in && module.fan_out == fan_out;
    let whole = module.a.len() == module.rank * fan_in && module.b.len() == fan_out * module.rank;
    if fits && whole {
        return Ok(());
    }
    let what = format!(
        "LoRA matrices for {} → {}, but the model's linear is {fan_in} → {fan_out}",
        module.fan_in, module.fan_out
    );
    Err(Error::input(what).at(&module.path).next("the adapter belongs to another base model"))
}

/// The accumulated gradient (`.grad`) of every matrix, in optimizer order, in the adapter's dtype.
#[derive(Debug, Clone)]
pub struct Gradients {
    pub tensors: Vec<Tensor>,
    /// Data-parallel rank of each unit of a pass; empty: there is one.
    ranks: Vec<usize>,
    /// What ranks 1, 2, … have accumulated of their own: they meet rank 0's when a window is complete.
    others: Vec<Vec<Tensor>>,
}

impl Gradients {
    /// Zeros in the shapes of `adapter`.
    pub fn zeros(device: &dyn Device, adapter: &Adapter) -> Result<Self> {
        Self::of_ranks(device, adapter, Vec::new())
    }

    /// The same for a pass whose units run on these data-parallel ranks: each accumulates its own, and the sum over ranks
    /// is added to `tensors` when the pass is done (DistributedDataParallel reduces once a window; its division by the
    /// number of ranks is in the seeds).
    pub fn of_ranks(device: &dyn Device, adapter: &Adapter, ranks: Vec<usize>) -> Result<Self> {
        let zeros = |_| adapter.matrices().map(|m| device.zeros(&m.shape, adapter.dtype)).collect::<Result<Vec<_>>>();
        let others = (1..=ranks.iter().copied().max().unwrap_or(0)).map(zeros).collect::<Result<_>>()?;
        Ok(Self { tensors: zeros(0)?, ranks, others })
    }

    /// Adds the gradients of several units from `first_unit` on, [units, rows, columns], to matrix `index`, one after
    /// another as autograd does. Returns the norm of each, which the device may still be working on.
    pub(super) fn add_units(
        &mut self,
        device: &dyn Device,
        index: usize,
        units: Tensor,
        first_unit: usize,
    ) -> Result<PendingNorms> {
        let (count, rows) = (units.shape[0], units.shape[1]);
        let offsets: Vec<usize> = (0..=count).map(|u| u * rows).collect();
        let norms = device.queue_norms(&units, &offsets as Offsets<'_>)?;
        if self.others.is_empty() {
            device.accumulate_units(&mut self.tensors[index], &units)?;
            return Ok(norms);
        }
        let flat = Tensor { shape: vec![count, units.elements() / count.max(1)], ..units };
        for (rank, own) in std::iter::once(&mut self.tensors).chain(&mut self.others).enumerate() {
            let of_rank = |unit: &u32| self.ranks.get(first_unit + *unit as usize) == Some(&rank);
            let chosen: Vec<u32> = (0..count as u32).filter(of_rank).collect();
            device.accumulate_units(&mut own[index], &device.gather_rows(&flat, &chosen)?)?;
        }
        Ok(norms)
    }

    /// Adds what the other ranks have accumulated.
    pub(super) fn reduce(&mut self, device: &dyn Device) -> Result<()> {
        for other in self.others.drain(..) {
            for (sum, own) in self.tensors.iter_mut().zip(&other) {
                device.accumulate(sum, own)?;
            }
        }
        Ok(())
    }
}
