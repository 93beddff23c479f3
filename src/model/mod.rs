//! The decoder and its LoRA adapter: what is computed forward and backward, and where each rounding happens.

mod precision;

pub use precision::*;
