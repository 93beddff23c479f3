//! The versioned JSON other programs rely on (design.md section 4).
//!
//! Owns how numbers are written; each schema's builder stands beside its data.

use serde_json::Value;

/// A number; JSON has no NaN or infinities, so these become "nan", "inf", "-inf".
pub fn number(x: f64) -> Value {
    serde_json::Number::from_f64(x).map_or_else(
        || {
            let name = if x.is_nan() {
                "nan"
            } else if x > 0.0 {
                "inf"
            } else {
                "-inf"
            };
            Value::from(name)
        },
        Value::Number,
    )
}

/// [`number`], or null.
pub fn optional(x: Option<f64>) -> Value {
    x.map_or(Value::Null, number)
}
