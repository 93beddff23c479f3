use spikeprobe::{diagnosis::detect, run::LogRow};
fn main() {
    for dir in std::env::args().skip(1) {
        let text = std::fs::read_to_string(format!("{dir}/out/trainer_state.json"))
            .unwrap()
            .replace("NaN", "\"nan\"")
            .replace("Infinity", "\"inf\"");
        let v: serde_json::Value = serde_json::from_str(&text).unwrap();
        let num = |x: &serde_json::Value| x.as_f64().or_else(|| x.as_str().map(|_| f64::NAN));
        let rows: Vec<LogRow> = v["log_history"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|h| h.get("loss").is_some())
            .map(|h| LogRow {
                attempt: 0,
                step: h["step"].as_u64().unwrap(),
                window: 1,
                epoch: None,
                loss: num(&h["loss"]),
                grad_norm: num(&h["grad_norm"]),
                learning_rate: None,
                total_steps: None,
                source: String::new(),
            })
            .collect();
        let t: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(format!("{dir}/truth.json")).unwrap()).unwrap();
        let yaml = std::fs::read_to_string(format!("{dir}/train.yaml")).unwrap();
        let ctx = detect::Context {
            loss_scaling: yaml.contains("fp16: true"),
            rounds_loss: dir.contains("/n"),
            vocab_size: Some(2048),
            accumulation: if yaml.contains("accumulation_steps: 8") { 8 } else { 1 },
        };
        println!("{} truth {} @{}", dir.rsplit('/').next().unwrap(), t["expected_cause"], t["spike_step"]);
        for f in detect::spikes(&rows, &ctx) {
            println!("    {:>4}-{:<4} {:?} {:.4?} -> {:.4} h {:.2}", f.step, f.until, f.kind, f.before, f.at, f.height);
        }
    }
}
