//! Parses the command line, starts telemetry and hands over.

use std::process::ExitCode;

use daemon::{
    cli,
    health::Identity,
    shutdown::{self, Shutdown},
    telemetry, traces,
};
use score_api::{Cli, Command};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("score-api", start().await)
}

async fn start() -> anyhow::Result<()> {
    match cli::parse::<Cli>()?.cli.command {
        Command::Run(config) => run(*config).await,
        Command::Health { listen, database } => {
            let asked = Identity::of("score-api").at_known(&database)?;
            daemon::probes::health(listen.listen, &asked).await
        }
    }
}

async fn run(config: score_api::Config) -> anyhow::Result<()> {
    let metrics = telemetry::start(&config.telemetry)?;
    let (traces, shutdown) = (traces::start("score-api")?, Shutdown::on_signals()?);
    let (requested, drain) = (shutdown.requested().clone(), config.shutdown.drain_timeout);
    traces.during(requested, drain, Box::pin(score_api::run(config, Some(metrics), shutdown))).await
}
