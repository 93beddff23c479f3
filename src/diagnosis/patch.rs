//! A fix as files: the configuration with the changed keys, a dataset without the bad rows. Text in, text out.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Error, Result};

/// `text` (YAML, or JSON if it starts with a brace) with `changes` in place; comments and order of YAML are kept.
///
/// # Errors
/// JSON that cannot be parsed.
pub fn configuration(text: &str, changes: &BTreeMap<String, Value>) -> Result<String> {
    if text.trim_start().starts_with('{') {
        let broken = |e: serde_json::Error| Error::input(format!("not valid JSON: {e}"));
        let mut whole: serde_json::Map<String, Value> = serde_json::from_str(text).map_err(broken)?;
        whole.extend(changes.clone());
        return Ok(format!("{:#}\n", Value::Object(whole)));
    }
    let mut left = changes.clone();
    let mut out = String::new();
    for line in text.lines() {
        let key = line.split_once(':').map(|(key, _)| key).filter(|key| !key.starts_with([' ', '#', '\t', '-']));
        match key.and_then(|key| left.remove(key.trim()).map(|value| (key, value))) {
            Some((key, value)) => out.push_str(&format!("{key}: {}  # was{}\n", scalar(&value), was(line))),
            None => out.push_str(&format!("{line}\n")),
        }
    }
    for (key, value) in left {
        out.push_str(&format!("{key}: {}\n", scalar(&value)));
    }
    Ok(out)
}

/// What stood after the colon.
fn was(line: &str) -> &str {
    line.split_once(':').map_or("", |(_, value)| value)
}

/// JSON scalars are YAML scalars; PyYAML reads `1e-4` as text, so that exponents get a decimal point.
fn scalar(value: &Value) -> String {
    match value {
        Value::Number(number) if number.is_f64() => {
            let text = format!("{:e}", number.as_f64().unwrap_or_default());
            match text.split_once('e') {
                Some((mantissa, exponent)) if mantissa.contains('.') => format!("{mantissa}e{}", signed(exponent)),
                Some((mantissa, exponent)) => format!("{mantissa}.0e{}", signed(exponent)),
                None => text,
            }
        }
        other => other.to_string(),
    }
}

/// YAML 1.1 wants the sign.
fn signed(exponent: &str) -> String {
    if exponent.starts_with('-') { exponent.to_string() } else { format!("+{exponent}") }
}

/// A dataset file (a JSON array, or JSON lines) without the rows of these numbers, counted from 0.
///
/// # Errors
/// Files of another form.
pub fn without_rows(text: &str, rows: &[u32]) -> Result<String> {
    let keep = |index: usize| !rows.iter().any(|&row| row as usize == index);
    let broken = |e: serde_json::Error| Error::input(format!("not valid JSON: {e}")).next("remove the rows by hand");
    if text.trim_start().starts_with('[') {
        let all: Vec<Value> = serde_json::from_str(text).map_err(broken)?;
        let kept: Vec<Value> = all.into_iter().enumerate().filter(|(i, _)| keep(*i)).map(|(_, v)| v).collect();
        return Ok(format!("{:#}\n", Value::Array(kept)));
    }
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let kept: Vec<&str> = lines.enumerate().filter(|(i, _)| keep(*i)).map(|(_, line)| line).collect();
    if let Some(first) = kept.first() {
        serde_json::from_str::<Value>(first).map_err(broken)?;
    }
    Ok(kept.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_yaml_key_is_changed_in_place_and_a_new_one_added() {
        let changes =
            BTreeMap::from([("learning_rate".to_string(), json!(6.4e-4)), ("max_grad_norm".to_string(), json!(1.0))]);
        let text = configuration("# mine\nlearning_rate: 8.0e-03\nseed: 19\n", &changes).unwrap();
        assert_eq!(text, "# mine\nlearning_rate: 6.4e-4  # was 8.0e-03\nseed: 19\nmax_grad_norm: 1.0e+0\n");
        let back: BTreeMap<String, f64> = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!((back["learning_rate"], back["max_grad_norm"]), (6.4e-4, 1.0));
    }

    #[test]
    fn rows_leave_arrays_and_lines() {
        assert_eq!(without_rows("[1, 2, 3]", &[1]).unwrap(), "[\n  1,\n  3\n]\n");
        assert_eq!(without_rows("{\"a\":1}\n{\"a\":2}\n", &[0]).unwrap(), "{\"a\":2}\n");
    }
}
