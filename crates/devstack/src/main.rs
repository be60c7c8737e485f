//! The private stack as a command.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use devstack::{command, guard};

/// A private PostgreSQL and RabbitMQ with the programs, for development and tests.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything in this checkout and keep it running until Ctrl-C. The data stays in `.devstack`.
    Up,
    /// Run a command with private servers around it: `DEVSTACK_POSTGRES_URL`, `DEVSTACK_AMQP_URL` and
    /// `DEVSTACK_MANAGEMENT_URL` tell it where they are. Nothing of them is left afterwards. When all three
    /// are set already, those servers are used and none are started.
    Run {
        /// The command and its arguments.
        #[arg(required = true, last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Print the addresses of the stack that runs in this checkout, as `export` lines for a shell.
    Env,
    /// Play the sample requests through the running stack, or through one of its own, and check the score.
    Demo,
    /// Hold the two APIs against the documents that they serve: schemathesis makes requests from those, right and
    /// wrong ones, for a stack of its own.
    Schemathesis(command::schemathesis::SchemathesisArgs),
    /// Wait for standard input to end, then clean up after a stack. Started by the other commands.
    #[command(hide = true)]
    Guard {
        /// The stack's mark.
        mark: String,
        /// The folder to remove.
        folder: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    command::exit(run(Cli::parse().command))
}

async fn run(command: Command) -> anyhow::Result<u8> {
    match command {
        Command::Guard { mark, folder } => guard::stand(&mark, folder.as_deref()).map(|()| 0),
        Command::Env => command::env::run().map(|()| 0),
        Command::Up => command::up::run().await.map(|()| 0),
        Command::Run { command } => Box::pin(command::run::run(&command)).await,
        Command::Demo => command::demo::run().await.map(|()| 0),
        Command::Schemathesis(args) => command::schemathesis::run(&args).await,
    }
}
