//! Ctrl-C, and the SIGTERM by which a scheduler ends a job: one flag, set by the signal, read between windows.
//!
//! Owns the flag. Long loops call [`check`] where stopping leaves everything whole; nothing is torn down mid-step.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Catches Ctrl-C (and SIGTERM, SIGHUP) from here on: the first sets the flag, a second one stops at once with exit code 130.
///
/// # Errors
/// When the system refuses the handler; the program still works, Ctrl-C then kills it as usual.
pub fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .map_err(|e| Error::internal(format!("cannot catch Ctrl-C: {e}")))
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// [`Error::interrupted`] once Ctrl-C was pressed.
///
/// # Errors
/// Only that one.
pub fn check() -> Result<()> {
    if interrupted() { Err(Error::interrupted()) } else { Ok(()) }
}
