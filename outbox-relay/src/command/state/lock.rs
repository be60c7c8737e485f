//! The outbox lock: which transactions hold it.

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::PgConnection;

use crate::command::{span, time};

/// The oldest first. Ages are unknown to a role without `pg_read_all_stats`, but for its own sessions.
const LOCK_HOLDERS: &str = "\
SELECT pid, application_name, state, gid, since, extract(epoch FROM statement_timestamp() - since)::float8 AS seconds
FROM outbox.lock_holder
ORDER BY since NULLS LAST, pid
LIMIT 100";

/// Who may still bring positions that are missing.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct LockHolder {
    /// The session; none when prepared.
    pub pid: Option<i32>,
    /// What it calls itself.
    pub application_name: Option<String>,
    /// What it does, as `pg_stat_activity` has it.
    pub state: Option<String>,
    /// The prepared transaction.
    pub gid: Option<String>,
    /// Since when its transaction is open, or prepared.
    pub since: Option<DateTime<Utc>>,
    /// For how many seconds.
    pub seconds: Option<f64>,
}

impl LockHolder {
    /// For people.
    pub fn text(&self) -> String {
        let who = match (&self.gid, self.pid) {
            (Some(gid), _) => format!("the prepared transaction {gid:?}"),
            (None, Some(pid)) => {
                let name = self.application_name.as_deref().filter(|name| !name.is_empty());
                let state = self.state.as_deref().map_or(String::new(), |state| format!(", {state}"));
                format!("pid {pid} ({}){state}", name.unwrap_or("without a name"))
            }
            (None, None) => "a prepared transaction that ends just now".to_owned(),
        };
        match (self.since, self.seconds) {
            (Some(since), Some(seconds)) => {
                format!("{who}, for {} (since {})", span(seconds), time(Some(since)))
            }
            _ => format!("{who}, for an unknown time (this role lacks pg_read_all_stats)"),
        }
    }
}

/// At most 100 transactions that hold the outbox lock.
pub async fn lock_holders(conn: &mut PgConnection) -> Result<Vec<LockHolder>, sqlx::Error> {
    sqlx::query_as(LOCK_HOLDERS).fetch_all(conn).await
}
