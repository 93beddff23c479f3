//! Every operation on every device: one body each, and `on_devices!` makes a test of it for the CPU and one for CUDA.
//! Without a GPU the CUDA half runs on the emulator, `scripts/with-emulator cargo test --release --test tests _cuda`.
//! A skip is said aloud; SPIKEPROBE_REQUIRE_CUDA=1 turns it into a failure.

mod attention; // forward and backward over ragged rows, NaN where it belongs
mod bits; // every bit of PyTorch's bf16 results at widths that show the order of sums
pub mod compare; // comparisons that fail on NaN, and say index, values and distance
mod decoder; // norm, rope, gate, loss
mod fused; // operations in one pass against the operations they stand for
mod independence; // a row or a NaN does not reach its neighbours; the same bits at any thread count and any cut
mod measuring; // statistics and norms
mod moves; // casts of every half, gather, scatter, elementwise, noise
mod products; // linear and its gradients
mod pytorch; // against PyTorch's own results, bit by bit where its order of operations allows
pub mod reference; // rounding and generated values
mod training; // accumulate, AdamW, SGD, updates of many tensors at once

use std::sync::{Arc, OnceLock};

use spikeprobe::device::{self, DType, Device, Tensor};

pub const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// One body, two tests: on the CPU (two threads whatever the machine has) and on CUDA.
macro_rules! on_devices {
    ($($body:ident: $cpu:ident, $cuda:ident;)*) => {
        $(#[test]
        fn $cpu() {
            $body(&*spikeprobe::device::open("cpu", Some(2)).expect("cpu"));
        }
        #[test]
        fn $cuda() {
            if let Some(device) = crate::device::cuda() {
                $body(&*device);
            }
        })*
    };
}
pub(crate) use on_devices;

/// cuda:0, opened once; `None`, said aloud, where there is neither a GPU nor the emulator.
pub fn cuda() -> Option<Arc<dyn Device>> {
    static DEVICE: OnceLock<Option<Arc<dyn Device>>> = OnceLock::new();
    DEVICE
        .get_or_init(|| match device::open("cuda:0", None) {
            Ok(device) => Some(device),
            Err(e) if std::env::var_os("SPIKEPROBE_REQUIRE_CUDA").is_some() => panic!("CUDA is required: {e}"),
            Err(e) => {
                eprintln!("SKIPPED, no CUDA: {}", e.what);
                None
            }
        })
        .clone()
}

pub fn download(device: &dyn Device, x: &Tensor) -> Vec<f32> {
    device.download(x).expect("download")
}
