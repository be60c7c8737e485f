//! `make chaos`.

use std::process::ExitCode;

use chaos::command::{ChaosArgs, run};
use clap::Parser;

/// Let everything go wrong at once on private servers, to a seeded plan, while clients write; then hold what was
/// answered, stored and delivered against each other. Exit code 1 when a promise was broken.
#[derive(Debug, Parser)]
#[command(name = "chaos", version)]
struct Cli {
    #[command(flatten)]
    args: ChaosArgs,
}

fn main() -> ExitCode {
    devstack::command::exit(run(&Cli::parse().args))
}
