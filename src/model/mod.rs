//! The decoder and its LoRA adapter: what is computed forward and backward, and where each rounding happens.
//!
//! ```text
//! config.json, safetensors ─► BaseModel ─► Engine (device, PrecisionPlan) ─┐
//! seed or adapter files ─► AdapterWeights ─► Adapter ──────────────────────┼─► pass ─► losses and gradients
//! windows of micro-batches ─► Ragged ──────────────────────────────────────┘           per micro-batch
//! ```
//! No tape: `block` spells out the backward pass, which skips every frozen weight's gradient.

mod adapter;
mod block;
mod config;
mod context;
mod dropout;
mod engine;
mod head;
mod held;
mod init;
mod linear;
mod oracle;
mod power;
mod precision;
mod projection;
mod ragged;
mod rope;
mod trigonometry;
mod weights;

pub use adapter::{Adapter, Gradients, LoraModule};
pub use config::*;
pub use dropout::{Dropout, Masks, TorchMasks};
pub use engine::*;
pub use held::WeightFlip;
pub use init::initial_weights;
pub use oracle::{Oracle, OracleOutput};
pub use precision::*;
pub use projection::*;
pub use ragged::{Ragged, Row};
pub use rope::*;
pub use weights::BaseModel;
pub(crate) use weights::files as weight_files;
