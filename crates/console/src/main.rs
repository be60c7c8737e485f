//! Parses, starts telemetry, hands over.

use std::process::ExitCode;

use daemon::{
    cli::{self, Parsed},
    health::Identity,
    shutdown::{self, Shutdown},
    telemetry,
};
use outbox_console::{
    cli::{Cli, Command},
    file::{File, TABLES},
};

#[tokio::main]
async fn main() -> ExitCode {
    shutdown::exit_code("outbox-console", start().await)
}

async fn start() -> anyhow::Result<()> {
    let Parsed { cli, own, .. } = cli::parse_beside::<Cli>(&TABLES)?;
    match cli.command {
        Command::Run(args) => {
            let metrics = telemetry::start(&args.telemetry)?;
            outbox_console::run(*args, File::read(own)?, metrics, Shutdown::on_signals()?).await
        }
        Command::Health(listen) => {
            daemon::probes::health(listen.listen, &Identity::of("outbox-console")).await
        }
    }
}
