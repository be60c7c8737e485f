//! `make bench`.

use std::process::ExitCode;

use bench::command::{BenchArgs, run};
use clap::Parser;

/// Measure the system next to what PostgreSQL and RabbitMQ do by themselves, on private durable servers, and hold both
/// against the goals; exit code 1 when one is missed, or could not be measured. Without `--quick` a release build is
/// asked for.
#[derive(Debug, Parser)]
#[command(name = "bench", version)]
struct Cli {
    #[command(flatten)]
    args: BenchArgs,
}

fn main() -> ExitCode {
    devstack::command::exit(run(&Cli::parse().args))
}
