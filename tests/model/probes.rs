//! Probes, planted faults, noise and dropout: what a pass does besides the plain computation.

use std::sync::Arc;

use serde_json::json;
use spikeprobe::device::DType;
use spikeprobe::model::{
    ActivationFlip, Adapter, BaseModel, Dropout, Engine, Gradients, Masks, Memory, ModelConfig, PassOptions,
    PassOutput, PrecisionPlan, Projection, Ragged, WeightFlip,
};
use spikeprobe::probe::{Part, Probes, Role, Site, first_out_of_range, least_headroom};
use spikeprobe::run::AdapterWeights;

use super::support::{all, cpu, random_adapter, random_rows, random_weights, write_safetensors};

type Weights = Vec<(String, Vec<usize>, Vec<f32>)>;

struct Model {
    _dir: tempfile::TempDir,
    base: Arc<BaseModel>,
    adapter: AdapterWeights,
}

/// A random llama whose weights `change` may alter.
fn model(change: impl FnOnce(&mut Weights)) -> Model {
    let config = json!({"model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "head_dim": 8});
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let parsed = ModelConfig::from_json(&config).unwrap();
    let mut weights = random_weights(&parsed, 7);
    change(&mut weights);
    write_safetensors(&dir.path().join("model.safetensors"), &weights);
    let base = Arc::new(BaseModel::open(dir.path()).unwrap());
    Model { base, adapter: random_adapter(&parsed, &all(), 3, 11), _dir: dir }
}

fn tensor<'w>(weights: &'w mut Weights, name: &str) -> &'w mut Vec<f32> {
    &mut weights.iter_mut().find(|(n, _, _)| n == name).unwrap().2
}

fn batch() -> Ragged {
    random_rows(61, &[&[13], &[7, 21], &[9, 1]], 3)
}

impl Model {
    fn pass(&self, plan: PrecisionPlan, options: &PassOptions) -> (PassOutput, Vec<Vec<f32>>) {
        let engine = Engine::new(cpu(2), Arc::clone(&self.base), plan).unwrap();
        let device = engine.device();
        let adapter = Adapter::new(device, &self.base.config, &all(), &self.adapter, 1.5, plan.adapter).unwrap();
        let mut gradients = Gradients::zeros(device, &adapter).unwrap();
        let out = engine.pass(&adapter, &batch(), &[0.02; 3], options, &mut gradients).unwrap();
        (out, gradients.tensors.iter().map(|t| device.download(t).unwrap()).collect())
    }
}

const FP16: PrecisionPlan = PrecisionPlan { autocast: Some(DType::F16), ..PrecisionPlan::F32 };

const UP: &str = "model.layers.1.mlp.up_proj.weight";

/// Channel 3 of the second block's MLP scaled by 2^17 and back: exact in f32 and bf16, too large for fp16.
fn overflowing() -> Model {
    model(|weights| {
        tensor(weights, UP)[3 * 24..4 * 24].iter_mut().for_each(|w| *w *= 131_072.0);
        tensor(weights, "model.layers.1.mlp.down_proj.weight")
            .iter_mut()
            .skip(3)
            .step_by(40)
            .for_each(|w| *w /= 131_072.0);
    })
}

fn up_output() -> Site {
    Site::block(1, Part::Projection(Projection::Up), Role::Output)
}

#[test]
fn the_first_site_out_of_range_is_the_layer_that_overflows() {
    let probes = PassOptions { probes: Probes::PerUnit, ..PassOptions::default() };
    let (out, _) = overflowing().pass(FP16, &probes);
    let first = first_out_of_range(&out.measurements).unwrap();
    assert_eq!(first.site, up_output());
    assert_eq!(first.site.to_string(), "layers.1.mlp.up_proj output");
    assert!(first.statistics.pos_inf + first.statistics.neg_inf > 0);
    let (healthy, _) = model(|_| ()).pass(FP16, &probes);
    assert_eq!(first_out_of_range(&healthy.measurements), None);
}

#[test]
fn an_f32_run_tells_where_fp16_would_overflow() {
    let options = PassOptions { probes: Probes::PerSite, probe_range: Some(DType::F16), ..PassOptions::default() };
    let (out, _) = overflowing().pass(PrecisionPlan::F32, &options);
    let first = first_out_of_range(&out.measurements).unwrap();
    assert_eq!((first.site, first.dtype, first.range), (up_output(), DType::F32, DType::F16));
    assert!(first.headroom() < 0.0 && first.statistics.overflow > 0);
    assert!(least_headroom(&out.measurements).unwrap().headroom() <= first.headroom());
}

#[test]
fn probes_change_no_bit_and_their_units_add_up() {
    let model = model(|_| ());
    let (plain, gradients) = model.pass(FP16, &PassOptions::default());
    assert!(plain.measurements.is_empty());
    let probed = |probes| model.pass(FP16, &PassOptions { probes, ..PassOptions::default() });
    let (per_unit, gradients_probed) = probed(Probes::PerUnit);
    assert_eq!((&plain.units, &gradients), (&per_unit.units, &gradients_probed));
    let (per_site, _) = probed(Probes::PerSite);
    for site in per_site.measurements {
        let units = per_unit.measurements.iter().filter(|m| m.site == site.site);
        let (count, elements, zeros) =
            units.fold((0, 0, 0), |(n, e, z), m| (n + 1, e + m.statistics.elements, z + m.statistics.zero));
        assert_eq!((count, elements, zeros), (3, site.statistics.elements, site.statistics.zero), "{}", site.site);
    }
}

#[test]
fn a_flipped_weight_is_the_model_with_that_weight() {
    // Bit 31 of an f32 is its sign.
    let weight_flips = vec![WeightFlip { tensor: "layers.1.mlp.up_proj".into(), element: 5, bit: 31 }];
    let options = PassOptions { weight_flips, ..PassOptions::default() };
    let flipped = model(|_| ()).pass(PrecisionPlan::F32, &options);
    let changed = model(|weights| tensor(weights, UP)[5] *= -1.0).pass(PrecisionPlan::F32, &PassOptions::default());
    assert_eq!(flipped, changed);
    assert_ne!(flipped, model(|_| ()).pass(PrecisionPlan::F32, &PassOptions::default()));
}

#[test]
fn a_flipped_activation_belongs_to_its_token_whatever_the_chunks() {
    let model = model(|_| ());
    let flip = |memory| {
        // Token 15 is the third of the second micro-batch's first row.
        let flip = ActivationFlip { site: up_output(), element: 15 * 40 + 2, bit: 14 };
        model.pass(FP16, &PassOptions { activation_flips: vec![flip], memory, ..PassOptions::default() })
    };
    let whole = flip(Memory::Chunks { tokens: 1000, recompute: false });
    assert_eq!(whole, flip(Memory::Chunks { tokens: 1, recompute: true }));
    let clean = model.pass(FP16, &PassOptions::default()).0;
    assert_eq!(whole.0.units[0], clean.units[0]);
    assert_ne!(whole.0.units[1], clean.units[1]);
    assert_eq!(whole.0.units[2], clean.units[2]);
}

#[test]
fn a_flip_of_nothing_is_an_error_that_names_it() {
    let model = model(|_| ());
    let engine = Engine::new(cpu(1), Arc::clone(&model.base), PrecisionPlan::F32).unwrap();
    let adapter = Adapter::new(engine.device(), &model.base.config, &all(), &model.adapter, 1.5, DType::F32).unwrap();
    for (tensor, element, bit) in
        [("model.layers.9.mlp.up_proj", 0, 0), ("layers.1.mlp.up_proj", 1 << 40, 0), ("layers.1.mlp.up_proj", 0, 32)]
    {
        let weight_flips = vec![WeightFlip { tensor: tensor.into(), element, bit }];
        let options = PassOptions { weight_flips, ..PassOptions::default() };
        let error = engine.losses(&adapter, &batch(), &options).unwrap_err().to_string();
        assert!(error.contains("mlp.up_proj"), "{error}");
    }
}

#[test]
fn noise_is_small_repeatable_and_its_seeds_differ() {
    let model = model(|_| ());
    let noisy = |seed| model.pass(PrecisionPlan::F32, &PassOptions { perturb: Some(seed), ..PassOptions::default() });
    let plain = model.pass(PrecisionPlan::F32, &PassOptions::default());
    let (a, b) = (noisy(1), noisy(2));
    assert_eq!(a, noisy(1));
    assert!(a.1 != b.1 && a.1 != plain.1);
    for (unit, noisy) in plain.0.units.iter().zip(&a.0.units) {
        assert!((noisy.loss_sum / unit.loss_sum - 1.0).abs() < 1e-5, "{noisy:?} {unit:?}");
    }
}

fn drawn(p: f64, seed: u64) -> Dropout {
    Dropout { p, masks: Masks::Drawn { seed } }
}

#[test]
fn noise_and_masks_do_not_depend_on_the_chunks() {
    let model = model(|_| ());
    let run = |options: &PassOptions, memory| {
        let whole = PrecisionPlan { autocast: Some(DType::BF16), ..PrecisionPlan::F32 };
        model.pass(whole, &PassOptions { memory, ..options.clone() })
    };
    let noise = PassOptions { perturb: Some(5), ..PassOptions::default() };
    let masks = PassOptions { dropout: Some(drawn(0.3, 9)), ..PassOptions::default() };
    let plain = run(&PassOptions::default(), Memory::Auto);
    for options in [noise, masks] {
        let whole = run(&options, Memory::Chunks { tokens: 1000, recompute: false });
        assert_ne!(whole.1, plain.1);
        for memory in [Memory::Chunks { tokens: 1, recompute: true }, Memory::Chunks { tokens: 30, recompute: false }] {
            assert_eq!(whole, run(&options, memory), "{options:?}, {memory:?}");
        }
    }
}

#[test]
fn dropout_touches_the_lora_branch_alone() {
    let mut model = model(|_| ());
    let dropped = |model: &Model, seed| {
        let dropout = Some(drawn(0.5, seed));
        model.pass(PrecisionPlan::F32, &PassOptions { dropout, ..PassOptions::default() })
    };
    let plain = model.pass(PrecisionPlan::F32, &PassOptions::default());
    assert_eq!(dropped(&model, 1), dropped(&model, 1));
    assert_ne!(dropped(&model, 1).0, dropped(&model, 2).0);
    assert_ne!(dropped(&model, 1).0, plain.0);
    // With B = 0 the branch adds nothing, dropped or not.
    model.adapter.modules.iter_mut().for_each(|m| m.b.fill(0.0));
    let plain = model.pass(PrecisionPlan::F32, &PassOptions::default());
    let losses = |out: &PassOutput| out.units.iter().map(|u| u.loss_sum).collect::<Vec<_>>();
    assert_eq!(losses(&dropped(&model, 1).0), losses(&plain.0));
}
