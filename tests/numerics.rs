//! The device's own arithmetic: fingerprint, checksums, triage of faults.

mod checksum;
mod fingerprint;
mod triage;
