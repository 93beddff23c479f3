//! Findings: at least one example for each code, and runs where nothing is wrong.

mod bookkeeping;
mod codes;
mod comparison;
mod evaluation;
mod fingerprint;
mod lint;
mod log;
mod preflight;
mod resume;
mod support;
mod watch;
