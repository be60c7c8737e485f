//! `score-projector`: parse the command line and hand over.

use std::process::ExitCode;

use daemon::{
    cli,
    command::Verdict,
    health::Identity,
    shutdown::{self, Shutdown},
    telemetry, traces,
};
use score_projector::{
    command::{held, rejected},
    config::{Cli, Command, RunArgs},
    digest, rebuild, republish, verify,
};

#[tokio::main]
async fn main() -> ExitCode {
    match start().await {
        Ok(verdict) => verdict.into(),
        Err(error) => shutdown::exit_code("score-projector", Err(error)),
    }
}

async fn start() -> anyhow::Result<Verdict> {
    match cli::parse::<Cli>()?.cli.command {
        Command::Run(args) => run(args).await?,
        Command::Migrate(args) => score_projector::migrate(args).await?,
        Command::Digest(args) => {
            telemetry::start(&args.common.telemetry)?;
            return digest::digest(&args).await;
        }
        Command::Held(args) => {
            telemetry::start(&args.common.telemetry)?;
            return held::held(&args).await;
        }
        Command::Rejected(args) => {
            telemetry::start(&args.common.telemetry)?;
            return rejected::rejected(&args).await;
        }
        Command::Rebuild(args) => {
            telemetry::start(&args.common.telemetry)?;
            return rebuild::rebuild(&args).await;
        }
        Command::Republish(args) => {
            telemetry::start(&args.common.telemetry)?;
            return republish::republish(&args).await;
        }
        Command::Verify(args) => {
            telemetry::start(&args.common.telemetry)?;
            return verify::verify(&args).await;
        }
        Command::Health(args) => {
            let asked = Identity::of("score-projector")
                .with("queue", args.queue)
                .with_some("consumer", args.consumer)
                .at_known(&args.database)?;
            daemon::probes::health(args.listen, &asked).await?;
        }
    }
    Ok(Verdict::Ok)
}

async fn run(args: RunArgs) -> anyhow::Result<()> {
    let metrics = telemetry::start(&args.telemetry)?;
    let (traces, shutdown) = (traces::start("score-projector")?, Shutdown::on_signals()?);
    let (requested, drain) = (shutdown.requested().clone(), args.shutdown.drain_timeout);
    traces.during(requested, drain, Box::pin(score_projector::run(args, Some(metrics), shutdown))).await
}
