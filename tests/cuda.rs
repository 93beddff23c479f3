//! What only CUDA has: the driver's messages, memory that runs out, weights that do not fit, how fast kernels are.
//! Operations are in tests/device/. Runs on the emulator (`scripts/with-emulator`) or on a GPU.

mod agreement; // where CPU and GPU part on purpose, and by how much
mod benchmark; // GB/s of each kernel; a smoke test on the emulator
mod driver; // messages, memory, weights that do not fit
mod paper; // kernels/PERFORMANCE.md against the formulas it follows from
