//! `status`: where each relay stands, how fast it goes, and what it waits for.

mod report;

use std::{
    io::{ErrorKind, IsTerminal, Write as _},
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use sqlx::PgConnection;

pub use self::report::{
    BacklogStatus, LastLeader, Leader, Open, Paused, Position, Progress, Rate, RelayStatus, Status, progress,
};
use super::{
    CommandArgs, Verdict, connect,
    state::{self, State},
};
use crate::config::{STATEMENT_TIMEOUT, relay_name};

/// Rates are what changes within so long.
const SAMPLE: Duration = Duration::from_secs(1);
/// A look that takes longer failed: the connection may hang without a word.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Settings of `status`.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    /// What every command takes.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Only the relay of this name, instead of all.
    #[arg(long, env = "RELAY_NAME", value_parser = relay_name)]
    pub name: Option<String>,
    /// Repeat until Ctrl-C. With --json, one line each time.
    #[arg(long)]
    pub watch: bool,
    /// The pause between two reports.
    #[arg(long, default_value = "2s", value_parser = interval, value_name = "DURATION", requires = "watch")]
    pub interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = daemon::config::duration(text)?;
    if interval >= Duration::from_millis(100) {
        Ok(interval)
    } else {
        Err("it should be 100ms or more".to_owned())
    }
}

/// Shows where the relays stand: once, or until Ctrl-C.
pub async fn status(args: &StatusArgs) -> anyhow::Result<Verdict> {
    if !args.watch {
        return once(args).await;
    }
    tokio::select! {
        ended = watch(args) => ended,
        signal = tokio::signal::ctrl_c() => {
            signal.context("SIGINT cannot be handled")?;
            Ok(Verdict::Ok)
        }
    }
}

async fn once(args: &StatusArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "status", STATEMENT_TIMEOUT).await?;
    let before = progress(&look(args, &mut conn).await?);
    tokio::time::sleep(SAMPLE).await;
    let status = Status::new(look(args, &mut conn).await?, &before);
    args.common.answer(&status, || status.text())?;
    Ok(status.verdict())
}

/// Goes on while the database is away, once it was there.
async fn watch(args: &StatusArgs) -> anyhow::Result<Verdict> {
    let mut conn = Some(connect(&args.common, "status", STATEMENT_TIMEOUT).await?);
    let mut before: Option<Vec<Progress>> = None;
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        match look_again(args, &mut conn).await {
            Ok(state) => {
                let progress = progress(&state);
                let status = Status::new(state, before.as_deref().unwrap_or_default());
                if !show(args, &status)? {
                    return Ok(Verdict::Ok);
                }
                before = Some(progress);
            }
            Err(error) if before.is_none() => return Err(error),
            Err(error) => {
                conn = None;
                eprintln!("outbox-relay: {error:#}; trying again");
            }
        }
    }
}

async fn look_again(args: &StatusArgs, conn: &mut Option<PgConnection>) -> anyhow::Result<State> {
    let conn = match conn {
        Some(conn) => conn,
        None => conn.insert(connect(&args.common, "status", STATEMENT_TIMEOUT).await?),
    };
    look(args, conn).await
}

async fn look(args: &StatusArgs, conn: &mut PgConnection) -> anyhow::Result<State> {
    let name = args.name.as_deref();
    let state = async {
        let state =
            state::look(conn, name).await.map_err(|error| anyhow!(outbox::database::reason(&error)))?;
        match name {
            Some(name) if state.relays.is_empty() => state::known(conn, name).await.map(|()| state),
            _ => Ok(state),
        }
    };
    match tokio::time::timeout(TIMEOUT, state).await {
        Ok(state) => state,
        Err(_) => bail!("the database did not answer within {TIMEOUT:?}"),
    }
}

/// Shows one of many. False when nobody reads it any more.
fn show(args: &StatusArgs, status: &Status) -> anyhow::Result<bool> {
    let mut stdout = std::io::stdout();
    let text = if args.common.json {
        format!("{}\n", serde_json::to_string(status)?)
    } else if stdout.is_terminal() {
        // Home, what is new, and away with what was below.
        format!("\x1b[H\x1b[2J{}", status.text())
    } else {
        format!("{}\n", status.text())
    };
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => Ok(written.map(|()| true)?),
    }
}
