//! The private stack as a command.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use devstack::{command, reaper};

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
    /// Run a command with private servers, and remove them afterwards. The command finds their addresses in
    /// `DEVSTACK_POSTGRES_URL`, `DEVSTACK_AMQP_URL` and `DEVSTACK_MANAGEMENT_URL`. If all three are set already, these
    /// servers are used and none are started.
    Run {
        /// The command and its arguments.
        #[arg(required = true, last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Print the addresses of the stack that runs in this checkout, as `export` lines for a shell.
    Env,
    /// Play the sample requests through the running stack, or through one of its own, and check the score.
    Demo,
    /// Print the Grafana dashboard, deploy/observability/dashboard.json.
    Dashboard,
    /// Test the two APIs against their documents: schemathesis makes valid and invalid requests from them, for a stack
    /// of its own.
    Schemathesis(command::schemathesis::SchemathesisArgs),
    /// Wait for standard input to end, then clean up after a stack. Started by the other commands.
    #[command(hide = true)]
    Reaper {
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
        Command::Reaper { mark, folder } => reaper::run(&mark, folder.as_deref()).map(|()| 0),
        Command::Dashboard => {
            println!("{:#}", devstack::dashboard::dashboard());
            Ok(0)
        }
        Command::Env => command::env::run().map(|()| 0),
        Command::Up => command::up::run().await.map(|()| 0),
        Command::Run { command } => Box::pin(command::run::run(&command)).await,
        Command::Demo => command::demo::run().await.map(|()| 0),
        Command::Schemathesis(args) => command::schemathesis::run(&args).await,
    }
}
