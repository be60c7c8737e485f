//! `score-projector`: parse the command line and hand over.

use std::process::ExitCode;

use score_projector::config::{Cli, Command, RunArgs};
use service::{
    config::file,
    shutdown::{self, Shutdown},
};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("score-projector", start().await)
}

async fn start() -> anyhow::Result<()> {
    match file::parse::<Cli>()?.cli.command {
        Command::Run(args) => run(args).await,
        Command::Migrate(args) => score_projector::migrate(args).await,
        Command::Health(args) => service::health::probe(args.listen).await,
    }
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let metrics = service::telemetry::start(&args.telemetry)?;
    score_projector::run(args, Some(metrics), Shutdown::on_signals()?).await
}
