//! Everything that the next optimizer step depends on besides its window.
//!
//! Owns [`TrainState`]: cheap to clone (tensors are shared until written), so that a replay can keep many.

use sha2::{Digest, Sha256};

use super::{GradScaler, Moments, Optimizer, RunningLoss};
use crate::Result;
use crate::batches::Mt19937;
use crate::device::Device;
use crate::model::Adapter;

/// A training process between two optimizer steps.
#[derive(Debug, Clone)]
pub struct TrainState {
    /// Optimizer steps done (`global_step`).
    pub step: u64,
    pub adapter: Adapter,
    /// Update rule and constants in force. After a resume the checkpoint's, whatever the configuration says now.
    pub optimizer: Optimizer,
    /// Per matrix, in optimizer order; empty for SGD.
    pub moments: Vec<Moments>,
    /// Scheduler steps done (`last_epoch`); skipped fp16 steps may hold it back.
    pub schedule_steps: u64,
    /// Base learning rate of each group. After a resume the checkpoint's, whatever the configuration says now.
    pub base_learning_rates: Vec<f64>,
    /// Learning rate of the next step alone, per group: after a resume the one in optimizer.pt (contract 7.3).
    pub stored_learning_rates: Option<Vec<f64>>,
    /// Dynamic loss scale, where the plan has one.
    pub scaler: Option<GradScaler>,
    /// The trainer's loss since its last log line.
    pub running_loss: RunningLoss,
    /// Each rank's CPU generator, where it draws the masks of lora_dropout; else empty.
    pub generators: Vec<Mt19937>,
}

impl TrainState {
    /// Memory that the tensors take, f32 as the CPU holds them.
    pub fn bytes(&self) -> usize {
        let moments = self.moments.iter().flat_map(|m| [&m.exp_avg, &m.exp_avg_sq]);
        self.adapter.matrices().chain(moments).map(|t| 4 * t.elements()).sum()
    }

    /// SHA-256 over every bit of the state, for caches and for tests of determinism.
    ///
    /// # Errors
    /// Those of the device when tensors cannot be read back.
    pub fn digest(&self, device: &dyn Device) -> Result<String> {
        let mut hash = Sha256::new();
        hash.update(self.step.to_le_bytes());
        hash.update(self.schedule_steps.to_le_bytes());
        let moments = self.moments.iter().flat_map(|m| [&m.exp_avg, &m.exp_avg_sq]);
        for tensor in self.adapter.matrices().chain(moments) {
            hash.update(bytemuck::cast_slice::<f32, u8>(&device.download(tensor)?));
        }
        for moments in &self.moments {
            hash.update(moments.updates.to_le_bytes());
        }
        hash.update(format!("{:?}{:?}", self.base_learning_rates, self.stored_learning_rates));
        hash.update(format!("{:?}", self.optimizer));
        hash.update(format!("{:?}{:?}", self.scaler, self.running_loss));
        for (words, next) in self.generators.iter().map(Mt19937::parts) {
            hash.update(bytemuck::cast_slice::<u32, u8>(words));
            hash.update(next.to_le_bytes());
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}
