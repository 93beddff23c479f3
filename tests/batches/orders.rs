//! Generators, permutations, splits and lengths against torch, numpy and LLaMA-Factory.

use serde_json::Value;
use spikeprobe::batches::{Mt19937, greedy_knapsack, infer_seqlen, randperm, split};

use super::common::*;

fn assert_order(found: &[u32], expected: &Value, what: &str) {
    let edge = |list: &Value| integers(list);
    let (first, last) = (edge(&expected["first"]), edge(&expected["last"]));
    assert_eq!(&found[..first.len()], first, "{what}: first");
    assert_eq!(&found[found.len() - last.len()..], last, "{what}: last");
    assert_eq!(sha256_le_i64(found), expected["sha256_le_i64"].as_str().unwrap(), "{what}: hash");
    if let Some(full) = expected.get("full").filter(|full| !full.is_null()) {
        assert_eq!(found, integers(full), "{what}: full");
    }
}

#[test]
fn mt19937_draws_what_torch_draws() {
    let expected = integers(&vector("randperm.json")["mt19937_first_u32_seed42"]);
    let mut generator = Mt19937::new(42);
    let found: Vec<u32> = expected.iter().map(|_| generator.next_u32()).collect();
    assert_eq!(found, expected);
}

#[test]
fn randperm_equals_torch_for_every_seed_and_length() {
    let vectors = vector("randperm.json");
    let cases = vectors["cases"].as_array().unwrap();
    assert!(cases.len() >= 10, "only {} cases", cases.len());
    for case in cases {
        let (seed, n) = (integer(&case["seed"]), integer(&case["n"]) as u32);
        assert_order(&randperm(seed, n), case, &format!("seed {seed}, n {n}"));
    }
}

#[test]
fn val_size_takes_the_rows_that_datasets_takes_in_its_order() {
    let vectors = vector("val_split.json");
    let cases = vectors["cases"].as_array().unwrap();
    assert!(cases.len() >= 5, "only {} cases", cases.len());
    for case in cases {
        let (n, seed) = (integer(&case["n"]) as u32, integer(&case["seed"]));
        let what = format!("n {n}, seed {seed}, val_size {}", case["val_size"]);
        let (train, test) = split(n, case["val_size"].as_f64().unwrap(), seed).unwrap().expect("a split");
        assert_eq!(test.len() as u64, integer(&case["n_test"]), "{what}");
        assert_eq!(train.len() as u64, integer(&case["n_train"]), "{what}");
        assert_order(&test, &case["test"], &format!("{what}: test"));
        assert_order(&train, &case["train"], &format!("{what}: train"));
    }
}

#[test]
fn val_size_that_leaves_nothing_or_is_one_is_an_error_and_zero_is_no_split() {
    assert_eq!(split(10, 0.0, 42).unwrap(), None);
    assert_eq!(split(10, 1e-7, 42).unwrap(), None);
    for bad in [1.0, 10.0, 11.0, 0.95, f64::INFINITY] {
        let message = split(10, bad, 42).expect_err("no row left to train on").to_string();
        assert!(message.contains("val_size"), "{bad}: {message}");
    }
}

#[test]
fn numpy_legacy_stream_permutes_and_chooses_as_num_samples_needs() {
    let vectors = vector("numpy_legacy.json");
    for case in vectors["cases"].as_array().unwrap() {
        let (seed, n) = (integer(&case["seed"]), integer(&case["n"]) as u32);
        let mut generator = Mt19937::new(seed);
        assert_eq!(generator.numpy_permutation(n), integers(&case["permutation"]), "seed {seed}, n {n}");
        assert_eq!(generator.numpy_choice(n, 10), integers(&case["then_choice_10"]), "seed {seed}, n {n}");
    }
}

#[test]
fn infer_seqlen_truncates_as_llamafactory_does() {
    let cases = vector("infer_seqlen.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() > 300);
    for case in cases {
        let [source, target, cutoff, new_source, new_target] = integers(case)[..] else { panic!("{case}") };
        let found = infer_seqlen(source as usize, target as usize, cutoff as usize);
        assert_eq!(found, (new_source as usize, new_target as usize), "{case}");
    }
}

#[test]
fn packed_rows_are_filled_as_llamafactory_fills_its_knapsacks() {
    let cases = vector("greedy_knapsack.json");
    for case in cases.as_array().expect("cases") {
        let lengths: Vec<usize> = integers(&case["lengths"]).into_iter().map(|l| l as usize).collect();
        let found = greedy_knapsack(lengths, integer(&case["capacity"]) as usize);
        assert_eq!(serde_json::to_value(&found).unwrap(), case["out"], "{case}");
    }
    assert_eq!(greedy_knapsack(vec![3, 11], 10), [vec![3]], "what fits nowhere ends the distribution");
}

/// `torch.manual_seed(42)`, then `bernoulli_(0.9)` of 1000 and `bernoulli_(0.3)` of 96 elements and `random_()` of int32
/// (torch 2.15, AMD).
#[test]
fn masks_are_the_ones_that_torch_draws() {
    let mut generator = Mt19937::new(42);
    let mut first = vec![0; 32];
    generator.bernoulli(0.9, 1000, &mut first, 0);
    assert_eq!(first[..4], [0xfbff_ff3f, 0xff7f_eeff, 0xbbdf_ff7f, 0xffaf_fff7]);
    assert_eq!(first.iter().map(|word| word.count_ones()).sum::<u32>(), 903);
    let mut second = vec![0; 4];
    generator.bernoulli(0.3, 96, &mut second, 32);
    assert_eq!(second, [0, 0x8242_44a1, 0x1b98_6011, 0x00e6_193c]);
    generator.next_u32();
    generator.next_u32();
    assert_eq!(generator.next_u32() & 0x7fff_ffff, 800_746_224);

    let mut skipped = Mt19937::new(42);
    skipped.skip(2 * 1096 + 3);
    assert_eq!(skipped, generator);
    let (state, next) = generator.parts();
    assert_eq!(Mt19937::resumed(state, next).as_ref(), Some(&generator));
    assert!(Mt19937::resumed(&state[1..], next).is_none() && Mt19937::resumed(state, 625).is_none());
}
