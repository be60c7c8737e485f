//! `make bench` and `make bench-history`.

use std::process::ExitCode;

use bench::{
    command::{self, BenchArgs},
    history::{self, HistoryArgs},
};
use clap::{Parser, Subcommand};

/// Measure the system next to what PostgreSQL and RabbitMQ do by themselves, on private durable servers, and hold both
/// against the goals; exit code 1 when one is missed, or could not be measured. Without `--quick` a release build is
/// asked for.
#[derive(Debug, Parser)]
#[command(name = "bench", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    args: BenchArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every command and every request on a system that has run for years, and hold what it costs against the same with
    /// a short history; exit code 1 when something grows that must not, or what is to be reached is missed.
    History(HistoryArgs),
}

fn main() -> ExitCode {
    let Cli { command, args } = Cli::parse();
    match command {
        Some(Command::History(args)) => devstack::command::exit(history::run(&args)),
        None => devstack::command::exit(command::run(&args)),
    }
}
