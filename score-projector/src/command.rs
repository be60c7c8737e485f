//! The commands beside `run`. Each reads or changes the score database, prints the result, and ends.

pub mod held;
pub mod rejected;

use std::time::Duration;

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
pub use daemon::command::{CommandArgs, Verdict};
pub(crate) use daemon::command::{many, operator};
use sqlx::PgConnection;

use crate::{
    model::{self, Role},
    schema,
};

/// The timeout of one statement of a command, which may read a million rows.
pub(crate) const STATEMENT_TIMEOUT: Duration = Duration::from_mins(1);

/// The read model that a command concerns.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct WhichModel {
    /// Use the read model that is being rebuilt, instead of the live one.
    #[arg(long, global = true)]
    pub shadow: bool,
}

impl WhichModel {
    pub(crate) fn role(self) -> Role {
        if self.shadow { Role::Shadow } else { Role::Live }
    }
}

/// Connects, and reads the name of the read model's consumer.
pub(crate) async fn connect(
    args: &CommandArgs,
    command: &str,
    which: WhichModel,
    statement_timeout: Duration,
) -> anyhow::Result<(PgConnection, String)> {
    let application = format!("score-projector {command}");
    let mut conn = args.connect(&application, &schema::needed(), statement_timeout).await?;
    let role = which.role().as_str();
    let stored = model::stored(&mut conn, role).await.context("the read model's name could not be read")?;
    let Some(stored) = stored else { bail!("there is no {role} read model: no rebuild is under way") };
    Ok((conn, stored.consumer))
}

/// Parses TYPE/ID of an aggregate.
pub(crate) fn aggregate(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('/') {
        Some((type_, id)) if !type_.is_empty() && !id.is_empty() => Ok((type_.to_owned(), id.to_owned())),
        _ => Err("it should look like TYPE/ID"),
    }
}

/// Parses how many events one transaction applies at most.
pub(crate) fn batch(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|batch| (1..=10_000).contains(batch)).ok_or("it should be from 1 to 10000")
}

/// Formats a time for people.
pub(crate) fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}
