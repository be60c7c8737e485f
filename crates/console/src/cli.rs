//! The command line.

use std::net::SocketAddr;

use clap::{Parser, Subcommand};
use daemon::{shutdown::ShutdownArgs, telemetry::TelemetryArgs};
use web::front::{ConcurrencyArgs, FrontArgs};

/// Shows outboxes and inboxes to their operators, and lets them act.
#[derive(Debug, Parser)]
#[command(name = "outbox-console", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the pages until stopped.
    Run(Box<RunArgs>),
    /// Ask a running console whether it is ready; exit code 1, with the reasons, when it is not.
    Health(ListenArgs),
}

/// Where the console listens.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct ListenArgs {
    /// The address of the pages, /live, /ready and /metrics.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8005", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
}

/// Settings of `run`.
#[derive(Debug, clap::Args)]
#[expect(missing_docs, reason = "each group documents itself")]
pub struct RunArgs {
    /// Refuse a database's URL that leads to another machine and does not make TLS certain. Without this setting, `run`
    /// warns.
    #[arg(long, env = "REQUIRE_TLS")]
    pub require_tls: bool,
    #[command(flatten)]
    pub listen: ListenArgs,
    #[command(flatten)]
    pub front: FrontArgs,
    #[command(flatten)]
    pub concurrency: ConcurrencyArgs,
    #[command(flatten)]
    pub shutdown: ShutdownArgs,
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}
