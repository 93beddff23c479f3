//! Learning-rate schedules (contract 6.6): `lr = base · factor(s)`, s = scheduler steps taken before the update.
//!
//! Owns the factors, in f64 and in the order of operations of transformers/optimization.py, so that a logged
//! learning rate can be compared bit by bit. Where a replay stands in its schedule belongs to `TrainState`.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use serde_json::Value;

use crate::{Error, Result};

/// A schedule with its constants resolved.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    shape: Shape,
    /// W.
    warmup: u64,
    /// T: the trainer's max_steps.
    total: u64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Shape {
    Constant,
    ConstantWithWarmup,
    Linear,
    Cosine { cycles: f64 },
    CosineWithRestarts { cycles: f64 },
    Polynomial { end: f64, power: f64, base: f64 },
    CosineWithMinLr { cycles: f64, rate: f64 },
    InverseSqrt { timescale: Option<f64> },
    WarmupStableDecay { stable: f64, decay: f64, warmup_curve: Curve, decay_curve: Curve, min_ratio: f64, cycles: f64 },
}

/// Form of a ramp of warmup_stable_decay.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Curve {
    Linear,
    Cosine,
    OneMinusSqrt,
}

/// What a schedule is made from.
#[derive(Debug, Clone, Copy)]
pub struct ScheduleSpec<'a> {
    /// `lr_scheduler_type`.
    pub name: &'a str,
    /// `lr_scheduler_kwargs`.
    pub kwargs: &'a BTreeMap<String, Value>,
    /// `learning_rate`: polynomial and min_lr refer to it.
    pub base: f64,
    pub total: u64,
    pub warmup: u64,
}

/// Warmup steps W of a run of `total` steps (contract 1.1). `ratio_wins` is transformers 5: a given ratio replaces
/// `steps`, and either may be a fraction below 1; before it, steps > 0 win.
pub fn warmup_steps(steps: f64, ratio: Option<f64>, total: u64, ratio_wins: bool) -> u64 {
    let fraction_of_total = |value: f64| (total as f64 * value).ceil() as u64;
    if ratio_wins {
        let value = ratio.unwrap_or(steps);
        return if value >= 1.0 { value as u64 } else { fraction_of_total(value) };
    }
    if steps > 0.0 { steps as u64 } else { fraction_of_total(ratio.unwrap_or(0.0)) }
}

impl Schedule {
    /// # Errors
    /// [`crate::error::Kind::Refused`] for a schedule that contract 6.6 does not cover;
    /// [`crate::error::Kind::Input`] for kwargs the schedule does not take.
    pub fn new(spec: &ScheduleSpec<'_>) -> Result<Self> {
        let mut kwargs = Kwargs { values: spec.kwargs, used: Vec::new() };
        let shape = match spec.name {
            "constant" => Shape::Constant,
            "constant_with_warmup" => Shape::ConstantWithWarmup,
            "linear" => Shape::Linear,
            "cosine" => Shape::Cosine { cycles: kwargs.number("num_cycles")?.unwrap_or(0.5) },
            "cosine_with_restarts" => Shape::CosineWithRestarts { cycles: kwargs.number("num_cycles")?.unwrap_or(1.0) },
            "polynomial" => polynomial(&mut kwargs, spec.base)?,
            "cosine_with_min_lr" => min_lr(&mut kwargs, spec.base)?,
            "inverse_sqrt" => Shape::InverseSqrt { timescale: kwargs.number("timescale")? },
            "warmup_stable_decay" => stable_decay(&mut kwargs, spec)?,
            other => {
                return Err(Error::refused(format!("schedule `{other}` is not covered"))
                    .at("lr_scheduler_type")
                    .next("replay with one of constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, cosine_with_min_lr, inverse_sqrt, warmup_stable_decay"));
            }
        };
        // "constant" and "constant_with_warmup" are built without kwargs; the trainer ignores them too.
        if !matches!(shape, Shape::Constant | Shape::ConstantWithWarmup) {
            kwargs.all_used(spec.name)?;
        }
        Ok(Self { shape, warmup: spec.warmup, total: spec.total })
    }

    /// W: steps of linear warmup.
    pub fn warmup(&self) -> u64 {
        self.warmup
    }

    /// T: optimizer steps of the whole run.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Multiplier of the base learning rate after `s` scheduler steps.
    pub fn factor(&self, s: u64) -> f64 {
        let (warmup, total, at) = (self.warmup as f64, self.total as f64, s as f64);
        if let Shape::Constant = self.shape {
            return 1.0;
        }
        if s < self.warmup {
            let progress = at / warmup.max(1.0);
            return match self.shape {
                Shape::WarmupStableDecay { warmup_curve, min_ratio, .. } => {
                    (warmup_curve.rising(progress) * (1.0 - min_ratio) + min_ratio).max(0.0)
                }
                _ => progress,
            };
        }
        let progress = (at - warmup) / (total - warmup).max(1.0);
        match self.shape {
            Shape::Constant | Shape::ConstantWithWarmup => 1.0,
            Shape::Linear => ((total - at) / (total - warmup).max(1.0)).max(0.0),
            Shape::Cosine { cycles } => cosine(cycles, progress).max(0.0),
            Shape::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            Shape::CosineWithRestarts { cycles } => (0.5 * (1.0 + (PI * ((cycles * progress) % 1.0)).cos())).max(0.0),
            Shape::Polynomial { end, base, .. } if s > self.total => end / base,
            Shape::Polynomial { end, power, base } => {
                let remaining = 1.0 - (at - warmup) / (total - warmup);
                ((base - end) * remaining.powf(power) + end) / base
            }
            Shape::CosineWithMinLr { cycles, rate } => (cosine(cycles, progress) * (1.0 - rate) + rate).max(0.0),
            Shape::InverseSqrt { timescale } => {
                // timescale = num_warmup_steps or 10_000 (transformers get_inverse_sqrt_schedule).
                let timescale = timescale.unwrap_or(if self.warmup > 0 { warmup } else { 10_000.0 });
                1.0 / ((at + (timescale - warmup)) / timescale).sqrt()
            }
            Shape::WarmupStableDecay { stable, decay, decay_curve, min_ratio, cycles, .. } => {
                if at < warmup + stable {
                    1.0
                } else if at < warmup + stable + decay {
                    let progress = (at - warmup - stable) / decay.max(1.0);
                    (decay_curve.falling(progress, cycles) * (1.0 - min_ratio) + min_ratio).max(0.0)
                } else {
                    min_ratio
                }
            }
        }
    }
}

fn cosine(cycles: f64, progress: f64) -> f64 {
    0.5 * (1.0 + (PI * cycles * 2.0 * progress).cos())
}

impl Curve {
    fn rising(self, progress: f64) -> f64 {
        match self {
            Curve::Linear => progress,
            Curve::Cosine => 0.5 * (1.0 - (PI * progress).cos()),
            Curve::OneMinusSqrt => 1.0 - (1.0 - progress).sqrt(),
        }
    }
    fn falling(self, progress: f64, cycles: f64) -> f64 {
        match self {
            Curve::Linear => 1.0 - progress,
            Curve::Cosine => cosine(cycles, progress),
            Curve::OneMinusSqrt => 1.0 - progress.sqrt(),
        }
    }
}

fn polynomial(kwargs: &mut Kwargs<'_>, base: f64) -> Result<Shape> {
    let end = kwargs.number("lr_end")?.unwrap_or(1e-7);
    if base <= end {
        return Err(Error::input(format!("lr_end {end} must be smaller than learning_rate {base}"))
            .at("lr_scheduler_kwargs")
            .next("the trainer refuses this too; set a smaller lr_end"));
    }
    Ok(Shape::Polynomial { end, power: kwargs.number("power")?.unwrap_or(1.0), base })
}

fn min_lr(kwargs: &mut Kwargs<'_>, base: f64) -> Result<Shape> {
    let rate = match (kwargs.number("min_lr")?, kwargs.number("min_lr_rate")?) {
        (Some(lr), None) => lr / base,
        (None, Some(rate)) => rate,
        _ => {
            return Err(Error::input("cosine_with_min_lr takes exactly one of min_lr and min_lr_rate")
                .at("lr_scheduler_kwargs")
                .next("give the one the run had"));
        }
    };
    Ok(Shape::CosineWithMinLr { cycles: kwargs.number("num_cycles")?.unwrap_or(0.5), rate })
}

fn stable_decay(kwargs: &mut Kwargs<'_>, spec: &ScheduleSpec<'_>) -> Result<Shape> {
    let decay = kwargs.number("num_decay_steps")?.ok_or_else(|| {
        Error::input("warmup_stable_decay needs num_decay_steps").at("lr_scheduler_kwargs").next("give it")
    })?;
    let stable = kwargs.number("num_stable_steps")?.unwrap_or(spec.total as f64 - spec.warmup as f64 - decay);
    Ok(Shape::WarmupStableDecay {
        stable,
        decay,
        warmup_curve: kwargs.curve("warmup_type", Curve::Linear)?,
        decay_curve: kwargs.curve("decay_type", Curve::Cosine)?,
        min_ratio: kwargs.number("min_lr_ratio")?.unwrap_or(0.0),
        cycles: kwargs.number("num_cycles")?.unwrap_or(0.5),
    })
}

/// `lr_scheduler_kwargs`, remembering which were taken: an unknown one stops the trainer, so it stops us.
struct Kwargs<'a> {
    values: &'a BTreeMap<String, Value>,
    used: Vec<&'static str>,
}

impl Kwargs<'_> {
    fn number(&mut self, name: &'static str) -> Result<Option<f64>> {
        self.used.push(name);
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| wrong(name, value, "a number")),
        }
    }

    fn curve(&mut self, name: &'static str, default: Curve) -> Result<Curve> {
        self.used.push(name);
        let Some(value) = self.values.get(name) else { return Ok(default) };
        match value.as_str() {
            Some("linear") => Ok(Curve::Linear),
            Some("cosine") => Ok(Curve::Cosine),
            Some("1-sqrt") => Ok(Curve::OneMinusSqrt),
            _ => Err(wrong(name, value, "linear, cosine or 1-sqrt")),
        }
    }

    fn all_used(&self, schedule: &str) -> Result<()> {
        match self.values.keys().find(|key| !self.used.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => Err(Error::input(format!("{schedule} takes no `{key}`; it takes {}", self.used.join(", ")))
                .at("lr_scheduler_kwargs")
                .next("correct the key")),
        }
    }
}

fn wrong(name: &str, value: &Value, expected: &str) -> Error {
    Error::input(format!("{value} is not {expected}")).at(format!("lr_scheduler_kwargs.{name}")).next("correct it")
}
