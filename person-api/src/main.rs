//! `person-api`: parse the command line and hand over.

use std::process::ExitCode;

use daemon::{
    cli,
    command::Verdict,
    health::Identity,
    shutdown::{self, Shutdown},
    telemetry, traces,
};
use person_api::{
    config::{Cli, Command, RunArgs},
    republish,
};

#[tokio::main]
async fn main() -> ExitCode {
    match start().await {
        Ok(verdict) => verdict.into(),
        Err(error) => shutdown::exit_code("person-api", Err(error)),
    }
}

async fn start() -> anyhow::Result<Verdict> {
    match cli::parse::<Cli>()?.cli.command {
        Command::Run(args) => run(args).await?,
        Command::Migrate(args) => person_api::migrate(args).await?,
        Command::Republish(args) => {
            telemetry::start(&args.common.telemetry)?;
            return republish::republish(&args).await;
        }
        Command::Health(args) => {
            let asked = Identity::of("person-api").at_known(&args.database)?;
            daemon::probes::health(args.listen, &asked).await?;
        }
    }
    Ok(Verdict::Ok)
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let metrics = telemetry::start(&args.telemetry)?;
    let (traces, shutdown) = (traces::start("person-api")?, Shutdown::on_signals()?);
    let (requested, drain) = (shutdown.requested().clone(), args.shutdown.drain_timeout);
    traces.during(requested, drain, Box::pin(person_api::run(args, Some(metrics), shutdown))).await
}
