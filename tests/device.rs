//! Every operation on every device. Each test is one body that takes a device; `on_devices!` makes one test per
//! device of it. CUDA tests say aloud when they are skipped; SPIKEPROBE_REQUIRE_CUDA=1 turns the skip into a failure.

mod accuracy; // against f64, with stated bounds, at awkward sizes
mod compare; // comparisons that fail on NaN, and say index, values and distance
mod exact; // casts of every half, special values, the same bits at any thread count and any cut
mod pytorch; // against PyTorch's own results, bit by bit where its order of operations allows
mod reference; // the operations in f64

use spikeprobe::device::{DType, Device, Tensor, cpu::CpuDevice};

pub const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

/// The CPU device, with two threads whatever the machine has.
pub fn cpu() -> Box<dyn Device> {
    Box::new(CpuDevice::new(Some(2)).expect("two threads"))
}

/// Makes `$cpu` a test of `$body` on the CPU.
macro_rules! on_devices {
    ($($body:ident => $cpu:ident;)*) => {
        $(#[test]
        fn $cpu() {
            $body(crate::device::cpu().as_ref());
        })*
    };
}
pub(crate) use on_devices;

/// Short name as in fixtures.
pub fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
    }
}

pub fn download(device: &dyn Device, x: &Tensor) -> Vec<f32> {
    device.download(x).expect("download")
}
