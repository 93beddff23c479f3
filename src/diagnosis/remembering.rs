//! A laboratory that asks the archive first.
//!
//! A replay is a pure function of the run's inputs, start, interventions, program and machine, so its result is kept
//! under a hash of all of them. Each result is written as soon as it is there: a killed diagnosis loses at most the
//! replay in progress.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::archive::Archive;
use super::laboratory::Laboratory;
use crate::Result;
use crate::device::{DType, Statistics};
use crate::numerics::State;
use crate::probe::Measurement;
use crate::replay::{Intervention, Start, Trace, record_json, record_of};
use crate::run::{AdapterModule, AdapterWeights};

/// `inner`, with its results kept in an archive.
pub struct Remembering<'a> {
    inner: &'a mut dyn Laboratory,
    archive: &'a Archive,
    /// Hash of the run's inputs, the program and the machine.
    identity: String,
    cached: u64,
}

impl<'a> Remembering<'a> {
    /// `identity`: a hash of everything but start, steps and interventions that results depend on.
    pub fn new(inner: &'a mut dyn Laboratory, archive: &'a Archive, identity: String) -> Self {
        Self { inner, archive, identity, cached: 0 }
    }

    fn key(&self, what: &str) -> String {
        let hash = Sha256::digest(format!("{}|{what}", self.identity));
        hash.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn ask<T>(
        &mut self,
        what: &str,
        decode: impl Fn(&[u8]) -> Option<T>,
        encode: impl Fn(&T) -> Vec<u8>,
        compute: impl FnOnce(&mut dyn Laboratory) -> Result<T>,
    ) -> Result<T> {
        let key = self.key(what);
        if let Some(body) = self.archive.read(&key) {
            match decode(&body) {
                Some(result) => {
                    self.cached += 1;
                    return Ok(result);
                }
                None => self.archive.not_understood(&key),
            }
        }
        let result = compute(self.inner)?;
        self.archive.write(&key, &encode(&result));
        Ok(result)
    }
}

impl Laboratory for Remembering<'_> {
    fn replay(&mut self, start: &Start, to: u64, changes: &[Intervention]) -> Result<Trace> {
        let decode = |body: &[u8]| {
            let json: Value = serde_json::from_slice(body).ok()?;
            let steps = json.as_array()?.iter().map(record_of).collect::<Option<_>>()?;
            Some(Trace { start: start.clone(), steps })
        };
        let encode = |trace: &Trace| Value::from_iter(trace.steps.iter().map(record_json)).to_string().into_bytes();
        self.ask(&format!("replay {start:?} {to} {changes:?}"), decode, encode, |lab| lab.replay(start, to, changes))
    }

    fn adapter(&mut self, start: &Start, at: u64, changes: &[Intervention]) -> Result<AdapterWeights> {
        let what = format!("adapter {start:?} {at} {changes:?}");
        self.ask(&what, adapter_of, adapter_bytes, |lab| lab.adapter(start, at, changes))
    }

    fn measure(&mut self, start: &Start, step: u64) -> Result<Vec<Measurement>> {
        let decode = |body: &[u8]| {
            let json: Value = serde_json::from_slice(body).ok()?;
            json.as_array()?.iter().map(measurement_of).collect()
        };
        let encode =
            |all: &Vec<Measurement>| Value::from_iter(all.iter().map(measurement_json)).to_string().into_bytes();
        self.ask(&format!("measure {start:?} {step}"), decode, encode, |lab| lab.measure(start, step))
    }

    fn arithmetic(&mut self, step: u64) -> Result<Option<State>> {
        let decode = |body: &[u8]| serde_json::from_slice(body).ok();
        let encode = |state: &Option<State>| json!(state).to_string().into_bytes();
        self.ask(&format!("arithmetic {step}"), decode, encode, |lab| lab.arithmetic(step))
    }

    fn cached(&self) -> u64 {
        self.cached
    }
}

/// A line of JSON with the shapes, then the elements of A and B of each module, little-endian.
fn adapter_bytes(weights: &AdapterWeights) -> Vec<u8> {
    let modules = weights.modules.iter().map(|m| json!([m.path, m.a.len(), m.b.len(), m.rank, m.fan_in, m.fan_out]));
    let mut bytes = json!([weights.stored, modules.collect::<Vec<_>>()]).to_string().into_bytes();
    bytes.push(b'\n');
    for module in &weights.modules {
        bytes.extend(module.a.iter().chain(&module.b).flat_map(|x| x.to_le_bytes()));
    }
    bytes
}

fn adapter_of(body: &[u8]) -> Option<AdapterWeights> {
    let end = body.iter().position(|&b| b == b'\n')?;
    let head: Value = serde_json::from_slice(&body[..end]).ok()?;
    let mut elements = body[end + 1..].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut take = |count: usize| {
        let values: Vec<f32> = elements.by_ref().take(count).collect();
        (values.len() == count).then_some(values)
    };
    let number = |v: &Value| usize::try_from(v.as_u64()?).ok();
    let mut modules = Vec::new();
    for m in head[1].as_array()? {
        let (a, b) = (take(number(&m[1])?)?, take(number(&m[2])?)?);
        let (rank, fan_in, fan_out) = (number(&m[3])?, number(&m[4])?, number(&m[5])?);
        modules.push(AdapterModule { path: m[0].as_str()?.to_owned(), a, b, rank, fan_in, fan_out });
    }
    Some(AdapterWeights { modules, stored: head[0].as_str()?.to_owned() })
}

fn measurement_json(m: &Measurement) -> Value {
    let s = &m.statistics;
    let counts = [s.elements, s.nan, s.pos_inf, s.neg_inf, s.zero, s.subnormal, s.underflow, s.overflow];
    let extremes = [s.max_abs.to_bits(), s.min_abs.to_bits()];
    json!([m.site, m.unit, word(m.dtype), word(m.range), counts, extremes, s.sum_squares.to_bits()])
}

fn measurement_of(json: &Value) -> Option<Measurement> {
    let bits = |v: &Value| Some(f32::from_bits(u32::try_from(v.as_u64()?).ok()?));
    let wide = |v: &Value| Some(f64::from_bits(v.as_u64()?));
    let count = |i: usize| json[4][i].as_u64();
    let statistics = Statistics {
        elements: count(0)?,
        nan: count(1)?,
        pos_inf: count(2)?,
        neg_inf: count(3)?,
        zero: count(4)?,
        subnormal: count(5)?,
        underflow: count(6)?,
        overflow: count(7)?,
        max_abs: bits(&json[5][0])?,
        min_abs: bits(&json[5][1])?,
        sum_squares: wide(&json[6])?,
    };
    Some(Measurement {
        site: serde_json::from_value(json[0].clone()).ok()?,
        unit: serde_json::from_value(json[1].clone()).ok()?,
        dtype: dtype(&json[2])?,
        range: dtype(&json[3])?,
        statistics,
        values: None,
    })
}

fn word(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
    }
}

fn dtype(json: &Value) -> Option<DType> {
    [DType::F32, DType::BF16, DType::F16].into_iter().find(|d| json.as_str() == Some(word(*d)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Projection;
    use crate::probe::{Part, Role, Site};
    use crate::replay::{MicroRecord, StepRecord};

    /// Counts what is really replayed.
    struct Counting(usize);

    fn record(step: u64) -> StepRecord {
        let micro = MicroRecord {
            rows: vec![crate::batches::RowId { dataset: 0, row: 7 }],
            tokens: 12,
            label_tokens: 5,
            loss: 0.1,
            mean_loss: f64::NAN,
            grad_norm: f64::INFINITY,
            nonfinite: 3,
            leaked: false,
        };
        StepRecord {
            step,
            attempt: 0,
            epoch: 0.5,
            learning_rate: 1e-3,
            learning_rate_logged: 1e-3,
            loss: 0.1 + 0.2,
            loss_raw: 0.3,
            loss_logged: None,
            grad_norm: -0.0,
            clip_coefficient: 1.0,
            update_norm: 1e-300,
            loss_scale: Some(65536.0),
            skipped: true,
            nonfinite: 3,
            micro_batches: vec![micro],
        }
    }

    impl Laboratory for Counting {
        fn replay(&mut self, start: &Start, to: u64, _: &[Intervention]) -> Result<Trace> {
            self.0 += 1;
            Ok(Trace { start: start.clone(), steps: (1..=to).map(record).collect() })
        }
        fn adapter(&mut self, _: &Start, _: u64, _: &[Intervention]) -> Result<AdapterWeights> {
            self.0 += 1;
            let (a, b) = (vec![1.5, f32::NAN], vec![-0.0]);
            let module =
                AdapterModule { path: "layers.0.self_attn.q_proj".into(), a, b, rank: 1, fan_in: 2, fan_out: 1 };
            Ok(AdapterWeights { modules: vec![module], stored: "F32".into() })
        }
        fn measure(&mut self, _: &Start, _: u64) -> Result<Vec<Measurement>> {
            self.0 += 1;
            let statistics =
                Statistics { elements: 4, max_abs: f32::INFINITY, sum_squares: f64::NAN, ..Default::default() };
            let site = Site::block(2, Part::Projection(Projection::Down), Role::OutputGrad);
            let (dtype, range) = (DType::F32, DType::F16);
            Ok(vec![Measurement { site, unit: None, dtype, range, statistics, values: None }])
        }
    }

    #[test]
    fn every_result_is_computed_once_and_read_back_bit_for_bit() {
        let folder = tempfile::tempdir().expect("a folder");
        let archive = Archive::new(folder.path());
        let mut counting = Counting(0);
        let mut first = Vec::new();
        for round in 0..2 {
            let mut lab = Remembering::new(&mut counting, &archive, "run".into());
            let change = [Intervention::ScaleLearningRate(0.1)];
            let texts = [
                format!("{:?}", lab.replay(&Start::Checkpoint(4), 3, &change).expect("a trace")),
                format!("{:?}", lab.adapter(&Start::Initial, 3, &[]).expect("an adapter")),
                format!("{:?}", lab.measure(&Start::Initial, 3).expect("measurements")),
            ];
            assert_eq!(lab.cached(), 3 * round);
            if round == 0 { first = texts.to_vec() } else { assert_eq!(first, texts) }
        }
        assert_eq!(counting.0, 3);
    }

    #[test]
    fn another_run_another_change_and_another_step_are_other_results() {
        let folder = tempfile::tempdir().expect("a folder");
        let archive = Archive::new(folder.path());
        let mut counting = Counting(0);
        for (identity, to, factor) in [("a", 3, 0.1), ("b", 3, 0.1), ("a", 4, 0.1), ("a", 3, 0.2)] {
            let mut lab = Remembering::new(&mut counting, &archive, identity.into());
            lab.replay(&Start::Initial, to, &[Intervention::ScaleLearningRate(factor)]).expect("a trace");
        }
        assert_eq!(counting.0, 4);
    }
}
