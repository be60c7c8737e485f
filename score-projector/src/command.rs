//! The commands beside `run`: each asks the score database, or changes something in it, says so, and ends.

pub mod held;
pub mod rejected;

use std::time::Duration;

use anyhow::Context;
use chrono::{DateTime, Utc};
pub use service::config::command::{CommandArgs, Verdict};
pub(crate) use service::config::command::{many, operator};
use sqlx::PgConnection;

use crate::schema;

/// How long the server lets one statement of a command run: a million rows may be looked through.
pub(crate) const STATEMENT_TIMEOUT: Duration = Duration::from_mins(1);

/// Connects, and finds the consumer whose read model is in use.
pub(crate) async fn connect(args: &CommandArgs, command: &str) -> anyhow::Result<(PgConnection, String)> {
    let application = format!("score-projector {command}");
    let mut conn = args.connect(&application, &schema::needed(), STATEMENT_TIMEOUT).await?;
    let consumer = sqlx::query_scalar("SELECT consumer FROM score.model WHERE role = 'live'")
        .fetch_one(&mut conn)
        .await
        .context("it is not known which read model is in use")?;
    Ok((conn, consumer))
}

/// TYPE/ID of an aggregate.
pub(crate) fn aggregate(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('/') {
        Some((type_, id)) if !type_.is_empty() && !id.is_empty() => Ok((type_.to_owned(), id.to_owned())),
        _ => Err("it should look like TYPE/ID"),
    }
}

/// A time for people.
pub(crate) fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}
