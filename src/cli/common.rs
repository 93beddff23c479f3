//! Options that every subcommand takes, and what they mean.
//!
//! Owns `--root --json --device --threads -q -v --versions`. What a subcommand adds is in its own file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::Value;

use crate::device::Device;
use crate::replay::{Keeping, Replayer, Source};
use crate::{Result, output};

/// Options of every subcommand.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Common {
    /// Relative paths inside the configuration resolve against this folder, as LLaMA-Factory resolves them
    /// against the folder it was started in.
    #[arg(long, global = true, value_name = "DIR", default_value = ".")]
    pub root: PathBuf,
    /// Write the result as JSON; `-` is standard output (the text for people is then left out).
    #[arg(long, global = true, value_name = "FILE|-")]
    pub json: Option<PathBuf>,
    /// Where to compute: auto takes a CUDA GPU if one works.
    #[arg(long, global = true, value_name = "auto|cpu|cuda:N", default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,
    /// CPU threads [default: all cores]. Results do not depend on it.
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Library versions of the run, over what its files say: transformers=4.48.2,accelerate=1.2.1
    #[arg(long, global = true, value_name = "NAME=X.Y.Z,...", value_delimiter = ',', value_parser = parse_version)]
    pub versions: Vec<(String, String)>,
    /// Folder in which long replays keep states to go on from, and diagnoses their experiments [default:
    /// ~/.cache/spikeprobe]; `none` keeps nothing.
    #[arg(long, global = true, value_name = "DIR|none")]
    pub cache: Option<PathBuf>,
    /// The same as `--cache none`.
    #[arg(long, global = true, conflicts_with = "cache")]
    pub no_cache: bool,
    /// Results only: no progress, no remarks.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more (where each value came from, timings).
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

/// What `--device` chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    Auto,
    Cpu,
    /// Ordinal, as the driver counts.
    Cuda(usize),
}

fn parse_device(typed: &str) -> std::result::Result<DeviceChoice, String> {
    match typed {
        "auto" => Ok(DeviceChoice::Auto),
        "cpu" => Ok(DeviceChoice::Cpu),
        "cuda" => Ok(DeviceChoice::Cuda(0)),
        _ => typed
            .strip_prefix("cuda:")
            .and_then(|n| n.parse().ok())
            .map(DeviceChoice::Cuda)
            .ok_or_else(|| "expected auto, cpu or cuda:N".to_string()),
    }
}

const PACKAGES: [&str; 5] = ["llamafactory", "transformers", "accelerate", "peft", "torch"];

fn parse_version(typed: &str) -> std::result::Result<(String, String), String> {
    let (name, version) = typed.split_once('=').ok_or("expected NAME=X.Y.Z")?;
    let name = name.trim().to_lowercase();
    if !PACKAGES.contains(&name.as_str()) {
        return Err(format!("`{name}` is not one of {}", PACKAGES.join(", ")));
    }
    Ok((name, version.trim().to_string()))
}

impl Common {
    /// The device that `--device` means; where `auto` had to take the CPU it says why.
    ///
    /// # Errors
    /// A device that was asked for and is not there.
    pub fn open_device(&self) -> Result<Arc<dyn Device>> {
        let threads = self.threads.map(usize::from);
        let name = match self.device {
            DeviceChoice::Auto => {
                let (device, why) = crate::device::open_best(threads)?;
                if let Some(why) = why {
                    self.remark(&format!("on the CPU: {}", why.what));
                }
                return Ok(device);
            }
            DeviceChoice::Cpu => "cpu".to_owned(),
            DeviceChoice::Cuda(ordinal) => format!("cuda:{ordinal}"),
        };
        crate::device::open(&name, threads).map_err(|e| e.at("--device"))
    }

    /// Where a run lies, with what the command line says about it.
    pub fn source(&self, run: &Path, overrides: &[(String, String)]) -> Source {
        Source {
            path: run.to_owned(),
            root: self.root.clone(),
            overrides: overrides.to_vec(),
            versions: self.versions.clone(),
            cache: self.cache_folder().map(Keeping::new),
        }
    }

    /// What `--cache` means; XDG_CACHE_HOME and HOME give the default.
    pub fn cache_folder(&self) -> Option<PathBuf> {
        if self.no_cache {
            return None;
        }
        if let Some(folder) = &self.cache {
            return (folder.as_os_str() != "none").then(|| folder.clone());
        }
        let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache"))).map(|c| c.join("spikeprobe"))
    }

    /// Opens a run for replays on the chosen device, and says what of its files had to be left out.
    ///
    /// # Errors
    /// Anything of the run that is missing, broken or not covered.
    pub fn open_replayer(&self, run: &Path, overrides: &[(String, String)]) -> Result<Replayer> {
        let replayer = Replayer::open(self.source(run, overrides), self.open_device()?)?;
        let run = replayer.run();
        run.remarks.iter().for_each(|remark| self.remark(remark));
        if let Some((place, reason)) = run.log.unreadable.first() {
            let more = match run.log.unreadable.len() - 1 {
                0 => String::new(),
                more => format!(", and {more} more entries"),
            };
            self.remark(&format!("left out of the log: {place} ({reason}){more}"));
        }
        Ok(replayer)
    }

    /// Whether the text for people goes to standard output (it does not where JSON does).
    pub fn prints(&self) -> bool {
        self.json.as_deref().is_none_or(|path| path.as_os_str() != "-")
    }

    /// Prints text for people, unless standard output belongs to JSON.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn print(&self, text: &str) -> Result<()> {
        if self.prints() { output::print(text) } else { Ok(()) }
    }

    /// A remark on standard error, unless `-q`.
    pub fn remark(&self, text: &str) {
        if !self.quiet {
            output::complain(text);
        }
    }

    /// Fails before the work where a result could not be written after it: `--json`, and the other files named.
    ///
    /// # Errors
    /// As [`output::check`].
    pub fn check_outputs(&self, others: &[&Option<PathBuf>]) -> Result<()> {
        others.iter().copied().chain([&self.json]).flatten().try_for_each(|path| output::check(path))
    }

    /// Writes `--json`, if asked for.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_json(&self, value: &Value) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        output::write_text(path, &format!("{value:#}\n"))
    }
}
