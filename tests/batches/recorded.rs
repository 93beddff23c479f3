//! Whole recorded runs: tokens, splits and orders against what LLaMA-Factory fetched, row by row.

use std::path::{Path, PathBuf};

use serde_json::Value;
use spikeprobe::batches::{Corpus, Field, MicroBatch, Plan};
use spikeprobe::run::Run;

use super::common::*;

fn recorded() -> PathBuf {
    fixtures().join("batches/recorded")
}

/// Opens `folder`/train.yaml with its data beside it and the tiny tokenizer of all these runs.
fn open_recorded(folder: &Path) -> Run {
    let set = |key: &str, path: PathBuf| (key.to_string(), path.display().to_string());
    let overrides = [
        set("model_name_or_path", fixtures().join("batches/tiny")),
        set("dataset_dir", folder.join("data")),
        set("output_dir", folder.join("out")),
    ];
    let beside = folder.join("versions.json").is_file();
    let versions: Vec<(String, String)> =
        if beside { Vec::new() } else { NEWEST.iter().map(|&(p, v)| (p.into(), v.into())).collect() };
    Run::open(&folder.join("train.yaml"), folder, &overrides, &versions)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Step a run's configuration resumes from, by its own words.
fn resumed_from(run: &Run) -> Option<u64> {
    let path = run.config.written.get("resume_from_checkpoint")?;
    path.as_str()?.rsplit_once("checkpoint-")?.1.trim_end_matches('/').parse().ok()
}

/// Holds the plan against order.jsonl: the rows of every batch fetched, one line a batch; of a run with a
/// validation split, positions in what is left to train on. Evaluations fetch their rows in between. Where batches
/// of an epoch are never trained, the loader still fetched one ahead before the epoch was given up.
fn compare_order(folder: &Path, run: &Run, corpus: &Corpus, plan: &Plan) {
    let fetched: Vec<Vec<u32>> = lines(&folder.join("order.jsonl")).iter().map(integers).collect();
    let evaluation: Vec<Vec<u32>> = corpus
        .eval
        .iter()
        .flat_map(|(_, rows)| {
            let positions: Vec<u32> = (0..rows.len() as u32).collect();
            positions.chunks(run.config.per_device_eval_batch_size).map(<[u32]>::to_vec).collect::<Vec<_>>()
        })
        .collect();
    let mut rest = fetched.as_slice();
    let mut last_epoch = 0;
    for step in plan.steps() {
        let window = plan.window(step).unwrap();
        for micro in &window.micro_batches {
            let row = |&i: &usize| if run.config.val_size > 0.0 { i as u32 } else { corpus.train[i].row.row };
            let rows: Vec<u32> = micro.examples.iter().map(row).collect();
            if rest.first() != Some(&rows) && !evaluation.is_empty() && rest.starts_with(&evaluation) {
                rest = &rest[evaluation.len()..];
            }
            if rest.first() != Some(&rows) && window.epoch_index != last_epoch {
                rest = &rest[1..];
                last_epoch = window.epoch_index;
            }
            let line = fetched.len() - rest.len() + 1;
            assert_eq!(rest.first(), Some(&rows), "{}: step {step}, line {line}", folder.display());
            rest = &rest[1..];
        }
        last_epoch = window.epoch_index;
    }
    // The last step's evaluation, and the one after training.
    while !evaluation.is_empty() && rest.starts_with(&evaluation) {
        rest = &rest[evaluation.len()..];
    }
    assert!(rest.len() <= 1, "{}: batches were fetched after the last: {rest:?}", folder.display());
}

/// micro.jsonl: step before, N and predicted labels of every micro-batch that was trained.
fn compare_micro(folder: &Path, corpus: &Corpus, plan: &Plan) {
    let path = folder.join("micro.jsonl");
    if !path.is_file() {
        return;
    }
    let expected = lines(&path);
    let tokens =
        |micro: &MicroBatch| micro.examples.iter().map(|&i| corpus.train[i].label_tokens() as u64).sum::<u64>();
    let found: Vec<(u64, u64)> = plan
        .steps()
        .flat_map(|step| plan.window(step).unwrap().micro_batches)
        .map(|micro| (micro.fetched.num_items, tokens(&micro)))
        .collect();
    let expected: Vec<(u64, u64)> =
        expected.iter().map(|row| (row["N"].as_u64().unwrap_or(0), integer(&row["tokens"]))).collect();
    assert_eq!(found, expected, "{}", folder.display());
}

fn compare(folder: &Path) {
    let run = open_recorded(folder);
    let corpus = Corpus::load(&run, &run.config).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let plan = Plan::new(&corpus, &run.config, &run.semantics, resumed_from(&run)).unwrap();
    compare_order(folder, &run, &corpus, &plan);
    compare_micro(folder, &corpus, &plan);
    for example in &corpus.train {
        assert_eq!(example.input_ids.len(), example.labels.len());
        let covered = example.spans.iter().try_fold(0, |end, (range, _)| (range.start == end).then_some(range.end));
        assert_eq!(covered, Some(example.input_ids.len()), "spans do not cover {:?}", example.row);
    }
}

#[test]
fn recorded_runs_fetch_the_rows_that_order_jsonl_names() {
    let folders: Vec<PathBuf> = std::fs::read_dir(recorded()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(folders.len() >= 6);
    for folder in folders {
        compare(&folder);
    }
}

/// Set SPIKEPROBE_RUNS to a folder of more such runs to hold them all.
#[test]
fn every_run_of_spikeprobe_runs_fetches_the_rows_that_order_jsonl_names() {
    let Some(folder) = std::env::var_os("SPIKEPROBE_RUNS") else {
        eprintln!("skipped: SPIKEPROBE_RUNS is not set");
        return;
    };
    let mut compared = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let folder = entry.unwrap().path();
        if folder.join("order.jsonl").is_file() {
            compare(&folder);
            compared += 1;
        }
    }
    assert!(compared > 0, "no run with an order.jsonl");
    eprintln!("{compared} runs compared");
}

#[test]
fn a_validation_split_leaves_disjoint_rows_in_the_order_of_the_permutation() {
    let run = open_recorded(&recorded().join("l3-eval-works"));
    let corpus = Corpus::load(&run, &run.config).unwrap();
    let [(name, eval)] = corpus.eval.as_slice() else { panic!("one eval set") };
    assert_eq!((name.as_str(), eval.len()), ("", (corpus.train.len() + eval.len()).div_ceil(10)));
    let mut rows: Vec<u32> = corpus.train.iter().chain(eval).map(|example| example.row.row).collect();
    rows.sort_unstable();
    assert!(rows.iter().copied().eq(0..rows.len() as u32));
}

#[test]
fn an_eval_dataset_of_0_9_2_keeps_its_name() {
    let run = open_recorded(&recorded().join("n8-evaldataset448-llama-bf16"));
    let corpus = Corpus::load(&run, &run.config).unwrap();
    let sets: Vec<&str> = corpus.eval.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(sets, ["holdout"]);
    let names: Vec<&str> = corpus.datasets.iter().map(|dataset| dataset.name.as_str()).collect();
    assert_eq!(names, ["train", "holdout"]);
    assert!(corpus.eval[0].1.iter().all(|example| example.row.dataset == 1));
}

#[test]
fn a_row_whose_answer_is_cut_away_has_no_label_and_its_text_can_be_read_again() {
    let run = open_recorded(&recorded().join("c3-allmasked-qwen3-bf16-acc8"));
    let corpus = Corpus::load(&run, &run.config).unwrap();
    let masked: Vec<_> = corpus.train.iter().filter(|example| example.unshifted_label_tokens() == 0).collect();
    assert!(!masked.is_empty());
    for example in masked {
        assert_eq!(example.input_ids.len(), run.config.cutoff_len);
        let text = corpus.row_text(example.row).unwrap();
        assert!(text.turns[0].0.len() > 1000, "the prompt that crowded the answer out");
        assert!(example.spans.iter().all(|(_, field)| *field != Field::Assistant(0)));
    }
    let gone = spikeprobe::batches::RowId { dataset: 0, row: 1_000_000 };
    assert!(corpus.row_text(gone).unwrap_err().to_string().contains("row 1000000"));
}
