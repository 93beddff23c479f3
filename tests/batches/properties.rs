//! Properties of readers, encodings and windows over generated inputs.

use std::collections::HashMap;

use proptest::prelude::*;
use spikeprobe::batches::*;
use spikeprobe::run::{ResumeOrder, TrainConfig, TrainerSemantics, WindowRule};

use super::common::*;

fn rule() -> impl Strategy<Value = WindowRule> {
    prop_oneof![
        Just(WindowRule::AcrossEpochs),
        Just(WindowRule::FloorAcross),
        Just(WindowRule::FloorLeak),
        Just(WindowRule::Ceil)
    ]
}

/// A plan over generated geometry; `None` where it is refused or there is no batch.
#[derive(Debug, Clone)]
struct Case {
    rows: u32,
    batch: usize,
    accumulation: usize,
    world: usize,
    epochs: f64,
    seed: u64,
    rule: WindowRule,
    restarts: bool,
}

fn case() -> impl Strategy<Value = Case> {
    (1u32..60, 1usize..5, 1usize..7, 1usize..4, 0.3f64..4.0, 0u64..100, rule(), any::<bool>()).prop_map(
        |(rows, batch, accumulation, world, epochs, seed, rule, restarts)| Case {
            rows,
            batch,
            accumulation,
            world,
            epochs,
            seed,
            rule,
            restarts,
        },
    )
}

impl Case {
    fn settings(&self) -> (TrainConfig, TrainerSemantics) {
        let (mut config, mut semantics) = geometry("", NEWEST);
        config.per_device_train_batch_size = self.batch;
        config.gradient_accumulation_steps = self.accumulation;
        config.world_size = self.world;
        config.num_train_epochs = self.epochs;
        config.seed = self.seed;
        semantics.windows = self.rule;
        semantics.resume_restarts_count = self.restarts || self.rule == WindowRule::FloorLeak;
        semantics.resume_order = ResumeOrder::Right;
        (config, semantics)
    }

    fn counts(&self) -> Vec<u32> {
        (0..self.rows).map(|row| row % 11).collect()
    }

    fn plan(&self, resumed_from: Option<u64>) -> Option<Plan> {
        let (config, semantics) = self.settings();
        Plan::of_counts(self.counts(), &config, &semantics, resumed_from).ok()
    }
}

fn windows(plan: &Plan) -> Vec<Window> {
    plan.steps().map(|step| plan.window(step).unwrap()).collect()
}

proptest! {
    #[test]
    fn no_row_is_trained_twice_in_an_epoch_and_none_is_lost_where_windows_end_with_the_epoch(case in case()) {
        prop_assume!(case.world == 1);
        let Some(plan) = case.plan(None) else { return Ok(()) };
        let mut seen: HashMap<usize, usize> = HashMap::new();
        let windows = windows(&plan);
        for window in &windows {
            for row in window.micro_batches.iter().flat_map(|micro| &micro.examples) {
                *seen.entry(*row).or_default() += 1;
            }
        }
        let most = case.epochs.ceil() as usize;
        prop_assert!(seen.values().all(|&times| times <= most), "{seen:?}");
        if case.rule == WindowRule::Ceil && case.epochs.fract() == 0.0 {
            prop_assert!((0..case.rows as usize).all(|row| seen.get(&row) == Some(&most)));
        }
        prop_assert!(windows.len() as u64 <= plan.total_steps);
        if case.rule == WindowRule::Ceil {
            prop_assert_eq!(windows.len() as u64, plan.total_steps);
        }
    }

    #[test]
    fn epochs_ascend_and_every_micro_batch_counts_the_labels_it_was_fetched_with(case in case()) {
        let Some(plan) = case.plan(None) else { return Ok(()) };
        let counts = case.counts();
        let mut last = 0.0;
        for window in windows(&plan) {
            prop_assert!(window.epoch > last);
            last = window.epoch;
            prop_assert!(!window.micro_batches.is_empty());
            let leaks = window.micro_batches.iter().any(|micro| micro.fetched.leaked);
            if !leaks && case.rule != WindowRule::AcrossEpochs {
                let total: u64 = window.micro_batches.iter().flat_map(|m| &m.examples).map(|&i| u64::from(counts[i])).sum();
                prop_assert!(window.micro_batches.iter().all(|micro| micro.fetched.num_items == total));
                let fetched = window.micro_batches.len() / case.world;
                prop_assert!(window.micro_batches.iter().all(|micro| micro.fetched.micro_batches as usize == fetched));
            }
        }
    }

    #[test]
    fn a_resume_of_the_newest_trainer_goes_on_as_if_nothing_had_happened(case in case(), at in 0.0f64..1.0) {
        let case = Case { rule: WindowRule::Ceil, restarts: false, ..case };
        let Some(whole) = case.plan(None) else { return Ok(()) };
        let step = (at * whole.total_steps as f64) as u64;
        let Some(resumed) = case.plan(Some(step)) else { return Ok(()) };
        prop_assert_eq!(*resumed.steps().end(), *whole.steps().end());
        for step in resumed.steps() {
            prop_assert_eq!(resumed.window(step).unwrap(), whole.window(step).unwrap());
        }
    }

    #[test]
    fn a_split_is_a_partition(rows in 2u32..500, fraction in 0.01f64..0.9, seed in any::<u32>()) {
        if let Ok(Some((train, test))) = split(rows, fraction, u64::from(seed)) {
            prop_assert_eq!(test.len(), (fraction * f64::from(rows)).ceil() as usize);
            let mut all: Vec<u32> = train.into_iter().chain(test).collect();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(0..rows));
        }
    }

    #[test]
    fn readers_of_rows_survive_any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..300), csv in any::<bool>()) {
        let mut seen = Seen::default();
        let mut rows = 0;
        let outcome = parse_rows(if csv { "csv" } else { "json" }, &mut bytes.as_slice(), &mut seen, &mut |_, row| {
            rows += 1;
            for formatting in [Formatting::Alpaca, Formatting::ShareGpt] {
                let _ = align(&row, &Columns { formatting, ..Columns::default() });
            }
            Ok(true)
        });
        prop_assert!(outcome.is_err() || seen.rows == rows);
    }
}

/// Texts with everything that means something to a template.
fn text() -> impl Strategy<Value = String> {
    let pieces = prop_oneof![
        Just("{{content}}".to_string()),
        Just("{{idx}}".to_string()),
        Just("<think>\n".to_string()),
        Just("\n</think>\n\n".to_string()),
        Just("<|im_end|>".to_string()),
        Just("\n".to_string()),
        "[a-zA-Z ]{0,12}",
        "\\PC{0,4}",
    ];
    proptest::collection::vec(pieces, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn encoded_rows_fit_the_cutoff_and_every_token_has_a_label_and_a_field(
        turns in proptest::collection::vec((text(), text()), 1..4),
        system in text(),
        cutoff in 2usize..200,
        mask_history in any::<bool>(),
        thinking in prop_oneof![Just(None), Just(Some(true)), Just(Some(false))],
        name in 0..NAMES.len(),
        older in any::<bool>(),
    ) {
        let version = version(if older { "0.9.2" } else { "0.9.5" });
        let Ok(template) = template(NAMES[name], version) else { return Ok(()) };
        let efficient = template.efficient_eos;
        let tokenizer = Tokenizer::load(&fixtures().join("batches/tiny"), &template).unwrap();
        let encoding = Encoding { cutoff_len: cutoff, mask_history, enable_thinking: thinking, ..Encoding::of_version(template, version) };
        let conversation = Conversation { system, turns };
        let row = RowId { dataset: 0, row: 0 };
        let example = match encoding.example(row, &conversation, &tokenizer) {
            Ok(example) => example,
            Err(error) => {
                prop_assert!(efficient, "{error}");
                return Ok(());
            }
        };
        prop_assert!(example.input_ids.len() <= cutoff.max(1));
        prop_assert_eq!(example.input_ids.len(), example.labels.len());
        let mut end = 0;
        for (range, _) in &example.spans {
            prop_assert_eq!(range.start, end);
            prop_assert!(range.end > range.start);
            end = range.end;
        }
        prop_assert_eq!(end, example.input_ids.len());
        for (&id, &label) in example.input_ids.iter().zip(&example.labels) {
            prop_assert!(label == IGNORE || label == id as i32 || (efficient && label == tokenizer.eos as i32));
        }
    }
}
