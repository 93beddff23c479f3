//! A configuration file with some keys changed, everything else (comments, order) as it was.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// `text` with top-level keys of `changes` replaced where they stand, or added at the end. JSON stays JSON.
pub fn patched(text: &str, changes: &BTreeMap<String, Value>) -> String {
    // The byte order mark of a Windows editor would be read as part of the first key.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Ok(Value::Object(mut object)) = serde_json::from_str(text) {
        changes.iter().for_each(|(key, value)| drop(object.insert(key.clone(), value.clone())));
        return format!("{:#}\n", Value::Object(object));
    }
    let mut left: BTreeMap<&str, &Value> = changes.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let mut out = String::new();
    let mut inside_replaced = false;
    for line in text.lines() {
        let key = line.split_once(':').map(|(key, _)| key).filter(|key| !key.starts_with([' ', '\t', '#', '-']));
        let key = key.map(|k| k.trim().trim_matches(['"', '\'']));
        // The indented or listed lines below a replaced key were its value.
        if inside_replaced && key.is_none() && line.starts_with([' ', '\t', '-']) {
            continue;
        }
        inside_replaced = false;
        match key.and_then(|k| changes.get(k).map(|v| (k, v))) {
            Some((key, value)) => {
                left.remove(key);
                out.push_str(&format!("{key}: {}{}\n", scalar(value), remark(line)));
                inside_replaced = true;
            }
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    for (key, value) in left {
        out.push_str(&format!("{key}: {}\n", scalar(value)));
    }
    out
}

/// The comment of a line that is replaced; of one without, the value that stood there.
fn remark(line: &str) -> String {
    if let Some(at) = line.find(" #") {
        return line[at..].to_owned();
    }
    match line.split_once(':').map(|(_, was)| was.trim()) {
        Some(was) if !was.is_empty() => format!("  # was {was}"),
        _ => String::new(),
    }
}

/// JSON scalars are YAML scalars, but YAML 1.1 reads `1e-4` as a text: PyYAML wants `1.0e-04`.
fn scalar(value: &Value) -> String {
    match value.as_f64() {
        Some(x) if value.is_f64() && x != 0.0 && !(1e-3..1e6).contains(&x.abs()) => {
            let text = format!("{x:e}");
            let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
            let mantissa = if mantissa.contains('.') { mantissa.to_owned() } else { format!("{mantissa}.0") };
            let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |d| ('-', d));
            format!("{mantissa}e{sign}{digits:0>2}")
        }
        _ => value.to_string(),
    }
}

/// The flags of `--precision`'s words, as LLaMA-Factory takes them.
pub fn precision_flags(precision: &str) -> BTreeMap<String, Value> {
    let flag = |key: &str, word: &str| (key.to_owned(), json!(precision == word));
    [flag("bf16", "bf16"), flag("fp16", "fp16"), flag("pure_bf16", "pure_bf16"), flag("tf32", "tf32")].into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_keys_are_replaced_in_place_and_comments_stay() {
        let text = "# my run\nlearning_rate: 1.0e-3  # too hot?\nlora_target:\n- q_proj\n- v_proj\nbf16: true\n";
        let changes = [
            ("learning_rate".to_owned(), json!(0.0002)),
            ("lora_target".to_owned(), json!("all")),
            ("max_grad_norm".to_owned(), json!(1.0)),
        ];
        let patched = patched(text, &changes.into());
        assert_eq!(
            patched,
            "# my run\nlearning_rate: 2.0e-04 # too hot?\nlora_target: \"all\"\nbf16: true\nmax_grad_norm: 1.0\n"
        );
    }

    #[test]
    fn a_value_without_a_comment_is_kept_as_one_and_the_file_stays_yaml() {
        let patched =
            patched("learning_rate: 8.0e-03\nseed: 19\n", &[("learning_rate".to_owned(), json!(6.4e-4))].into());
        assert_eq!(patched, "learning_rate: 6.4e-04  # was 8.0e-03\nseed: 19\n");
        let back: BTreeMap<String, f64> = serde_yaml_ng::from_str(&patched).expect("yaml");
        assert_eq!(back["learning_rate"], 6.4e-4);
    }

    #[test]
    fn numbers_are_written_so_that_yaml_1_1_reads_numbers() {
        assert_eq!(scalar(&json!(1e-4)), "1.0e-04");
        assert_eq!(scalar(&json!(2.5e-5)), "2.5e-05");
        assert_eq!(scalar(&json!(0.02)), "0.02");
        assert_eq!(scalar(&json!(8)), "8");
    }

    #[test]
    fn json_configurations_stay_json() {
        let patched = patched("{\"seed\": 1, \"bf16\": true}", &[("seed".to_owned(), json!(2))].into());
        assert_eq!(serde_json::from_str::<Value>(&patched).expect("json"), json!({"seed": 2, "bf16": true}));
    }
}
