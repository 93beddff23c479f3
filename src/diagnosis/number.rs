//! How this program's JSON writes numbers that JSON cannot hold: "nan", "inf", "-inf" (design section 4).

use serde::{Deserialize, Deserializer, Serializer};

/// A finite number stays a number.
pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        v if v.is_nan() => serializer.serialize_str("nan"),
        v if v.is_infinite() => serializer.serialize_str(if *v > 0.0 { "inf" } else { "-inf" }),
        v => serializer.serialize_f64(*v),
    }
}

pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Written {
        Number(f64),
        Text(String),
    }
    match Written::deserialize(deserializer)? {
        Written::Number(value) => Ok(value),
        Written::Text(text) => match text.as_str() {
            "nan" => Ok(f64::NAN),
            "inf" => Ok(f64::INFINITY),
            "-inf" => Ok(f64::NEG_INFINITY),
            other => {
                Err(serde::de::Error::custom(format!("expected a number, \"nan\", \"inf\" or \"-inf\", got {other:?}")))
            }
        },
    }
}

/// The same for values that may be absent (JSON null).
pub mod optional {
    use super::{Deserialize, Deserializer, Serializer};

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(transparent)]
    struct Number(#[serde(with = "super")] f64);

    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        serde::Serialize::serialize(&value.map(Number), serializer)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Number>::deserialize(deserializer)?.map(|number| number.0))
    }
}

/// The same as a JSON value.
pub fn json(value: f64) -> serde_json::Value {
    serialize(&value, serde_json::value::Serializer).unwrap_or_default()
}
