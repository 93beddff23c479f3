//! Where results go: standard output that survives a closed pipe, files that are whole or absent, colour or not.
//!
//! Owns the writing; what is written belongs to `report/`.

use std::fs::Permissions;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use crate::error::Kind;
use crate::{Error, Result};

/// Writes `text` to standard output. A reader that went away (`| head`) is no error.
///
/// # Errors
/// Any other failure to write, a full disk behind a redirection for example.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::output(format!("cannot write: {e}")).at("standard output"))
        }
        _ => Ok(()),
    }
}

/// Writes a line to standard error; failing to complain is not worth failing for.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Creates or replaces `path` with what `fill` writes: through a temporary file in the same folder, renamed when
/// complete, so that a reader never sees half a file and a failure leaves the old one. A device or pipe (/dev/null) is
/// written to as it is: a rename would put a file in its place.
///
/// # Errors
/// [`crate::error::Kind::Output`] naming the file; errors of `fill` as they are.
pub fn write_file(path: &Path, fill: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let failed = |what: &str, e: std::io::Error| failed(path, what, e);
    let placed = |e: Error| {
        let e = if e.place.is_none() { e.at_path(path) } else { e };
        if e.kind == Kind::Output { e.or_next(REMEDY) } else { e }
    };
    if is_device(path) {
        let mut device = std::fs::OpenOptions::new().write(true).open(path).map_err(|e| failed("cannot open", e))?;
        let mut whole = Vec::new();
        fill(&mut whole).map_err(placed)?;
        return device.write_all(&whole).map_err(|e| failed("cannot write", e));
    }
    let (file, target) = temporary(path)?;
    let mut buffered = std::io::BufWriter::new(file);
    fill(&mut buffered).map_err(placed)?;
    let file = buffered.into_inner().map_err(|e| failed("cannot write", e.into_error()))?;
    file.as_file().sync_all().map_err(|e| failed("cannot write", e))?;
    file.persist(&target).map_err(|e| failed("cannot put in place", e.error))?;
    Ok(())
}

const REMEDY: &str = "check free space and permissions of the folder";

fn failed(path: &Path, what: &str, e: std::io::Error) -> Error {
    Error::output(format!("{what}: {e}")).at_path(path).next(REMEDY)
}

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| !about.is_file() && !about.is_dir())
}

/// Fails now where [`write_text`] would fail after the work: no such folder, no permission, a folder of that name.
///
/// # Errors
/// As [`write_file`].
pub fn check(path: &Path) -> Result<()> {
    if path.as_os_str() == "-" || is_device(path) { Ok(()) } else { temporary(path).map(drop) }
}

/// A new file beside `path`, and the file that it is to replace.
fn temporary(path: &Path) -> Result<(tempfile::NamedTempFile, PathBuf)> {
    if path.is_dir() {
        return Err(Error::output("is a folder").at_path(path).next("give the name of a file"));
    }
    // What a link points to is replaced, not the link; a link to nothing yet is one like any new file.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let folder = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(Error::output("its folder does not exist").at_path(path).next("make the folder first"));
    }
    let mut builder = tempfile::Builder::new();
    builder.prefix(".spikeprobe-");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // What File::create asks for; the process's umask applies. tempfile's own default is private (0600).
        builder.permissions(Permissions::from_mode(0o666));
    }
    let file = builder.tempfile_in(folder).map_err(|e| failed(path, "cannot create", e))?;
    Ok((file, target))
}

/// [`write_file`] for bytes at hand; `-` is standard output.
///
/// # Errors
/// As [`write_file`] and [`print`].
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    if path.as_os_str() == "-" {
        return print(text);
    }
    write_file(path, |out| {
        out.write_all(text.as_bytes()).map_err(|e| Error::output(format!("cannot write: {e}")).at_path(path))
    })
}

/// Whether standard output takes colour: a terminal, and nobody said NO_COLOR (<https://no-color.org>).
pub fn color() -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    std::io::stdout().is_terminal() && !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Whether standard output is a terminal that can be redrawn.
pub fn terminal() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb")
}

/// Whether progress may be drawn on standard error.
pub fn progress() -> bool {
    std::io::stderr().is_terminal()
}

/// Redraws the one line of progress on standard error; empty clears it.
pub fn status(text: &str) {
    let _ = write!(std::io::stderr().lock(), "\r\x1b[K{text}");
}
