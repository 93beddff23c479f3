//! The device's own arithmetic: fingerprint, checksums, triage of faults.

mod fingerprint;
mod triage;
