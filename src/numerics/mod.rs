//! What the device's arithmetic is, and whether it repeats itself.
//!
//! ```text
//! Multiplier (device, or software model of an Arithmetic) ─► order, fingerprint ─► beside published profiles
//! ```

mod arithmetic;
mod fingerprint;
mod multiplier;
pub mod order;
mod profiles;

pub use arithmetic::{Arithmetic, Order, Rounding, Sum};
pub use fingerprint::{CutOff, Fingerprint, NonFinite, fingerprint};
pub use multiplier::{DeviceProduct, Multiplier};
pub use profiles::{Profile, published};
