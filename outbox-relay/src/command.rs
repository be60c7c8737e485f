//! The commands beside `run`: each asks the database, or changes something in it, says so, and ends.

pub mod digest;
pub mod doctor;
pub mod new_incarnation;
pub mod parked;
pub mod pause;
pub mod prune;
pub mod replay;
pub mod state;
pub mod status;
pub mod trace;

use std::time::Duration;

pub use service::config::command::{CommandArgs, Verdict};
pub(crate) use service::config::command::{bar, many, operator, span};
use sqlx::PgConnection;

use crate::leader::schema;

/// Connects to a database whose outbox is the one that this program knows.
pub(crate) async fn connect(
    args: &CommandArgs,
    command: &str,
    statement_timeout: Duration,
) -> anyhow::Result<PgConnection> {
    args.connect(&format!("outbox-relay {command}"), &[schema()], statement_timeout).await
}
