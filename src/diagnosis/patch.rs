//! A dataset without its bad rows. Text in, text out; configurations are changed by `run/patch.rs`.

use serde_json::Value;

use crate::{Error, Result};

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

    #[test]
    fn rows_leave_arrays_and_lines() {
        assert_eq!(without_rows("[1, 2, 3]", &[1]).unwrap(), "[\n  1,\n  3\n]\n");
        assert_eq!(without_rows("{\"a\":1}\n{\"a\":2}\n", &[0]).unwrap(), "{\"a\":2}\n");
    }
}
