//! Parses, starts telemetry, hands over.

use std::process::ExitCode;

use clap::Parser;
use daemon::{
    health::Identity,
    shutdown::{self, Shutdown},
    telemetry,
};
use outbox_console::cli::{Cli, Command};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("outbox-console", start().await)
}

async fn start() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Run(args) => {
            let metrics = telemetry::start(&args.telemetry)?;
            outbox_console::run(*args, metrics, Shutdown::on_signals()?).await
        }
        Command::Health(listen) => {
            daemon::probes::health(listen.listen, &Identity::of("outbox-console")).await
        }
    }
}
