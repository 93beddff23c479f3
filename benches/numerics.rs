//! What checking every product costs: single products of a linear (one thread), and a whole window forward and backward
//! through a model of SmolLM2-135M's shape (all cores), alone and with checksums. The two take turns, so that whatever
//! else the machine does meets both.

use std::hint::black_box;
use std::sync::Arc;

mod smollm2;

use smollm2::{UNITS, adapter, asked_for, compare, window, write_model};
use spikeprobe::device::hooked::{Hook, Hooked};
use spikeprobe::device::{Compute, DType, Device, cpu::CpuDevice, noise};
use spikeprobe::model::{BaseModel, Engine, Gradients, PassOptions, PrecisionPlan};
use spikeprobe::numerics::Checksums;

/// Tokens of a window, hidden and feed-forward size of SmolLM2-135M.
const N: usize = 728;
const IN: usize = 576;
const OUT: usize = 1536;

/// `inner` with every product checked.
fn checked(inner: &Arc<dyn Device>) -> (Arc<dyn Device>, Arc<Checksums>) {
    let checksums = Arc::new(Checksums::on(Arc::clone(inner)));
    let hook = Arc::clone(&checksums) as Arc<dyn Hook>;
    (Arc::new(Hooked { inner: Arc::clone(inner), hook }), checksums)
}

fn products() {
    let plain: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1)).expect("one thread"));
    let (hooked, _) = checked(&plain);
    for (name, compute, dtype) in [("f32", Compute::F32, DType::F32), ("bf16", Compute::Bf16, DType::BF16)] {
        let random = |stream: u64, rows: usize, columns: usize| {
            let values: Vec<f32> = (0..(rows * columns) as u64).map(|k| noise::symmetric(1, stream, k)).collect();
            plain.upload(&values, &[rows, columns], dtype).expect("upload")
        };
        let (x, w, dy) = (random(0, N, IN), random(1, OUT, IN), random(2, N, OUT));
        let forward = |device: &Arc<dyn Device>| _ = black_box(device.linear(&x, &w, None, compute, dtype));
        let backward = |device: &Arc<dyn Device>| _ = black_box(device.linear_input_grad(&dy, &w, compute, dtype));
        compare(&format!("{name} {N}x{IN} to {OUT}"), 60, &mut || forward(&plain), &mut || forward(&hooked));
        compare(&format!("{name} its input gradient"), 60, &mut || backward(&plain), &mut || backward(&hooked));
    }
}

fn steps() {
    let dir = tempfile::tempdir().expect("a folder");
    write_model(dir.path(), 30);
    let base = Arc::new(BaseModel::open(dir.path()).expect("a model"));
    let plain: Arc<dyn Device> = Arc::new(CpuDevice::new(None).expect("threads"));
    let (hooked, checksums) = checked(&plain);
    let adapter = adapter(&*plain, &base.config);
    let batch = window(base.config.vocab);
    let seeds = vec![1e-3; UNITS];
    let bf16 = PrecisionPlan { base: DType::BF16, autocast: Some(DType::BF16), ..PrecisionPlan::F32 };
    for (name, plan) in [("f32", PrecisionPlan::F32), ("bf16", bf16)] {
        if !asked_for(name, &["f32", "bf16"]) {
            continue;
        }
        let engine = |device: &Arc<dyn Device>| Engine::new(Arc::clone(device), Arc::clone(&base), plan);
        let (alone, watched) = (engine(&plain).expect("an engine"), engine(&hooked).expect("an engine"));
        let pass = |engine: &Engine| {
            let mut gradients = Gradients::zeros(engine.device(), &adapter).expect("gradients");
            let options = PassOptions::default();
            black_box(engine.pass(&adapter, &batch, &seeds, &options, &mut gradients).expect("a pass"));
        };
        compare(&format!("{name} window, {} tokens", batch.tokens()), 40, &mut || pass(&alone), &mut || pass(&watched));
    }
    let (products, wrong) = checksums.found().expect("sums");
    println!("{products} products checked, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{:?}", wrong.first());
}

/// `cargo bench --bench numerics -- [products|steps] [f32|bf16]`; without a name, all.
fn main() {
    let parts = ["products", "steps"];
    if asked_for("products", &parts) {
        products();
    }
    if asked_for("steps", &parts) {
        steps();
    }
}
