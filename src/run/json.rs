//! JSON as Python's json module writes it: with bare `NaN`, `Infinity` and `-Infinity` tokens.
//!
//! The tokens become the strings `"NaN"`, `"Infinity"`, `"-Infinity"` (outside of strings only), and [`float`] reads
//! both forms. Who the values belong to is for the readers above.

use std::borrow::Cow;

use serde::de::DeserializeOwned;
use serde_json::Value;

/// Parses a JSON text that may hold bare NaN and Infinity tokens.
///
/// # Errors
/// serde_json's message with line and column.
pub fn parse<T: DeserializeOwned>(text: &str) -> std::result::Result<T, serde_json::Error> {
    serde_json::from_str(&quote_non_finite(text))
}

/// The number a value stands for: a JSON number, or one of the non-finite tokens.
pub fn float(value: &Value) -> Option<f64> {
    match value {
        Value::Number(n) => n.as_f64(),
        Value::String(s) => non_finite(s),
        _ => None,
    }
}

/// The number that a token of [`parse`], or Python's own word for it, stands for.
pub fn non_finite(text: &str) -> Option<f64> {
    match text {
        "NaN" | "nan" => Some(f64::NAN),
        "Infinity" | "inf" => Some(f64::INFINITY),
        "-Infinity" | "-inf" => Some(f64::NEG_INFINITY),
        _ => None,
    }
}

/// A JSON value for `x`; the reverse of [`float`].
pub fn number(x: f64) -> Value {
    serde_json::Number::from_f64(x).map_or_else(
        || {
            Value::from(if x.is_nan() {
                "NaN"
            } else if x > 0.0 {
                "Infinity"
            } else {
                "-Infinity"
            })
        },
        Value::Number,
    )
}

/// Puts quotes around bare non-finite tokens. Text without any is returned as it is.
fn quote_non_finite(text: &str) -> Cow<'_, str> {
    if !text.contains("NaN") && !text.contains("Infinity") {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 64);
    let mut rest = text;
    let mut inside = false;
    while let Some(c) = rest.chars().next() {
        let token =
            if inside { None } else { ["NaN", "Infinity", "-Infinity"].into_iter().find(|t| rest.starts_with(t)) };
        let taken = match (token, c) {
            (Some(token), _) => {
                out.extend(["\"", token, "\""]);
                rest = &rest[token.len()..];
                continue;
            }
            // An escape: its second character cannot end the string.
            (None, '\\') if inside => 1 + rest.chars().nth(1).map_or(0, char::len_utf8),
            (None, '"') => {
                inside = !inside;
                1
            }
            _ => c.len_utf8(),
        };
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    Cow::Owned(out)
}
