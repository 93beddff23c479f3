//! Pickles, bare and inside PyTorch's zip.
#![no_main]

use std::io::Write;

use libfuzzer_sys::fuzz_target;
use spikeprobe::run::pickle::Pickle;
use spikeprobe::run::torch_file::TorchFile;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(pickle) = Pickle::parse(bytes) {
        let _ = pickle.root().to_json(8);
    }
    if bytes.starts_with(b"PK") {
        let Ok(mut file) = tempfile::NamedTempFile::new() else { return };
        if file.write_all(bytes).is_ok() {
            let _ = TorchFile::open(file.path());
        }
    }
});
