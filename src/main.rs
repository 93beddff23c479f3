//! Parse, run, exit code.

use clap::Parser;

fn main() {
    let options = spikeprobe::cli::Options::parse();
    if let Err(error) = spikeprobe::cli::run(&options) {
        eprintln!("spikeprobe: {error}");
        std::process::exit(error.exit_code());
    }
}
