//! `make chaos`.

use std::process::ExitCode;

use chaos::command::{ChaosArgs, run};
use clap::Parser;

/// Inject a seeded plan of faults into private servers and programs while clients write. Then compare responses, databases
/// and deliveries. Exit code 1 if a promise was broken.
#[derive(Debug, Parser)]
#[command(name = "chaos", version)]
struct Cli {
    #[command(flatten)]
    args: ChaosArgs,
}

fn main() -> ExitCode {
    devstack::command::exit(run(&Cli::parse().args))
}
