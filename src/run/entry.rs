//! One entry of a log: an object of trainer_log.jsonl, or of log_history in trainer_state.json.
//!
//! Logs hold a hundred thousand entries, so each is read into the members that anything asks for; the rest is skipped
//! unread. What the members mean in which file is in `state_file.rs`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::json::non_finite;

/// A member's value: a number, a text (a non-finite number, a time), or something that no reader asks for.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    Number(f64),
    Text(String),
    Other(IgnoredAny),
}

impl Scalar {
    /// The number, finite or not.
    pub fn float(&self) -> Option<f64> {
        match self {
            Self::Number(x) => Some(*x),
            Self::Text(text) => non_finite(text),
            Self::Other(_) => None,
        }
    }

    /// A count: whole, not negative, exact in an f64.
    pub fn whole(&self) -> Option<u64> {
        const EXACT: f64 = (1u64 << 53) as f64;
        match self {
            Self::Number(x) if x.fract() == 0.0 && (0.0..=EXACT).contains(x) => Some(*x as u64),
            _ => None,
        }
    }

    fn text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }
}

/// The members of one entry; each `None` where the entry lacks it or holds something else.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Entry {
    /// `step` of a state file.
    pub step: Option<u64>,
    /// `current_steps` of trainer_log.jsonl.
    pub current_steps: Option<u64>,
    pub total_steps: Option<u64>,
    pub epoch: Option<f64>,
    /// Whether there is a `loss` at all: only training rows have one.
    pub is_training: bool,
    pub loss: Option<f64>,
    pub grad_norm: Option<f64>,
    /// `learning_rate`, or `lr` in trainer_log.jsonl.
    pub learning_rate: Option<f64>,
    /// `elapsed_time`, seconds.
    pub elapsed: Option<u64>,
    /// Every number named `eval_…`.
    pub metrics: BTreeMap<String, f64>,
}

impl Entry {
    fn take(&mut self, key: &str, value: &Scalar) {
        match key {
            "step" => self.step = value.whole(),
            "current_steps" => self.current_steps = value.whole(),
            "total_steps" => self.total_steps = value.whole(),
            "epoch" => self.epoch = value.float(),
            "loss" => (self.is_training, self.loss) = (true, value.float()),
            "grad_norm" => self.grad_norm = value.float(),
            "learning_rate" | "lr" => self.learning_rate = value.float(),
            "elapsed_time" => self.elapsed = value.text().and_then(seconds),
            metric => {
                if let Some(x) = value.float() {
                    self.metrics.insert(metric.to_owned(), x);
                }
            }
        }
    }

    fn wants(key: &str) -> bool {
        let known = ["step", "current_steps", "total_steps", "epoch", "loss", "grad_norm", "learning_rate", "lr"];
        known.contains(&key) || key == "elapsed_time" || key.starts_with("eval_")
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an entry of a log (an object)")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
                let mut entry = Entry::default();
                while let Some(Key(key)) = map.next_key()? {
                    if Entry::wants(&key) {
                        entry.take(&key, &map.next_value()?);
                    } else {
                        map.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(entry)
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// A key, borrowed from the text unless it holds an escape.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// Python's `str(timedelta)`: `H:MM:SS` or `D days, H:MM:SS`.
fn seconds(text: &str) -> Option<u64> {
    let (days, clock) = match text.split_once(", ") {
        Some((days, clock)) => (days.split(' ').next()?.parse::<u64>().ok()?, clock),
        None => (0, text),
    };
    let mut parts = clock.split(':').map(|p| p.parse::<u64>().ok());
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    days.checked_mul(86_400)?.checked_add(h.checked_mul(3600)?)?.checked_add(m.checked_mul(60)?)?.checked_add(s)
}
