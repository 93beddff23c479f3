//! Half precision, site by site, against what PyTorch computed and against fp64 (fixtures/model/record.py).

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use spikeprobe::device::DType;
use spikeprobe::model::{Adapter, BaseModel, Engine, Gradients, Memory, PassOptions, PrecisionPlan, Ragged, Row};
use spikeprobe::probe::{Probes, Role};
use spikeprobe::run::{AdapterModule, AdapterWeights};

use super::support::{all, cpu, relative_l2};

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/model")
}

/// Tensors of a file as f32, with their stored dtype.
fn read(name: &str) -> HashMap<String, (DType, Vec<f32>)> {
    let bytes = std::fs::read(fixtures().join(format!("{name}.safetensors"))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let widen = |view: safetensors::tensor::TensorView<'_>| {
        let halves = || view.data().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match view.dtype() {
            safetensors::Dtype::BF16 => (DType::BF16, halves().map(|b| half::bf16::from_bits(b).to_f32()).collect()),
            safetensors::Dtype::F16 => (DType::F16, halves().map(|b| half::f16::from_bits(b).to_f32()).collect()),
            _ => {
                let words = view.data().chunks_exact(4);
                (DType::F32, words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
            }
        }
    };
    file.iter().map(|(name, view)| (name.to_owned(), widen(view))).collect()
}

fn adapter(model: &str) -> AdapterWeights {
    let mut tensors = read(&format!("{model}-adapter"));
    let mut modules = Vec::new();
    for layer in 0..2 {
        for projection in spikeprobe::model::Projection::ALL {
            let path = projection.path(layer);
            let mut take = |ab: &str| tensors.remove(&format!("{path}.lora_{ab}")).unwrap().1;
            let (a, b) = (take("A"), take("B"));
            modules.push(AdapterModule { path, rank: 4, fan_in: a.len() / 4, fan_out: b.len() / 4, a, b });
        }
    }
    AdapterWeights { modules, stored: "F32".into() }
}

/// Site name → (dtype, values), every gradient divided by the loss scale; and the losses.
type Sites = HashMap<String, (DType, Vec<f32>)>;

fn ours(model: &str, plan: PrecisionPlan, scale: f32) -> (Sites, Vec<f32>) {
    let rows: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("rows.json")).unwrap()).unwrap();
    let parsed: Vec<(Vec<u32>, Vec<i32>)> = serde_json::from_value(rows["rows"].clone()).unwrap();
    let seeds: Vec<f32> = serde_json::from_value(rows["seeds"].clone()).unwrap();
    let base = Arc::new(BaseModel::open(&fixtures().join(model)).unwrap());
    let engine = Engine::new(cpu(1), Arc::clone(&base), plan).unwrap();
    let adapter = Adapter::new(engine.device(), &base.config, &all(), &adapter(model), 2.0, plan.adapter).unwrap();
    let mut gradients = Gradients::zeros(engine.device(), &adapter).unwrap();
    let batch =
        Ragged::build(parsed.iter().map(|(ids, labels)| [Row { ids, labels, pack: None }]), base.config.vocab).unwrap();
    let seeds: Vec<f32> = seeds.iter().map(|s| s * scale).collect();
    let memory = Memory::Chunks { tokens: 1000, recompute: false };
    let options = PassOptions { probes: Probes::Values, memory, ..PassOptions::default() };
    let out = engine.pass(&adapter, &batch, &seeds, &options, &mut gradients).unwrap();
    let mut sites = Sites::new();
    for m in out.measurements {
        let values = m.values.unwrap();
        if matches!(m.site.role, Role::LoraAGrad | Role::LoraBGrad) {
            for (unit, part) in values.chunks(values.len() / 2).enumerate() {
                sites.insert(format!("{} {unit}", m.site), (m.dtype, part.to_vec()));
            }
        } else {
            sites.insert(m.site.to_string(), (m.dtype, values));
        }
    }
    (sites, out.units.iter().map(|u| u.loss_sum).collect())
}

/// Share of equal elements; NaN equals nothing. An f32 tensor of a half plan has no rounding of the plan's: there a
/// difference in the order of a sum, up to 1e-6 of the largest element, is none.
fn equal_share(dtype: DType, a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let slack = if dtype == DType::F32 { 1e-6 * b.iter().fold(0f32, |m, x| m.max(x.abs())) } else { 0.0 };
    a.iter().zip(b).filter(|(x, y)| (*x - *y).abs() <= slack).count() as f64 / a.len() as f64
}

/// Activations and gradients up to layer 0's output; activations alone where the processor lacks the instruction in
/// whose order the reference was summed, which gradients have followed through the whole model by then.
fn is_early(name: &str, activations_alone: bool) -> bool {
    (name.starts_with("layers.0.") || name.starts_with("embed_tokens"))
        && (name.ends_with("output") || !activations_alone)
}

/// Compares every site that PyTorch recorded. `PRINT_SITES` in the environment prints the table.
fn assert_matches_pytorch(model: &str, name: &str, plan: PrecisionPlan, scale: f32) {
    let recorded = read(&format!("{model}-{name}"));
    let exact = read(&format!("{model}-exact-{}", if plan.base == DType::F32 { "float32" } else { "bfloat16" }));
    let (sites, losses) = ours(model, plan, scale);
    let print = std::env::var_os("PRINT_SITES").is_some();
    let activations_alone = plan.linear() != DType::F16 && !cpu(1).fingerprint().contains("bf16");
    let (mut early, mut early_equal) = (0.0, 0.0);
    let mut failures = Vec::new();
    let mut names: Vec<&String> = recorded.keys().collect();
    names.sort();
    for site in names {
        let (dtype, theirs) = &recorded[site];
        if let Some(unit) = site.strip_prefix("loss ") {
            let (loss, exact) = (losses[unit.parse::<usize>().unwrap()], exact[site].1[0]);
            let (error, own) = ((loss - exact).abs(), (theirs[0] - exact).abs());
            assert!(error <= 1.5 * own + 1e-4 * exact, "{model} {name}: loss {loss}, {} {exact}", theirs[0]);
            continue;
        }
        let (our_dtype, values) = sites.get(site).unwrap_or_else(|| panic!("{site} was not measured"));
        let is_adapter_gradient = site.contains("_A gradient") || site.contains("_B gradient");
        assert!(is_adapter_gradient || our_dtype == dtype, "{model} {name}, {site}: {our_dtype:?}, not {dtype:?}");
        let backward = site.contains("gradient");
        let unscaled = |v: &[f32]| v.iter().map(|x| if backward { x / scale } else { *x }).collect::<Vec<_>>();
        let exact = &exact[site].1;
        let (error, own) = (relative_l2(&unscaled(values), exact), relative_l2(&unscaled(theirs), exact));
        let equal = equal_share(*dtype, values, theirs);
        if print {
            println!("{model} {name} {site}: equal {equal:.4}, error {error:.3e}, PyTorch's {own:.3e}");
        }
        if is_early(site, activations_alone) {
            early += values.len() as f64;
            early_equal += equal * values.len() as f64;
        }
        // f32 sites of a half plan carry only noise of the last f32 bit.
        if error.is_nan() || error > 1.5 * own + 1e-6 {
            failures.push(format!("{site}: error {error:e}, PyTorch's own {own:e}"));
        }
    }
    assert!(failures.is_empty(), "{model} {name}:\n{}", failures.join("\n"));
    let share = early_equal / early;
    assert!(share >= 0.995, "{model} {name}: {share} of layer 0's elements are PyTorch's");
}

fn plan(base: DType, autocast: Option<DType>) -> PrecisionPlan {
    PrecisionPlan { base, autocast, ..PrecisionPlan::F32 }
}

#[test]
fn bf16_autocast_over_a_bf16_base() {
    let plan = plan(DType::BF16, Some(DType::BF16));
    assert_matches_pytorch("qwen2", "bf16-over-bf16", plan, 1.0);
    assert_matches_pytorch("qwen3", "bf16-over-bf16", plan, 1.0);
}

#[test]
fn bf16_autocast_over_an_f32_base() {
    assert_matches_pytorch("qwen2", "bf16-over-f32", plan(DType::F32, Some(DType::BF16)), 1.0);
}

#[test]
fn fp16_autocast_over_an_f32_base() {
    assert_matches_pytorch("qwen2", "fp16-over-f32", plan(DType::F32, Some(DType::F16)), 256.0);
}

#[test]
fn fp16_autocast_over_a_bf16_base_widens_the_residual_stream() {
    let plan = plan(DType::BF16, Some(DType::F16));
    assert_matches_pytorch("qwen2", "fp16-over-bf16", plan, 256.0);
    assert_matches_pytorch("qwen3", "fp16-over-bf16", plan, 256.0);
}

#[test]
fn a_bf16_base_without_autocast_runs_lora_branches_in_f32() {
    assert_matches_pytorch("qwen2", "bf16-no-autocast", plan(DType::BF16, None), 1.0);
}
