//! The command line.

use std::net::SocketAddr;

use clap::{Args, Parser, Subcommand};
use daemon::{config::database::DatabaseArgs, shutdown::ShutdownArgs, telemetry::TelemetryArgs};
use web::front::{ConcurrencyArgs, FrontArgs};

use crate::{republish::RepublishArgs, request::CpfCheck};

/// Takes persons, their incomes, assets and debts over HTTP, and writes rows and events in one transaction.
#[derive(Debug, Parser)]
#[command(name = "person-api", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the API until SIGTERM.
    Run(RunArgs),
    /// Create the schema `person` in the database, or bring it up to date.
    Migrate(MigrateArgs),
    /// Publish the whole state of persons once more, as `person.baseline`, beside the running API.
    Republish(Box<RepublishArgs>),
    /// Ask the program that runs at this address whether it is ready; for a container's health check.
    Health(HealthArgs),
}

/// Settings of `run`.
#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    /// Where to listen.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8000", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// Where the database is.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// How strictly a new person's cpf is checked.
    #[arg(long, env = "CPF_CHECK", default_value = "off", value_enum, value_name = "CHECK")]
    pub cpf_check: CpfCheck,
    /// What clients may take.
    #[command(flatten)]
    pub front: FrontArgs,
    /// How many may need the database.
    #[command(flatten)]
    pub concurrency: ConcurrencyArgs,
    /// How long to drain.
    #[command(flatten)]
    pub shutdown: ShutdownArgs,
    /// What to log.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

/// Settings of `migrate`.
#[derive(Clone, Debug, Args)]
pub struct MigrateArgs {
    /// Where the database is.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// A role that `run` uses: it gets the rights on the schema that the API needs. May be repeated.
    #[arg(long, value_name = "ROLE")]
    pub grant_to: Vec<String>,
}

/// Settings of `health`.
#[derive(Clone, Debug, Args)]
pub struct HealthArgs {
    /// Where the program listens.
    #[arg(long, env = "LISTEN", default_value = "127.0.0.1:8000", value_name = "ADDRESS")]
    pub listen: SocketAddr,
    /// The database of the process that is asked for; another one at this address is not it.
    #[command(flatten)]
    pub database: DatabaseArgs,
}
