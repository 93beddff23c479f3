//! Every operation against a plain reference written here, one body for the CPU and for CUDA, and what only CUDA has:
//! its driver messages, its memory. Without a GPU the CUDA half runs on the emulator: `scripts/with-emulator cargo test
//! --release --test tests cuda::`. A skip is said aloud; SPIKEPROBE_REQUIRE_CUDA=1 makes it a failure.

mod decoder; // norm, rope, attention, gate, loss
mod driver; // messages, memory, weights that do not fit
mod measuring; // statistics and norms
mod moves; // casts of every half, gather, scatter, elementwise
mod products; // linear and its gradients
mod reference; // rounding, bounds, generated values
mod training; // accumulate, AdamW, SGD

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use spikeprobe::device::{self, Device};

/// One body, two tests: on the CPU and on CUDA.
macro_rules! on_every_device {
    ($($body:ident: $cpu:ident, $cuda:ident;)*) => {
        $(#[test]
        fn $cpu() {
            $body(&*spikeprobe::device::open("cpu", Some(2)).expect("cpu"));
        }
        #[test]
        fn $cuda() {
            if let Some(device) = crate::cuda::cuda() {
                $body(&*device);
            }
        })*
    };
}
pub(crate) use on_every_device;

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

/// The emulator keeps process-wide settings: tests that start children of this binary go one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}
