//! States kept on disk, so that a long replay that was cut short, or is asked for again, goes on where it was.
//!
//! Owns the file format: one safetensors file per state, named by its key (`keys.rs`: everything the state depends
//! on), with the records of the steps before it as metadata. Files are written whole; one that cannot be read counts
//! as absent.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};

use super::keys::Key;
use super::{MicroRecord, StepRecord};
use crate::batches::{Mt19937, RowId};
use crate::device::{Device, Tensor};
use crate::step::{GradScaler, RunningLoss, TrainState};
use crate::{Error, Result, output};

/// A folder of states.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folder.join(format!("{}.safetensors", key.hex()))
    }

    pub fn has(&self, key: &Key) -> bool {
        self.path(key).is_file()
    }

    /// Keeps `state` and the records of the steps that led to it.
    ///
    /// # Errors
    /// When the folder or the file cannot be written.
    pub fn write(&self, key: &Key, device: &dyn Device, state: &TrainState, records: &[StepRecord]) -> Result<()> {
        std::fs::create_dir_all(&self.folder).map_err(|e| Error::output(e.to_string()).at_path(&self.folder))?;
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(state)
            .enumerate()
            .map(|(i, t)| Ok((format!("{i:06}"), t.shape.clone(), bytemuck::cast_slice(&device.download(t)?).to_vec())))
            .collect::<Result<_>>()?;
        let views = bytes
            .iter()
            .map(|(name, shape, data)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data)?)))
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
        let about = json!({"state": state_json(state), "records": records.iter().map(record_json).collect::<Vec<_>>()});
        let metadata = HashMap::from([("spikeprobe".to_owned(), about.to_string())]);
        let file = views.and_then(|views| safetensors::serialize(views, Some(metadata)));
        let file = file.map_err(|e| Error::internal(format!("a state as safetensors: {e}")))?;
        output::write_file(&self.path(key), |out| out.write_all(&file).map_err(|e| Error::output(e.to_string())))
    }

    /// The state of `key` in the shapes of `like`, and the records before it; `None` if there is no usable file.
    pub fn read(&self, key: &Key, device: &dyn Device, like: &TrainState) -> Option<(TrainState, Vec<StepRecord>)> {
        let bytes = std::fs::read(self.path(key)).ok()?;
        let (_, header) = SafeTensors::read_metadata(&bytes).ok()?;
        let about: Value = serde_json::from_str(header.metadata().as_ref()?.get("spikeprobe")?).ok()?;
        let file = SafeTensors::deserialize(&bytes).ok()?;
        let mut state = state_of(&about["state"], like)?;
        for (i, tensor) in tensors_mut(&mut state).enumerate() {
            let view = file.tensor(&format!("{i:06}")).ok().filter(|v| v.shape() == tensor.shape)?;
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            *tensor = device.upload(&values, &tensor.shape, tensor.dtype).ok()?;
        }
        let records = about["records"].as_array()?.iter().map(record_of).collect::<Option<Vec<_>>>()?;
        Some((state, records))
    }
}

fn tensors(state: &TrainState) -> impl Iterator<Item = &Tensor> {
    state.adapter.matrices().chain(state.moments.iter().flat_map(|m| [&m.exp_avg, &m.exp_avg_sq]))
}

fn tensors_mut(state: &mut TrainState) -> impl Iterator<Item = &mut Tensor> {
    let moments = state.moments.iter_mut().flat_map(|m| [&mut m.exp_avg, &mut m.exp_avg_sq]);
    state.adapter.matrices_mut().chain(moments)
}

/// A float as its bits: exact, NaN and infinities included.
fn bits(x: f64) -> Value {
    Value::from(x.to_bits())
}

fn float(value: &Value) -> Option<f64> {
    value.as_u64().map(f64::from_bits)
}

fn floats(values: &[f64]) -> Value {
    values.iter().map(|&x| bits(x)).collect()
}

fn float_list(value: &Value) -> Option<Vec<f64>> {
    value.as_array()?.iter().map(float).collect()
}

fn state_json(state: &TrainState) -> Value {
    let (filtered, raw, last_logged) = state.running_loss.parts();
    let wide = |values: &[f32]| floats(&values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    json!({
        "step": state.step,
        "schedule_steps": state.schedule_steps,
        "updates": floats(&state.moments.iter().map(|m| m.updates).collect::<Vec<_>>()),
        "base": floats(&state.base_learning_rates),
        "stored": state.stored_learning_rates.as_deref().map(floats),
        "scaler": state.scaler.map(|s| json!([
            bits(s.scale), bits(s.growth_factor), bits(s.backoff_factor), s.growth_interval, s.growth_tracker
        ])),
        "running": [wide(filtered), wide(raw), last_logged],
        "generators": state.generators.iter().map(Mt19937::parts).collect::<Vec<_>>(),
    })
}

fn state_of(json: &Value, like: &TrainState) -> Option<TrainState> {
    let mut state = like.clone();
    state.step = json["step"].as_u64()?;
    state.schedule_steps = json["schedule_steps"].as_u64()?;
    let updates = float_list(&json["updates"])?;
    if updates.len() != state.moments.len() {
        return None;
    }
    for (moments, updates) in state.moments.iter_mut().zip(updates) {
        moments.updates = updates;
    }
    state.base_learning_rates = float_list(&json["base"])?;
    state.stored_learning_rates = match &json["stored"] {
        Value::Null => None,
        stored => Some(float_list(stored)?),
    };
    state.scaler = match &json["scaler"] {
        Value::Null => None,
        s => Some(GradScaler {
            scale: float(&s[0])?,
            growth_factor: float(&s[1])?,
            backoff_factor: float(&s[2])?,
            growth_interval: s[3].as_u64()?,
            growth_tracker: s[4].as_u64()?,
        }),
    };
    let narrow = |v: &Value| Some(float_list(v)?.into_iter().map(|x| x as f32).collect::<Vec<_>>());
    let running = &json["running"];
    state.running_loss = RunningLoss::of_parts(narrow(&running[0])?, narrow(&running[1])?, running[2].as_u64()?);
    state.generators = json["generators"].as_array()?.iter().map(generator_of).collect::<Option<_>>()?;
    Some(state)
}

fn generator_of(json: &Value) -> Option<Mt19937> {
    let words: Vec<u32> = serde_json::from_value(json[0].clone()).ok()?;
    Mt19937::resumed(&words, usize::try_from(json[1].as_u64()?).ok()?)
}

/// A step as JSON, floats as their bits: read back it is the same step.
pub fn record_json(r: &StepRecord) -> Value {
    let micro = r.micro_batches.iter().map(|m| {
        let rows: Vec<Value> = m.rows.iter().map(|row| json!([row.dataset, row.row])).collect();
        let numbers = floats(&[m.loss, m.mean_loss, m.grad_norm]);
        json!([rows, m.tokens, m.label_tokens, numbers, m.nonfinite, m.leaked])
    });
    let numbers = [
        r.epoch,
        r.learning_rate,
        r.learning_rate_logged,
        r.loss,
        r.loss_raw,
        r.grad_norm,
        r.clip_coefficient,
        r.update_norm,
    ];
    json!([
        r.step,
        r.attempt,
        floats(&numbers),
        r.loss_logged.map(bits),
        r.loss_scale.map(bits),
        r.skipped,
        r.nonfinite,
        micro.collect::<Vec<_>>(),
    ])
}

/// The step of [`record_json`]; `None` of anything else.
pub fn record_of(json: &Value) -> Option<StepRecord> {
    let optional = |v: &Value| if v.is_null() { Some(None) } else { float(v).map(Some) };
    let numbers = float_list(&json[2]).filter(|n| n.len() == 8)?;
    Some(StepRecord {
        step: json[0].as_u64()?,
        attempt: usize::try_from(json[1].as_u64()?).ok()?,
        epoch: numbers[0],
        learning_rate: numbers[1],
        learning_rate_logged: numbers[2],
        loss: numbers[3],
        loss_raw: numbers[4],
        loss_logged: optional(&json[3])?,
        grad_norm: numbers[5],
        clip_coefficient: numbers[6],
        update_norm: numbers[7],
        loss_scale: optional(&json[4])?,
        skipped: json[5].as_bool()?,
        nonfinite: json[6].as_u64()?,
        micro_batches: json[7].as_array()?.iter().map(micro_of).collect::<Option<_>>()?,
    })
}

fn micro_of(json: &Value) -> Option<MicroRecord> {
    let row = |v: &Value| {
        Some(RowId { dataset: u16::try_from(v[0].as_u64()?).ok()?, row: u32::try_from(v[1].as_u64()?).ok()? })
    };
    let numbers = float_list(&json[3]).filter(|n| n.len() == 3)?;
    Some(MicroRecord {
        rows: json[0].as_array()?.iter().map(row).collect::<Option<_>>()?,
        tokens: json[1].as_u64()?,
        label_tokens: json[2].as_u64()?,
        loss: numbers[0],
        mean_loss: numbers[1],
        grad_norm: numbers[2],
        nonfinite: json[4].as_u64()?,
        leaked: json[5].as_bool()?,
    })
}
