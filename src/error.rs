//! The one error type: what went wrong, where, and what to do next.
//!
//! Every error a user can cause is built here, so that each message has the same three parts. Library code
//! returns [`Result`]; only `main` prints and turns [`Kind`] into an exit code.

use std::fmt;
use std::path::Path;

pub type Result<T> = std::result::Result<T, Error>;

/// Why the program stops; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Something on disk is missing, broken or inconsistent. Exit code 1.
    Input,
    /// Valid input whose numbers this program does not cover (design decision 9). Exit code 1.
    Refused,
    /// The command line is wrong. Exit code 2.
    Usage,
    /// The device cannot do it: no driver, a failed launch. Exit code 1.
    Device,
    /// The device's memory is full; less at a time may fit. Exit code 1.
    Memory,
    /// Writing results failed: disk full, permissions. Exit code 1.
    Output,
    /// Ctrl-C. Exit code 130.
    Interrupted,
    /// A broken promise between our own stages; a bug of this program. Exit code 1.
    Internal,
}

/// What happened, where (file, key, tensor, step), what to do next.
#[derive(Debug, Clone, thiserror::Error)]
pub struct Error {
    pub kind: Kind,
    pub what: String,
    pub place: Option<String>,
    pub next: Option<String>,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(place) = &self.place {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.what)?;
        if let Some(next) = &self.next {
            write!(f, "\n  try: {next}")?;
        }
        Ok(())
    }
}

impl Error {
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), place: None, next: None }
    }
    pub fn input(what: impl Into<String>) -> Self {
        Self::new(Kind::Input, what)
    }
    pub fn refused(what: impl Into<String>) -> Self {
        Self::new(Kind::Refused, what)
    }
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }
    pub fn device(what: impl Into<String>) -> Self {
        Self::new(Kind::Device, what)
    }
    pub fn memory(what: impl Into<String>) -> Self {
        Self::new(Kind::Memory, what)
    }
    pub fn output(what: impl Into<String>) -> Self {
        Self::new(Kind::Output, what)
    }
    pub fn internal(what: impl Into<String>) -> Self {
        Self::new(Kind::Internal, what)
    }
    pub fn interrupted() -> Self {
        Self::new(Kind::Interrupted, "interrupted")
    }

    /// Where: a file, `file:line`, a YAML key, a tensor name, a step. Added once, by the layer that knows it.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.place = Some(match self.place {
            Some(inner) => format!("{place}: {inner}"),
            None => place.to_string(),
        });
        self
    }
    #[must_use]
    pub fn at_path(self, path: &Path) -> Self {
        self.at(path.display())
    }
    /// What the user can do about it.
    #[must_use]
    pub fn next(mut self, next: impl Into<String>) -> Self {
        self.next = Some(next.into());
        self
    }
    /// [`Error::next`] from a layer that knows less: what an inner one said stays.
    #[must_use]
    pub fn or_next(self, next: &str) -> Self {
        if self.next.is_some() { self } else { self.next(next) }
    }
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            Kind::Usage => 2,
            Kind::Interrupted => 130,
            _ => 1,
        }
    }
}
