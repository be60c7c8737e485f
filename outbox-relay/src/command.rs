//! The commands beside `run`: each asks the database, or changes something in it, says so, and ends.

pub mod backfill;
mod confirm;
pub mod digest;
pub mod doctor;
pub mod erasures;
pub mod forget;
mod left_behind;
pub mod manual;
pub mod new_incarnation;
pub mod parked;
pub mod pause;
pub mod prune;
pub mod recover;
pub mod replay;
pub mod state;
pub mod status;
pub mod trace;
mod when;

use std::time::Duration;

use anyhow::anyhow;
use chrono::{DateTime, Utc};
use daemon::config::database::Failure;
use sqlx::PgConnection;

pub(crate) use daemon::command::operator;
pub use daemon::command::{CommandArgs, Verdict, many, span};

use crate::session::schema;

/// A time for people.
pub fn time(at: Option<DateTime<Utc>>) -> String {
    at.map_or_else(|| "an unknown time".to_owned(), |at| at.format("%Y-%m-%d %H:%M:%S UTC").to_string())
}

/// So many events, as what something was done to.
pub(crate) fn were(count: i64) -> String {
    format!("{} {}", many(count, "event"), if count == 1 { "was" } else { "were" })
}

/// Why a change failed: `nothing` says that there is none. When the connection ended, it may have been stored.
pub(crate) fn not_done(error: sqlx::Error, nothing: &'static str) -> anyhow::Error {
    let said = match Failure::of(&error) {
        Failure::Away | Failure::Restarting => {
            "the connection ended, so it is unknown whether the change was stored; look before you run this again"
        }
        _ => nothing,
    };
    anyhow!(error).context(said)
}

/// Connects to a database whose outbox is the one that this program knows.
pub(crate) async fn connect(
    args: &CommandArgs,
    command: &str,
    statement_timeout: Duration,
) -> anyhow::Result<PgConnection> {
    args.connect(&format!("outbox-relay {command}"), &[schema()], statement_timeout).await
}
