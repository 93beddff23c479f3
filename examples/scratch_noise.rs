use spikeprobe::{diagnosis::detect, run::LogRow};
fn main() {
    let mut x: u64 = 88172645463325252;
    let mut uni = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) as f64 / (1u64 << 53) as f64
    };
    for shape in ["flat", "decay", "staircase", "alternate", "rare"] {
        for sigma in [0.01, 0.05, 0.15, 0.3, 0.6] {
            let mut bad = 0;
            let mut hs: Vec<f64> = vec![];
            for _ in 0..200 {
                let rows: Vec<LogRow> = (1..=300u64)
                    .map(|step| {
                        let g = (-2.0 * uni().max(1e-12).ln()).sqrt() * (6.28318 * uni()).cos();
                        let t = step as f64;
                        let base = match shape {
                            "flat" => 2.0,
                            "decay" => 0.5 + 3.0 * (-t / 40.0).exp(),
                            "staircase" => 3.0 * 0.75f64.powf((t / 60.0).floor()),
                            "alternate" => {
                                if step % 2 == 0 {
                                    1.0
                                } else {
                                    2.0
                                }
                            }
                            _ => {
                                if uni() < 0.15 {
                                    2.5
                                } else {
                                    1.0
                                }
                            }
                        };
                        LogRow {
                            attempt: 0,
                            step,
                            window: 1,
                            epoch: None,
                            loss: Some(base * (sigma * g).exp()),
                            grad_norm: None,
                            learning_rate: None,
                            total_steps: None,
                            source: String::new(),
                        }
                    })
                    .collect();
                let f = detect::spikes(&rows, &Default::default());
                if !f.is_empty() {
                    bad += 1;
                    hs.extend(f.iter().map(|f| f.height));
                }
            }
            hs.sort_by(f64::total_cmp);
            println!(
                "{shape} {sigma}: {bad}/200 runs, n {} median h {:?} max {:?}",
                hs.len(),
                hs.get(hs.len() / 2),
                hs.last()
            );
        }
    }
}
