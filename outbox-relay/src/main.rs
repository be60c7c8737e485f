//! Parses, starts telemetry, hands over.

use std::process::ExitCode;

use daemon::{
    cli::{self, Parsed},
    command::print,
    shutdown::{self, Shutdown},
    telemetry, traces,
};
use outbox_relay::{
    cli::{Cli, Command, TABLES},
    command::{
        Verdict, backfill, digest, doctor, erasures, forget, manual, new_incarnation, parked, pause, prune,
        recover, replay, status, trace,
    },
    outboxes,
};

#[tokio::main]
async fn main() -> ExitCode {
    match start().await {
        Ok(verdict) => verdict.into(),
        Err(error) => shutdown::exit_code("outbox-relay", Err(error)),
    }
}

async fn start() -> anyhow::Result<Verdict> {
    let Parsed { cli, settings, tables, .. } = cli::parse_tables::<Cli>(TABLES)?;
    match cli.command {
        Command::Run(args) if args.check_config => {
            telemetry::start(&args.telemetry)?;
            traces::check("outbox-relay")?;
            print(&args.check(&settings, tables)?)?;
        }
        Command::Run(args) => {
            let metrics = telemetry::start(&args.telemetry)?;
            let (traces, shutdown) = (traces::start("outbox-relay")?, Shutdown::on_signals()?);
            let (requested, drain) = (shutdown.requested().clone(), args.shutdown.drain_timeout);
            let reload = || Ok(outboxes::outboxes(cli::parse_again::<Cli>(TABLES)?.tables));
            let outboxes = outboxes::outboxes(tables);
            traces
                .during(
                    requested,
                    drain,
                    Box::pin(outbox_relay::run(*args, outboxes, reload, metrics, shutdown)),
                )
                .await?;
        }
        Command::Migrate(args) => {
            telemetry::start(&args.telemetry)?;
            outbox_relay::migrate(&args).await?;
        }
        Command::Digest(args) => {
            telemetry::start(&args.common.telemetry)?;
            return digest::digest(&args).await;
        }
        Command::Parked(args) => {
            telemetry::start(&args.common.telemetry)?;
            return parked::parked(&args).await;
        }
        Command::Replay(args) => {
            telemetry::start(&args.common.telemetry)?;
            return replay::replay(&args).await;
        }
        Command::Backfill(args) => {
            telemetry::start(&args.common.telemetry)?;
            return backfill::backfill(&args).await;
        }
        Command::Pause { args, reason } => {
            telemetry::start(&args.common.telemetry)?;
            return pause::pause(&args, reason.as_deref()).await;
        }
        Command::Resume(args) => {
            telemetry::start(&args.common.telemetry)?;
            return pause::resume(&args).await;
        }
        Command::Doctor(args) => {
            telemetry::start(&args.common.telemetry)?;
            return doctor::doctor(&args).await;
        }
        Command::Trace(args) => {
            telemetry::start(&args.common.telemetry)?;
            return trace::trace(&args).await;
        }
        Command::Recover(args) => {
            telemetry::start(&args.common.telemetry)?;
            return recover::recover(&args).await;
        }
        Command::NewIncarnation(args) => {
            telemetry::start(&args.common.telemetry)?;
            return new_incarnation::new_incarnation(&args).await;
        }
        Command::Forget(args) => {
            telemetry::start(&args.common.telemetry)?;
            return forget::forget(&args).await;
        }
        Command::Prune(args) => {
            telemetry::start(&args.common.telemetry)?;
            return prune::prune(&args).await;
        }
        Command::Erasures(args) => {
            telemetry::start(&args.common.telemetry)?;
            return erasures::erasures(&args).await;
        }
        Command::Health(args) => {
            let listen = args.listen.listen;
            daemon::probes::health(listen, &outboxes::asked(args, tables)?).await?;
        }
        Command::Status(args) => {
            telemetry::start(&args.common.telemetry)?;
            return status::status(&args).await;
        }
        Command::Completions { shell } => print(&manual::completions(shell)?)?,
        Command::Man { folder } => manual::pages(&folder)?,
    }
    Ok(Verdict::Ok)
}
