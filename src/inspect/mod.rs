//! What the files of a run show before anything is replayed: lies of the log, mistakes of the configuration, the
//! evaluation that never ran.
//!
//! Owns [`Finding`]s, their codes, and the pure functions that make them from a [`Run`]. Detecting spikes and naming
//! causes is `diagnosis/`'s; reading files is `run/`'s.

pub mod bookkeeping;
pub mod codes;
pub mod compare;
pub mod confirm;
pub mod data;
pub mod eval;
pub mod evaluate;
pub mod evaluation_page;
pub mod fingerprint;
mod hashes;
pub mod lint;
pub mod log;
pub mod preflight;
pub mod resume;
pub mod template;
pub mod text;

use serde::Serialize;

pub use codes::Code;

use crate::run::Run;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing.
    Note,
    /// May explain a spike, or will cost something later.
    Warning,
    /// The log or the run is not what it seems: numbers that are not what they are taken for, or lost state.
    Error,
}

/// One thing that was noticed, with its proof and what to do about it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    pub code: Code,
    pub severity: Severity,
    pub message: String,
    /// File with line, key, or step.
    #[serde(rename = "where")]
    pub place: String,
}

impl Finding {
    pub fn new(code: Code, severity: Severity, place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code, severity, message: message.into(), place: place.into() }
    }
}

/// Everything that the run's own files show, gravest first. Reads no data rows and replays nothing.
pub fn inspect(run: &Run) -> Vec<Finding> {
    let mut findings = log::findings(run);
    findings.extend(bookkeeping::findings(run));
    findings.extend(resume::findings(run));
    findings.extend(lint::findings(run));
    findings.extend(template::findings(run));
    findings.extend(eval::findings(run));
    sort(&mut findings);
    findings
}

/// Gravest first; findings of one severity stay in the order in which they were made.
pub fn sort(findings: &mut [Finding]) {
    findings.sort_by_key(|f| std::cmp::Reverse(f.severity));
}

/// `3, 7–9, 12`: ascending steps for people.
pub(crate) fn ranges(steps: &[u64]) -> String {
    let mut parts: Vec<(u64, u64)> = Vec::new();
    for &step in steps {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == step => *end = step,
            _ => parts.push((step, step)),
        }
    }
    let shown = parts.iter().take(8).map(|(a, b)| if a == b { a.to_string() } else { format!("{a}–{b}") });
    let mut text = shown.collect::<Vec<_>>().join(", ");
    if parts.len() > 8 {
        text.push_str(&format!(" … ({} in all)", steps.len()));
    }
    text
}
