//! What a state depends on, as a hash that grows step by step.
//!
//! The key of step s is the hash of the key of step s − 1 and of everything step s adds: its rows and labels, its
//! normalisers, its learning rate, its noise and flips. It is known before anything runs, so two experiments that
//! agree up to a step find each other's snapshots, and one that parts from them never does.

use std::path::Path;
use std::time::UNIX_EPOCH;

use sha2::{Digest, Sha256};

use super::scene::{Scene, Segment};
use super::{FlipTarget, Intervention, Start};
use crate::batches::Window;
use crate::model::{Dropout, Masks, Memory, PassOptions};
use crate::step::TrainState;
use crate::{Error, Result};

/// Key of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; 32]);

impl Key {
    /// Key of the state before the first step: model, precision, machine, and the state's own bits.
    ///
    /// # Errors
    /// Model files that cannot be examined.
    pub fn of_start(scene: &Scene, start: &Start, state: &TrainState) -> Result<Self> {
        let device = scene.engine.device();
        let mut hash = Sha256::new();
        hash.update(program_identity());
        hash.update(device.fingerprint());
        hash.update(model_identity(&scene.run.path(&scene.run.config.model_name_or_path))?);
        hash.update(format!("{:?}|{start:?}|{}", scene.engine.plan(), state.adapter.scaling));
        hash.update(state.digest(device)?);
        Ok(Self(hash.finalize().into()))
    }

    /// Key of the state after one more step.
    pub fn then(
        &self,
        scene: &Scene,
        segment: &Segment,
        window: &Window,
        options: &PassOptions,
        interventions: &[Intervention],
        scheduled: Option<&[f64]>,
    ) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        hash.update(window.step.to_le_bytes());
        for unit in &window.micro_batches {
            hash.update(format!("{:?}{}", unit.fetched, unit.rank));
            for &example in &unit.examples {
                let example = &scene.corpus.train[example];
                hash.update(bytemuck::cast_slice::<u32, u8>(&example.input_ids));
                hash.update(bytemuck::cast_slice::<i32, u8>(&example.labels));
            }
        }
        let rules = &segment.rules;
        hash.update(format!("{:?}{:?}{}", rules.optimizer, rules.loss, rules.max_grad_norm));
        hash.update(format!("{:?}{}", rules.logged_learning_rate, rules.skip_advances_schedule));
        hash.update(format!("{}{}{}", rules.nan_filter, rules.logging_steps, rules.logging_first_step));
        // Where no step can be skipped the learning rate is known in advance; else the whole schedule stands for it.
        match scheduled {
            Some(rates) => hash.update(format!("{rates:?}")),
            None => hash.update(format!("{:?}", rules.schedule)),
        }
        hash.update(format!("{:?}{:?}", options.perturb, options.weight_flips));
        // Where generators stand follows from the state at the start and from the steps since.
        hash.update(match &options.dropout {
            Some(Dropout { p, masks: Masks::Torch(masks) }) => format!("{p} {:?}", masks.units),
            drawn => format!("{drawn:?}"),
        });
        hash.update(format!("{}", options.grouped_attention));
        // On a GPU the shape of a product decides how it is computed.
        hash.update(format!("{}", options.memory == Memory::MicroBatches));
        for intervention in interventions {
            let here = match intervention {
                Intervention::ResetOptimizer { before_step } => *before_step == window.step,
                Intervention::FlipBit(flip) => flip.step == window.step && flip.target != FlipTarget::BaseTransient,
                Intervention::ScaleLearningRate(_) => scheduled.is_none(),
                Intervention::HoldLearningRate { from_step, .. } => scheduled.is_none() && window.step >= *from_step,
                _ => false,
            };
            if here {
                hash.update(format!("{intervention:?}"));
            }
        }
        Self(hash.finalize().into())
    }

    /// From here on another scene computes.
    pub fn switched(&self, scene: &Scene) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        hash.update(format!("switch{:?}{}{}", scene.engine.plan(), scene.base_ratio, scene.schedule_changed));
        Self(hash.finalize().into())
    }

    /// After a resume that changed the state.
    pub fn resumed(&self, kept: bool, rates: &[f64]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        hash.update(format!("resume{kept}{rates:?}"));
        Self(hash.finalize().into())
    }

    /// Hexadecimal, for file names.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// Version, size and time of this program: another build may compute other bits.
pub(super) fn program_identity() -> String {
    let about = std::env::current_exe().and_then(std::fs::metadata).ok();
    let time = about.as_ref().and_then(|a| a.modified().ok()).and_then(|t| t.duration_since(UNIX_EPOCH).ok());
    format!("{} {:?} {:?}", env!("CARGO_PKG_VERSION"), about.map(|a| a.len()), time.map(|t| t.as_nanos()))
}

/// Names, sizes and times of the weight files, and the configuration's text: what changes when a model is replaced,
/// without reading gigabytes.
pub(super) fn model_identity(folder: &Path) -> Result<String> {
    let unreadable = |e: std::io::Error| Error::input(format!("cannot be listed: {e}")).at_path(folder);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") || name == "config.json" {
            let about = std::fs::metadata(entry.path()).map_err(unreadable)?;
            let time = about.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
            files.push(format!("{name} {} {:?}", about.len(), time.map(|t| t.as_nanos())));
        }
    }
    files.sort();
    Ok(files.join("\n"))
}
