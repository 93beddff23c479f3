//! Who listens to a replay while it runs.

use super::StepRecord;
use crate::Result;
use crate::device::Device;
use crate::probe::{Measurement, Probes};
use crate::step::TrainState;

/// Told of every step of a replay.
pub trait Observer {
    /// A step is done (or was found among the remembered ones).
    ///
    /// # Errors
    /// Stops the replay.
    fn step(&mut self, _record: &StepRecord) -> Result<()> {
        Ok(())
    }
    /// How closely the pass of `step` is measured. Anything but off runs the step even if its result is known.
    fn probes(&mut self, _step: u64) -> Probes {
        Probes::Off
    }
    /// What was measured at `step`.
    ///
    /// # Errors
    /// Stops the replay.
    fn measured(&mut self, _step: u64, _measurements: &[Measurement]) -> Result<()> {
        Ok(())
    }
    /// The state after a step, when [`Observer::wants_state`] said so.
    ///
    /// # Errors
    /// Stops the replay.
    fn state(&mut self, _device: &dyn Device, _state: &TrainState) -> Result<()> {
        Ok(())
    }
    /// Whether [`Observer::state`] is to be called after `step`; such a step runs even if its result is known.
    fn wants_state(&mut self, _step: u64) -> bool {
        false
    }
}

/// Observes nothing.
pub struct Silent;

impl Observer for Silent {}
