//! Parses the command line, starts telemetry and hands over.

use std::process::ExitCode;

use clap::Parser;
use score_api::{Cli, Command};
use service::{
    health,
    shutdown::{self, Shutdown},
    telemetry,
};

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(config) => start(config).await,
        Command::Health { listen } => health::probe(listen.listen).await,
    };
    shutdown::exit_code("score-api", result)
}

async fn start(config: score_api::Config) -> anyhow::Result<()> {
    let metrics = telemetry::start(&config.telemetry)?;
    score_api::run(config, Some(metrics), Shutdown::on_signals()?).await
}
