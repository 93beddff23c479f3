//! Accumulate, unscale, clip, update, schedule, loss scale: one optimizer step from one window.

mod clip;
mod loss;
mod scaler;
mod schedule;

pub use clip::{Clip, clip, round};
pub use loss::{LossRules, Normaliser, RunningLoss};
pub use scaler::GradScaler;
pub use schedule::{Schedule, ScheduleSpec, warmup_steps};
