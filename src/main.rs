//! Parse, run, exit code.

use clap::Parser;
use spikeprobe::{cli, interrupt, output};

fn main() -> std::process::ExitCode {
    let options = cli::Options::parse();
    if let Err(error) = interrupt::install() {
        output::complain(&format!("spikeprobe: {error}"));
    }
    match cli::run(&options) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&format!("spikeprobe: {error}"));
            std::process::ExitCode::from(error.exit_code())
        }
    }
}
