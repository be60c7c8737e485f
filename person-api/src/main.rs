//! `person-api`: parse the command line and hand over.

use std::process::ExitCode;

use clap::Parser;
use person_api::config::{Cli, Command};
use service::shutdown::{self, Shutdown};

#[tokio::main]
async fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(args) => run(args).await,
        Command::Migrate(args) => person_api::migrate(args).await,
        Command::Health(args) => service::health::probe(args.listen).await,
    };
    shutdown::exit_code("person-api", done)
}

async fn run(args: person_api::config::RunArgs) -> anyhow::Result<()> {
    let metrics = service::telemetry::start(&args.telemetry)?;
    person_api::run(args, Some(metrics), Shutdown::on_signals()?).await
}
