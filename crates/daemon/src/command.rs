//! What the commands beside `run` share. Each reads or changes something in the database, prints the result, and ends.

use std::{
    fmt,
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, anyhow, bail};
use serde::Serialize;
use sqlx::PgConnection;

use crate::{
    config::database::{Database, DatabaseArgs, Failure, Schema, SchemaError},
    telemetry::TelemetryArgs,
};

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of a command that could do its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Nothing needs attention. Exit code 0.
    Ok,
    /// The command is done, and an operator should look at its result. Exit code 3.
    Attention,
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Ok => Self::SUCCESS,
            Verdict::Attention => Self::from(3),
        }
    }
}

/// What every command takes.
#[derive(Clone, Debug, clap::Args)]
pub struct CommandArgs {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// Print one JSON document instead of text for people.
    #[arg(long, global = true)]
    pub json: bool,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

impl CommandArgs {
    /// Connects to a database whose `schemas` are the ones that this program knows. Every statement is limited to
    /// `statement_timeout`. The server sees the connection as `application`.
    pub async fn connect(
        &self,
        application: &str,
        schemas: &[Schema],
        statement_timeout: Duration,
    ) -> anyhow::Result<PgConnection> {
        let mut conn = self.reach(application, statement_timeout).await?;
        let check = async {
            for schema in schemas {
                schema.check(&mut conn).await?;
            }
            Ok(())
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, check).await {
            Ok(Ok(())) => Ok(conn),
            Ok(Err(SchemaError::Database(error))) => Err(unreached(error)),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => bail!("the database did not respond within {CONNECT_TIMEOUT:?}"),
        }
    }

    /// As [`connect`](Self::connect), without a look at the schemas.
    pub async fn reach(
        &self,
        application: &str,
        statement_timeout: Duration,
    ) -> anyhow::Result<PgConnection> {
        Self::reach_at(self.database.options(application, statement_timeout)?).await
    }

    /// As [`reach`](Self::reach), to a second database.
    pub async fn reach_at(database: Database) -> anyhow::Result<PgConnection> {
        match tokio::time::timeout(CONNECT_TIMEOUT, database.quiet().alone().connect()).await {
            Ok(connected) => connected.map_err(unreached),
            Err(_) => bail!("the database did not respond within {CONNECT_TIMEOUT:?}"),
        }
    }

    /// Prints the result: `text` for people, or `answer` as JSON.
    pub fn answer(&self, answer: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        // Texts of others are escaped where they are put in. This is for one that was forgotten.
        let text = if self.json {
            escape::json(&serde_json::to_string_pretty(answer)?).into_owned()
        } else {
            escape::lines(&text()).into_owned()
        };
        print(&text).context("the result cannot be written")
    }
}

/// The database's own words for the operator; or that it cannot be reached, if that is the fault.
fn unreached(error: sqlx::Error) -> anyhow::Error {
    match Failure::of(&error) {
        Failure::Away | Failure::Login | Failure::Restarting | Failure::Resources => {
            anyhow::Error::new(error).context("the database cannot be reached")
        }
        _ => anyhow!(outbox::database::reason(&error)),
    }
}

/// Writes a text and a newline to standard output. A closed pipe, as `head` leaves it, is not an error; `println!` would
/// panic.
pub fn print(text: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    match writeln!(output, "{}", text.trim_end()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// A number and its noun, in the plural unless the number is 1.
pub fn many<N: Copy + fmt::Display + PartialEq + From<u8>>(count: N, noun: &str) -> String {
    if count == N::from(1) { format!("1 {noun}") } else { format!("{count} {noun}s") }
}

/// A time span for people, in one unit: `7.0 s`, `12 min`, `3 h`, `5 days`. (The library humantime would print all
/// units, down to the nanosecond.)
pub fn span(seconds: f64) -> String {
    match seconds.max(0.0) {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s if s < 2.0 * 3_600.0 => format!("{:.0} min", s / 60.0),
        s if s < 48.0 * 3_600.0 => format!("{:.0} h", s / 3_600.0),
        s => format!("{:.0} days", s / 86_400.0),
    }
}

/// The user who runs the command, for the audit: `user@host`.
pub fn operator() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let user = std::env::var("USER").unwrap_or_else(|_| "somebody".to_owned());
    format!("{user}@{}", if host.trim().is_empty() { "localhost" } else { host.trim() })
}
