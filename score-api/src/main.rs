//! Parses the command line, starts telemetry and hands over.

use std::process::ExitCode;

use score_api::{Cli, Command};
use service::{
    config::file,
    health,
    shutdown::{self, Shutdown},
    telemetry,
};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("score-api", start().await)
}

async fn start() -> anyhow::Result<()> {
    match file::parse::<Cli>()?.cli.command {
        Command::Run(config) => run(*config).await,
        Command::Health { listen } => health::probe(listen.listen).await,
    }
}

async fn run(config: score_api::Config) -> anyhow::Result<()> {
    let metrics = telemetry::start(&config.telemetry)?;
    score_api::run(config, Some(metrics), Shutdown::on_signals()?).await
}
