//! `person-api`: parse the command line and hand over.

use std::process::ExitCode;

use person_api::config::{Cli, Command};
use service::{
    config::file,
    shutdown::{self, Shutdown},
};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("person-api", start().await)
}

async fn start() -> anyhow::Result<()> {
    match file::parse::<Cli>()?.cli.command {
        Command::Run(args) => run(args).await,
        Command::Migrate(args) => person_api::migrate(args).await,
        Command::Health(args) => service::health::probe(args.listen).await,
    }
}

async fn run(args: person_api::config::RunArgs) -> anyhow::Result<()> {
    let metrics = service::telemetry::start(&args.telemetry)?;
    person_api::run(args, Some(metrics), Shutdown::on_signals()?).await
}
