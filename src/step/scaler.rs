//! Dynamic loss scaling as torch.amp.GradScaler does it (contract 4.6).
//!
//! Owns the scale and its growth; which steps it applies to is decided by the precision plan.

use crate::run::ScalerFile;

/// torch.amp.GradScaler's state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradScaler {
    pub scale: f64,
    pub growth_factor: f64,
    pub backoff_factor: f64,
    pub growth_interval: u64,
    /// Steps without a non-finite gradient since the scale last changed.
    pub growth_tracker: u64,
}

impl Default for GradScaler {
    /// PyTorch's defaults; accelerate passes none of its own.
    fn default() -> Self {
        Self { scale: 65536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000, growth_tracker: 0 }
    }
}

impl From<&ScalerFile> for GradScaler {
    fn from(file: &ScalerFile) -> Self {
        Self {
            scale: file.scale,
            growth_factor: file.growth_factor,
            backoff_factor: file.backoff_factor,
            growth_interval: file.growth_interval,
            growth_tracker: file.growth_tracker,
        }
    }
}

impl GradScaler {
    /// Factor that unscales gradients: the reciprocal taken in f64, then rounded.
    pub fn inverse(&self) -> f32 {
        (1.0 / self.scale) as f32
    }

    /// scaler.update(): `found_inf` when any unscaled gradient element was not finite (that step is skipped).
    pub fn update(&mut self, found_inf: bool) {
        if found_inf {
            self.scale = f64::from((self.scale * self.backoff_factor) as f32);
            self.growth_tracker = 0;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker == self.growth_interval {
            let grown = (self.scale * self.growth_factor) as f32;
            // amp_update_scale_ keeps the old scale rather than grow to infinity.
            if grown.is_finite() {
                self.scale = f64::from(grown);
            }
            self.growth_tracker = 0;
        }
    }
}
