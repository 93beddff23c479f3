//! trainer_log.jsonl and trainer_state.json.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use spikeprobe::run::state_file::{TrainerLog, TrainerState};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut file) = tempfile::NamedTempFile::new() else { return };
    if file.write_all(bytes).is_ok() {
        let _ = TrainerLog::read(file.path());
        let _ = TrainerState::read(file.path());
    }
});
