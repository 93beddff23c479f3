//! What is measured about a tensor, and where: sites, measurements, and what follows from them.
//!
//! The model calls a [`Recorder`] at every site of a pass; when probing is off that costs one comparison. Reading
//! the tensors is [`crate::device::Device::statistics`]'.

mod range;
mod recorder;
mod site;

pub use range::*;
pub use recorder::*;
pub use site::*;
