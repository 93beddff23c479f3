//! Runs made up of a YAML, versions and log rows.

pub use serde_json::{Value, json};
pub use spikeprobe::inspect::{Code, Finding, Severity, inspect};
pub use spikeprobe::run::Run;

pub use crate::run::{Folder, fixture};

pub const FOUR: &str = "{\"transformers\": \"4.48.2\", \"accelerate\": \"1.2.1\", \"llamafactory\": \"0.9.2\"}";

/// A run with this YAML, and trainer_state.json of these log entries.
pub fn with_state(yaml: &str, versions: &str, entries: &[Value]) -> Folder {
    let folder = Folder::new(&format!("logging_steps: 1\nlearning_rate: 1e-4\nwarmup_ratio: 0.1\n{yaml}"));
    folder.write("versions.json", versions);
    let total = entries.iter().filter_map(|e| e["step"].as_u64()).max().unwrap_or(0);
    let state = json!({"global_step": total, "max_steps": total, "num_train_epochs": 2, "log_history": entries});
    // NaN as Python writes it.
    folder.write("out/trainer_state.json", &state.to_string().replace("\"NaN\"", "NaN"));
    folder
}

pub fn five(yaml: &str, entries: &[Value]) -> Folder {
    with_state(yaml, "{\"transformers\": \"5.6.0\", \"accelerate\": \"1.11.0\", \"llamafactory\": \"0.9.5\"}", entries)
}

pub fn row(step: u64, loss: Value, norm: Value) -> Value {
    json!({"step": step, "epoch": step as f64 / 10.0, "loss": loss, "grad_norm": norm, "learning_rate": 1e-4})
}

pub fn healthy(count: u64) -> Vec<Value> {
    (1..=count).map(|s| row(s, json!(2.0 - 0.01 * s as f64 + 1e-7), json!(1.5 + 0.01 * s as f64))).collect()
}

pub fn with(count: u64, changed: Value) -> Vec<Value> {
    let mut rows = healthy(count);
    let at = changed["step"].as_u64().unwrap() as usize - 1;
    rows[at] = changed;
    rows
}

pub fn codes(run: &Run) -> Vec<&'static str> {
    inspect(run).iter().map(|f| f.code.word()).collect()
}

/// The finding of this code, which must be there.
#[track_caller]
pub fn finding(run: &Run, code: Code) -> Finding {
    let all = inspect(run);
    all.iter().find(|f| f.code == code).unwrap_or_else(|| panic!("no {} in {all:#?}", code.word())).clone()
}

pub fn version_log(name: &str, run: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(fixture(&format!("vectors/version_logs/{name}.json"))).unwrap();
    let log: Value = serde_json::from_str(&text).unwrap();
    log["runs"][run]["log_history"].as_array().unwrap().clone()
}
