//! adapter_model.safetensors: header, names, shapes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spikeprobe::run::AdapterWeights;

fuzz_target!(|bytes: &[u8]| {
    let _ = AdapterWeights::parse(bytes);
});
