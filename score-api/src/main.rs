//! Parses the command line, starts telemetry and hands over.

use std::process::ExitCode;

use clap::Parser;
use score_api::{Cli, Command};
use service::{health, shutdown::Shutdown, telemetry};

#[tokio::main]
async fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run(config) => start(config).await,
        Command::Health { listen } => health::probe(listen.listen).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("score-api: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn start(config: score_api::Config) -> anyhow::Result<()> {
    let metrics = telemetry::start(&config.telemetry)?;
    score_api::run(config, Some(metrics), Shutdown::on_signals()?).await
}
