//! `spikeprobe numerics`: what the device's arithmetic is; `--soak`: whether it repeats itself; `--triage RUN --step S`:
//! whether one step of a run can be trusted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args as ClapArgs;
use serde_json::{Value, json};

use super::Common;
use crate::device::{Compute, Device, cpu::CpuDevice};
use crate::numerics::{
    DeviceProduct, Effort, Evidence, Faults, SYNTAX, Soak, State, Suspect, Through, examine, fingerprint, parse_fault,
    present::{self, Seen},
    soak,
};
use crate::report::terminal::Style;
use crate::{Error, Result, interrupt, output};

/// As typed. Exit code 1 where a fault was found.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// Interrogate one step of this run: a LLaMA-Factory configuration (YAML or JSON), or a folder with exactly one.
    #[arg(long, value_name = "RUN", requires = "step", conflicts_with = "soak")]
    pub triage: Option<PathBuf>,
    /// The step that --triage repeats, recomputes and reorders.
    #[arg(long, value_name = "STEP", requires = "triage", value_parser = clap::value_parser!(u64).range(1..))]
    pub step: Option<u64>,
    /// How often --triage repeats the step.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(2..))]
    pub repeats: u16,
    /// Plant a fault first, to see that it is found.
    #[arg(long, value_name = "FAULT", requires = "triage", long_help = fault_help())]
    pub inject: Option<String>,
    /// Multiply for so many seconds and check every result; each round is a JSON line on standard output.
    #[arg(long, value_name = "SECONDS")]
    pub soak: Option<u64>,
}

fn fault_help() -> String {
    format!("Plant a fault first, to see that it is found: {SYNTAX}. 12:0:5:flip=14:once")
}

/// Asks and prints.
///
/// # Errors
/// When the device or the run cannot be used; a fault that was found.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    common.check_outputs(&[])?;
    let device = common.open_device()?;
    match (&args.triage, args.step, args.soak) {
        (Some(path), Some(step), _) => triage(args, common, device, path, step),
        (_, _, Some(seconds)) => health(common, device, seconds),
        _ => describe(common, &*device),
    }
}

fn describe(common: &Common, device: &dyn Device) -> Result<()> {
    let mut seen: Vec<Seen> = Vec::new();
    for through in [Through::Library, Through::MatrixUnit] {
        for (name, compute) in
            [("f32", Compute::F32), ("tf32", Compute::Tf32), ("bf16", Compute::Bf16), ("fp16", Compute::F16)]
        {
            // 64 × 64: the tile that every library computes by its ordinary kernel; our own has only one.
            let tile = if through == Through::Library { 64 } else { 16 };
            let product = DeviceProduct { device, compute, through, tile };
            if product.exists()? {
                seen.push(Seen { name, through, print: fingerprint(&product).map_err(|e| e.at(name))? });
            }
        }
    }
    common.print(&present::fingerprints(Style::stdout(), device, &seen))?;
    common.write_json(&present::fingerprints_json(device, &seen))
}

fn health(common: &Common, device: Arc<dyn Device>, seconds: u64) -> Result<()> {
    let name = device.name();
    let found = soak(device, Duration::from_secs(seconds), &mut |line: &Value| common.print(&format!("{line}\n")))?;
    common.write_json(&json!({"schema": "spikeprobe.soak/1", "device": name, "found": found}))?;
    if !found.healthy() {
        return Err(unhealthy(&name, &found));
    }
    interrupt::check()
}

fn unhealthy(device: &str, found: &Soak) -> Error {
    Error::input(format!(
        "{} of {} products were wrong by their checksums and {} did not repeat",
        found.wrong, found.products, found.unrepeated
    ))
    .at(device)
    .next("do not train on this device before it was tested by its vendor's diagnostics")
}

fn triage(args: &Args, common: &Common, device: Arc<dyn Device>, path: &std::path::Path, step: u64) -> Result<()> {
    let shown = !common.quiet && output::progress();
    if shown {
        output::status(&format!("replaying up to step {step}"));
    }
    let suspect = Suspect::open(common.source(path, &[]), device, step)?;
    let fault = args.inject.as_deref().map(parse_fault).transpose()?.map(|fault| Arc::new(Faults::new(fault)));
    let trusted: Arc<dyn Device> = Arc::new(CpuDevice::new(common.threads.map(usize::from))?);
    let effort = Effort { repeats: usize::from(args.repeats), ..Effort::default() };
    if shown {
        output::status(&format!("step {step}: repeats, checksums, recomputation, other orders of addition"));
    }
    let evidence = examine(&suspect, &trusted, effort, fault.as_ref());
    if shown {
        output::status("");
    }
    let evidence = evidence?;
    common.print(&present::evidence(Style::stdout(), &evidence))?;
    common.write_json(&present::evidence_json(&evidence))?;
    match evidence.state() {
        State::Transient | State::Persistent => Err(faulty(&evidence)),
        State::Correct | State::OrderDependent | State::Undetermined => Ok(()),
    }
}

fn faulty(evidence: &Evidence) -> Error {
    let place = evidence.location().map_or_else(|| "a matrix product".to_owned(), ToString::to_string);
    Error::input(format!("step {}: {}", evidence.step, present::sentence(evidence.state())))
        .at(place)
        .next("spikeprobe numerics --soak 600 on the same device tells how often it happens")
}
