//! Leaked windows, undivided losses, an early end.

use spikeprobe::inspect::bookkeeping;

use super::support::*;

#[test]
fn the_leak_of_4_48_is_read_off_its_own_log_and_5_6_has_none() {
    let yaml = "gradient_accumulation_steps: 4\nper_device_train_batch_size: 2\nnum_train_epochs: 2\n";
    let run = with_state(yaml, FOUR, &version_log("epochs_4.48.2", "n93_bs2_ga4")).open().unwrap();
    let found = bookkeeping::leaks(&run.log.rows, 4);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].step, found[0].left), (12, 3));
    assert!((found[0].ratio.unwrap() - 8.0283 / ((4.2014 + 4.239) / 2.0)).abs() < 1e-12);
    assert_eq!(finding(&run, Code::EpochBoundaryLeak).severity, Severity::Error);
    assert!(finding(&run, Code::EarlyEnd).message.contains("epoch 1.936 of 2"));
    assert!(finding(&run, Code::LearningRateOffByOne).message.contains("NEXT"));
    assert!(codes(&run).contains(&"known_bad_versions"));
    let run = five(yaml, &version_log("epochs_5.6.0", "n93_bs2_ga4")).open().unwrap();
    assert_eq!(bookkeeping::leaks(&run.log.rows, 4), []);
    for code in ["epoch_boundary_leak", "early_end", "learning_rate_off_by_one", "known_bad_versions"] {
        assert!(!codes(&run).contains(&code), "{code}");
    }
}

#[test]
fn one_row_batches_never_leak_but_end_early() {
    let run = with_state(
        "gradient_accumulation_steps: 4\nper_device_train_batch_size: 1\nnum_train_epochs: 2\n",
        FOUR,
        &version_log("epochs_4.48.2", "bs1_ga4"),
    );
    let run = run.open().unwrap();
    assert!(!codes(&run).contains(&"epoch_boundary_leak"));
    assert!(finding(&run, Code::EarlyEnd).message.contains("epoch 1.400 of 2"));
}

#[test]
fn a_loss_times_the_accumulation_is_named_by_version_and_by_size() {
    // mistral on 4.47.1: known by version and model.
    let versions = "{\"transformers\": \"4.47.1\"}";
    let folder =
        with_state("gradient_accumulation_steps: 8\n", versions, &with(20, row(1, json!(25.6252), json!(300.0))));
    folder.write("model/config.json", "{\"model_type\": \"mistral\", \"vocab_size\": 512}");
    assert!(finding(&folder.open().unwrap(), Code::LossTimesAccumulation).message.contains("means 3.203"));
    // A llama whose first loss no cross-entropy over 32000 tokens can be, but an eighth of it can.
    let folder = five("gradient_accumulation_steps: 16\n", &with(20, row(1, json!(69.0), json!(30.0))));
    folder.write("model/config.json", "{\"model_type\": \"llama\", \"vocab_size\": 32000}");
    assert!(finding(&folder.open().unwrap(), Code::LossTimesAccumulation).message.contains("69"));
    folder.write("model/config.json", "{\"model_type\": \"llama\"}");
    assert!(
        !codes(&folder.open().unwrap()).contains(&"loss_times_accumulation"),
        "without a vocabulary nothing is claimed"
    );
}
