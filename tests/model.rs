//! Forward and backward: against PyTorch's recorded numbers, against candle's autograd, against themselves.

#[path = "model/gradients.rs"]
mod gradients; // explicit backward against candle's autograd, every architecture
#[path = "model/initial.rs"]
mod initial; // the seed's adapter
#[path = "model/inputs.rs"]
mod inputs; // broken model folders
#[path = "model/known_answer.rs"]
mod known_answer; // tiny_llama: losses, gradients, norms that transformers recorded
#[path = "model/probes.rs"]
mod probes; // probes, planted faults, noise, dropout
#[path = "model/reference.rs"]
mod reference; // half precision, layer by layer, against PyTorch and fp64
#[path = "model/support.rs"]
mod support; // random models and rows
