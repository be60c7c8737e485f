//! Parses, starts telemetry, hands over.

use std::process::ExitCode;

use clap::Parser;
use outbox_relay::config::{Cli, Command};
use service::{
    health,
    shutdown::{self, Shutdown},
    telemetry,
};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("outbox-relay", start().await)
}

async fn start() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => {
            let metrics = telemetry::start(&args.telemetry)?;
            outbox_relay::run(*args, metrics, Shutdown::on_signals()?).await
        }
        Command::Migrate(args) => {
            telemetry::start(&args.telemetry)?;
            outbox_relay::migrate(&args).await
        }
        Command::Health(args) => health::probe(args.listen).await,
    }
}
