//! What was asked for → cells: axes, their values, and what else must change with them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Cell;
use crate::{Error, Result};

/// The axis that is not a configuration key.
pub const PRECISION: &str = "precision";
const LEARNING_RATE: &str = "learning_rate";
const ACCUMULATION: &str = "gradient_accumulation_steps";
const BATCH: &str = "per_device_train_batch_size";

/// Words of `--precision`.
pub const PRECISIONS: [&str; 5] = ["fp32", "tf32", "bf16", "fp16", "pure_bf16"];

/// Keys a grid may vary: each changes the step, none the identity of the run.
const KEYS: [&str; 19] = [
    LEARNING_RATE,
    ACCUMULATION,
    BATCH,
    PRECISION,
    "max_grad_norm",
    "warmup_ratio",
    "warmup_steps",
    "lora_rank",
    "lora_alpha",
    "use_rslora",
    "seed",
    "data_seed",
    "lr_scheduler_type",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "optim",
    "loraplus_lr_ratio",
];
/// Keys that a checkpoint has already decided.
const FIXED_BY_CHECKPOINT: [&str; 7] =
    ["lora_rank", "seed", "data_seed", ACCUMULATION, BATCH, "use_rslora", "lora_alpha"];

/// What stays the same while accumulation varies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The micro-batch: fewer accumulation steps mean fewer samples per update and more updates.
    MicroBatch,
    /// Samples per update: fewer accumulation steps mean larger micro-batches.
    Samples,
}

/// One axis as typed and resolved.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Axis {
    pub key: String,
    pub values: Vec<Value>,
}

/// The run's own values that axes refer to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Base {
    pub learning_rate: f64,
    pub batch: u64,
    pub accumulation: u64,
    pub world_size: u64,
    /// ≤ 0: the run ends after its epochs.
    pub max_steps: i64,
    /// Optimizer steps of the run to cover from the start point, at the run's own samples per update.
    pub steps: u64,
}

/// Axes, and how cells follow from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grid {
    pub axes: Vec<Axis>,
    pub keep: Keep,
    /// `initial`, or the step of a checkpoint.
    pub from: String,
}

impl Axis {
    /// `typed`: `key=a,b,c`, key as in the configuration or short (lr, accumulation, rank, alpha, clip, warmup).
    /// Values of learning_rate may be factors of the run's own: `x0.3`.
    ///
    /// # Errors
    /// Unknown keys, no values, factors of other keys, values that are not what the key takes.
    pub fn parse(typed: &str, base: &Base) -> Result<Self> {
        let usage = |what: String| Error::usage(what).at(format!("--grid {typed}"));
        let (key, values) = typed.split_once('=').ok_or_else(|| usage("expected key=a,b,c".into()))?;
        let key = full_key(key.trim());
        if !KEYS.contains(&key) {
            return Err(
                usage(format!("`{key}` is not a key a grid can vary")).next(format!("one of {}", KEYS.join(", ")))
            );
        }
        let values = values.split(',').map(str::trim).filter(|v| !v.is_empty());
        let mut parsed: Vec<Value> = Vec::new();
        for value in values {
            let value = value_of(key, value, base).map_err(usage)?;
            if !parsed.contains(&value) {
                parsed.push(value);
            }
        }
        if parsed.is_empty() {
            return Err(usage("no values".into()));
        }
        Ok(Self { key: key.into(), values: parsed })
    }
}

fn full_key(key: &str) -> &str {
    match key {
        "lr" => LEARNING_RATE,
        "accumulation" => ACCUMULATION,
        "rank" => "lora_rank",
        "alpha" => "lora_alpha",
        "clip" => "max_grad_norm",
        "warmup" => "warmup_ratio",
        other => other,
    }
}

fn value_of(key: &str, typed: &str, base: &Base) -> std::result::Result<Value, String> {
    if let Some(factor) = typed.strip_prefix(['x', '×']) {
        let factor: f64 = factor.parse().map_err(|_| format!("`{typed}` is not a factor"))?;
        if key != LEARNING_RATE {
            return Err(format!("factors are for learning_rate, not for {key}"));
        }
        return positive(factor * base.learning_rate, typed);
    }
    match key {
        PRECISION if PRECISIONS.contains(&typed) => Ok(json!(typed)),
        PRECISION => Err(format!("`{typed}` is not one of {}", PRECISIONS.join(", "))),
        ACCUMULATION | BATCH | "lora_rank" => match typed.parse::<u64>() {
            Ok(count) if count > 0 => Ok(json!(count)),
            _ => Err(format!("`{typed}` is not a whole number above 0")),
        },
        "seed" | "data_seed" => typed.parse::<u64>().map(|n| json!(n)).map_err(|_| format!("`{typed}` is not a seed")),
        "lr_scheduler_type" | "optim" => Ok(json!(typed)),
        "use_rslora" => typed.parse::<bool>().map(|b| json!(b)).map_err(|_| format!("`{typed}` is not true or false")),
        LEARNING_RATE => positive(typed.parse().unwrap_or(f64::NAN), typed),
        _ => match typed.parse::<f64>() {
            Ok(number) if number.is_finite() && number >= 0.0 => Ok(json!(number)),
            _ => Err(format!("`{typed}` is not a number from 0 up")),
        },
    }
}

fn positive(value: f64, typed: &str) -> std::result::Result<Value, String> {
    // Twelve digits: 0.3 × 1e-3 is 3e-4 and not 0.00029999999999999997.
    let rounded: f64 = format!("{value:.11e}").parse().unwrap_or(f64::NAN);
    if rounded.is_finite() && rounded > 0.0 { Ok(json!(rounded)) } else { Err(format!("`{typed}` is not above 0")) }
}

impl Grid {
    /// Every combination, the last axis fastest.
    ///
    /// # Errors
    /// The same axis twice; accumulation that does not divide the samples per update; axes that a checkpoint has
    /// already decided; no step to replay.
    pub fn cells(&self, base: &Base) -> Result<Vec<Cell>> {
        self.check()?;
        let mut combinations: Vec<BTreeMap<String, Value>> = vec![BTreeMap::new()];
        for axis in &self.axes {
            let extend = |c: &BTreeMap<String, Value>, v: &Value| {
                let mut c = c.clone();
                c.insert(axis.key.clone(), v.clone());
                c
            };
            combinations = combinations.iter().flat_map(|c| axis.values.iter().map(|v| extend(c, v))).collect();
        }
        combinations.into_iter().map(|axes| self.cell(axes, base)).collect()
    }

    fn check(&self) -> Result<()> {
        if self.axes.is_empty() {
            return Err(Error::usage("nothing varies").next("give --lr, --accumulation, --precision or --grid key=a,b"));
        }
        for (i, axis) in self.axes.iter().enumerate() {
            if self.axes[..i].iter().any(|other| other.key == axis.key) {
                return Err(Error::usage("given twice").at(&axis.key));
            }
            if self.from != "initial" && FIXED_BY_CHECKPOINT.contains(&axis.key.as_str()) {
                return Err(Error::usage(format!("cannot vary from checkpoint-{}: it is decided there", self.from))
                    .at(&axis.key)
                    .next("sweep it with --from initial"));
            }
            if self.keep == Keep::Samples && axis.key == BATCH {
                return Err(Error::usage("follows from accumulation with --keep samples").at(BATCH));
            }
        }
        Ok(())
    }

    fn cell(&self, axes: BTreeMap<String, Value>, base: &Base) -> Result<Cell> {
        let count = |key: &str, default: u64| axes.get(key).and_then(Value::as_u64).unwrap_or(default);
        let accumulation = count(ACCUMULATION, base.accumulation);
        let own = base.batch * base.accumulation;
        let mut derived = BTreeMap::new();
        let mut batch = count(BATCH, base.batch);
        if self.keep == Keep::Samples && accumulation != base.accumulation {
            if !own.is_multiple_of(accumulation) {
                return Err(Error::usage(format!("{accumulation} does not divide the {own} samples of an update"))
                    .at(ACCUMULATION)
                    .next("choose a divisor, or keep the micro-batch: --keep micro-batch"));
            }
            batch = own / accumulation;
            derived.insert(BATCH.into(), json!(batch));
        }
        let samples = batch * accumulation;
        let scaled = |steps: u64| (steps as f64 * own as f64 / samples as f64).round().max(1.0) as u64;
        if base.max_steps > 0 && samples != own {
            derived.insert("max_steps".into(), json!(scaled(base.max_steps as u64)));
        }
        if base.steps == 0 {
            return Err(Error::usage("no step to replay")
                .at("--steps")
                .next("the run ends at or before the start point"));
        }
        let samples_per_step = samples * base.world_size;
        Ok(Cell { axes, derived, from: self.from.clone(), steps: scaled(base.steps), samples_per_step })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Base {
        Base { learning_rate: 1e-3, batch: 2, accumulation: 8, world_size: 1, max_steps: -1, steps: 48 }
    }
    fn grid(keep: Keep, axes: &[&str]) -> Grid {
        let axes = axes.iter().map(|a| Axis::parse(a, &base()).expect("axis")).collect();
        Grid { axes, keep, from: "initial".into() }
    }

    #[test]
    fn factors_are_of_the_runs_own_learning_rate_and_round() {
        let axis = Axis::parse("lr=x0.1,x0.3,x1,x3,1e-3", &base()).expect("axis");
        assert_eq!(axis.values, [json!(1e-4), json!(3e-4), json!(1e-3), json!(3e-3)]);
    }

    #[test]
    fn constant_micro_batches_cover_the_same_samples_with_more_updates() {
        let cells = grid(Keep::MicroBatch, &["accumulation=1,8"]).cells(&base()).expect("cells");
        assert_eq!((cells[0].steps, cells[0].samples_per_step), (384, 2));
        assert_eq!((cells[1].steps, cells[1].samples_per_step), (48, 16));
        assert!(cells[0].derived.is_empty());
    }

    #[test]
    fn constant_samples_change_the_micro_batch_and_nothing_else() {
        let cells = grid(Keep::Samples, &["accumulation=1,8,16"]).cells(&base()).expect("cells");
        assert_eq!(cells.iter().map(|c| c.steps).collect::<Vec<_>>(), [48, 48, 48]);
        assert_eq!(cells[0].derived["per_device_train_batch_size"], json!(16));
        assert_eq!(cells[2].derived["per_device_train_batch_size"], json!(1));
        let error = grid(Keep::Samples, &["accumulation=3"]).cells(&base()).expect_err("3 does not divide 16");
        assert!(error.to_string().contains("divide"));
    }

    #[test]
    fn a_limit_in_steps_is_scaled_so_that_samples_stay() {
        let limited = Base { max_steps: 100, ..base() };
        let cells = grid(Keep::MicroBatch, &["accumulation=1"]).cells(&limited).expect("cells");
        assert_eq!(cells[0].derived["max_steps"], json!(800));
    }

    #[test]
    fn every_combination_is_a_cell_once() {
        let cells =
            grid(Keep::MicroBatch, &["lr=1e-4,2e-4", "precision=bf16,fp16", "clip=1,0"]).cells(&base()).expect("cells");
        assert_eq!(cells.len(), 8);
        assert_eq!(cells[1].axes["max_grad_norm"], json!(0.0));
        assert_eq!(cells[1].precision(), Some("bf16"));
        assert!(!cells[1].settings().contains_key("precision"));
    }

    #[test]
    fn wrong_axes_are_refused_with_what_to_do() {
        for wrong in [
            "model=a",
            "lr",
            "lr=",
            "lr=0",
            "lr=nan",
            "accumulation=0",
            "accumulation=1.5",
            "precision=int8",
            "clip=x2",
            "rank=-1",
        ] {
            let error = Axis::parse(wrong, &base()).expect_err(wrong);
            assert_eq!(error.exit_code(), 2, "{wrong}");
        }
        let mut twice = grid(Keep::MicroBatch, &["lr=1e-4"]);
        twice.axes.push(twice.axes[0].clone());
        assert!(twice.cells(&base()).is_err());
        let mut resumed = grid(Keep::MicroBatch, &["accumulation=1"]);
        resumed.from = "24".into();
        assert!(resumed.cells(&base()).is_err());
    }
}
