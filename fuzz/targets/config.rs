//! Configurations: YAML of any content, opened as a run.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spikeprobe::run::Run;

fuzz_target!(|bytes: &[u8]| {
    let Ok(folder) = tempfile::tempdir() else { return };
    let path = folder.path().join("train.yaml");
    if std::fs::write(&path, bytes).is_ok() {
        let _ = Run::open(&path, folder.path(), &[], &[]);
    }
});
