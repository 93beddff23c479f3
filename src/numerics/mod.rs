//! What the device's arithmetic is, and whether it repeats itself.
//!
//! ```text
//! Multiplier (device, or software model of an Arithmetic) ─► order, fingerprint ─► beside published profiles
//! suspect step ─► repeats with a trail, checksums, recomputation, other orders ─► Evidence ─► State
//! products for a given time ─► repeats and checksums ─► Soak
//! ```

mod arithmetic;
mod checksum;
mod faults;
mod fingerprint;
mod multiplier;
pub mod order;
pub mod present;
mod profiles;
mod recompute;
mod reorder;
mod soak;
mod trail;
mod triage;

pub use arithmetic::{Arithmetic, Order, Rounding, Split, Sum};
pub use checksum::{Checksums, Violation};
pub use faults::{Fault, Faults, Lasts, SYNTAX, Wrong, parse_fault};
pub use fingerprint::{CutOff, Fingerprint, NonFinite, fingerprint};
pub use multiplier::{DeviceProduct, Multiplier, Through};
pub use profiles::{Profile, published};
pub use recompute::{Mismatch, Recompute};
pub use reorder::{Reorder, SplitK};
pub use soak::{Soak, soak};
pub use trail::{Location, Mark, Trail, near, parting};
pub use triage::{Effort, Evidence, SECOND_BYTES, SecondOpinion, State, Suspect, examine};
