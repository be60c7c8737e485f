//! The commands beside `run`: each asks the database, or changes something in it, says so, and ends.

pub mod prune;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context, bail};
use serde::Serialize;
use service::{
    config::database::{DatabaseArgs, SchemaError},
    telemetry::TelemetryArgs,
};
use sqlx::{ConnectOptions, PgConnection};

use crate::leader::schema;

/// Connecting takes no longer, or the database counts as away.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How a command ended that did what it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// Done, and there is nothing to say against it. Exit code 0.
    Well,
    /// Done, but the answer is one that somebody should look at. Exit code 3.
    NotWell,
}

impl From<Verdict> for ExitCode {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Well => Self::SUCCESS,
            Verdict::NotWell => Self::from(3),
        }
    }
}

/// What every command takes.
#[derive(Debug, clap::Args)]
pub struct CommandArgs {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// Answer with one JSON document instead of text for people.
    #[arg(long)]
    pub json: bool,
    /// Logging.
    #[command(flatten)]
    pub telemetry: TelemetryArgs,
}

impl CommandArgs {
    /// Connects, with every statement limited to `statement_timeout`, to a database whose outbox is the
    /// one that this program knows.
    pub async fn connect(&self, command: &str, statement_timeout: Duration) -> anyhow::Result<PgConnection> {
        let options = self.database.options(&format!("outbox-relay {command}"), statement_timeout)?;
        let connect = async {
            let mut conn = options.disable_statement_logging().connect().await?;
            schema().check(&mut conn).await?;
            Ok(conn)
        };
        match tokio::time::timeout(CONNECT_TIMEOUT, connect).await {
            Ok(Ok(conn)) => Ok(conn),
            Ok(Err(SchemaError::Database(error))) => Err(error).context("the database cannot be reached"),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => bail!("the database did not answer within {CONNECT_TIMEOUT:?}"),
        }
    }

    /// Writes the answer to standard output: `text` for people, or `answer` as JSON.
    pub fn answer(&self, answer: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(answer)?);
        } else {
            println!("{}", text().trim_end());
        }
        Ok(())
    }
}
