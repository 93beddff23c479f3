//! spikeprobe replays a LoRA fine-tuning run from what lies on disk and proves what made its loss spike.
//!
//! ```text
//! run on disk ─► run::Run ─► batches::Window ─► step ─► replay::Trace ─► Certificate ─► diagnosis ─► report
//!                config,      rows→tokens→      model    per step and     replay vs      counter-     terminal,
//!                log, model,  order→windows     on a     micro-batch      log            factuals     JSON, HTML
//!                checkpoints                    device
//! ```
//! Each arrow is one type handed on; each stage is one folder; nothing points backwards.
//!
//! | to change …                                              | open          |
//! |----------------------------------------------------------|---------------|
//! | how a file of the run is read, a YAML key, a version rule | `run/`        |
//! | templates, tokens, labels, sample order, windows          | `batches/`    |
//! | an operation, a SIMD or CUDA kernel, threads              | `device/`     |
//! | forward, backward, where a rounding happens               | `model/`      |
//! | clip, optimizer, schedule, loss scale                     | `step/`       |
//! | findings before any replay: log, lint, eval               | `inspect/`    |
//! | what is measured about a tensor                           | `probe/`      |
//! | start points, traces, certificate, snapshots              | `replay/`     |
//! | spikes, interventions, verdicts                           | `diagnosis/`  |
//! | grids of settings; fp16 against bf16; the device itself   | `sweep/` `bench/` `numerics/` |
//! | what people and programs read                             | `report/` `cli/` |

pub mod batches;
pub mod bench;
pub mod cli;
pub mod device;
pub mod diagnosis;
pub mod error;
pub mod inspect;
pub mod interrupt;
pub mod model;
pub mod numerics;
pub mod output;
pub mod probe;
pub mod replay;
pub mod report;
pub mod run;
pub mod step;
pub mod sweep;
pub mod watch;

pub use error::{Error, Result};
