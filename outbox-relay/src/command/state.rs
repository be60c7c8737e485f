//! Where the relays of a database stand: what `status`, `doctor` and `forget` ask, by the views of the schema.

mod lock;
mod parked;

use anyhow::bail;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, types::Json};

pub use self::{
    lock::{LockHolder, lock_holders},
    parked::{ParkedCounts, Undelivered, WaitingEvents, WaitingGroup},
};
use crate::row::Made;

/// The views count events up to here. Beyond it, a count only says that there are more.
pub const MAX_COUNT: i64 = 10_000;

/// Every relay name, or the one in `$1`. `$2` is the last position handed out, from before the snapshot, of which the
/// sequence is no part. So a position up to there without a stored event belongs to a transaction that is open, or was
/// rolled back.
const RELAYS: &str = "\
SELECT name, leader, leader_since, heartbeat_age_seconds, leader_pid, leads, low_water, high, open_ranges, open_positions,
       paused_at, paused_by, waiting, greatest($2, high) AS last_position, statement_timestamp() AS at
FROM outbox.relay_status
WHERE $1::text IS NULL OR name = $1
ORDER BY name";

/// The backlog of the relay `$1`. The view's columns are computed once, and then used twice.
const BACKLOG: &str = "\
WITH backlog AS MATERIALIZED (
    SELECT open_events, new_events, oldest_created_at FROM outbox.relay_status WHERE name = $1)
SELECT open_events, new_events, oldest_created_at,
       CASE WHEN isfinite(oldest_created_at)
            THEN extract(epoch FROM statement_timestamp() - oldest_created_at)::float8 END AS oldest_age_seconds
FROM backlog";

/// What a leader waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Waiting {
    /// The part that waits: `database`, `broker`, `events` or `paused`.
    pub part: String,
    /// Why.
    pub reason: String,
    /// For how long.
    pub seconds: u64,
}

impl Waiting {
    /// For people.
    pub fn text(&self) -> String {
        let Self { part, reason, seconds } = self;
        format!("{part}: {reason} (for {seconds} s)")
    }
}

/// A relay name's row of `outbox.relay_status`.
#[derive(Debug, sqlx::FromRow)]
pub struct RelayRow {
    /// The relay name.
    pub name: String,
    /// The identity of the leader, or of the last one.
    pub leader: Option<String>,
    /// Since when.
    pub leader_since: Option<DateTime<Utc>>,
    /// Seconds since the last heartbeat.
    pub heartbeat_age_seconds: Option<f64>,
    /// The session that holds the leadership.
    pub leader_pid: Option<i32>,
    /// A session holds the leadership, and its heartbeat is recent.
    pub leads: bool,
    /// Every position up to here is settled.
    pub low_water: i64,
    /// The last position read.
    pub high: i64,
    /// Stretches between them that are not settled.
    pub open_ranges: i64,
    /// The positions in those.
    pub open_positions: i64,
    /// Paused since then.
    pub paused_at: Option<DateTime<Utc>>,
    /// The operator who paused it.
    pub paused_by: Option<String>,
    /// What its leader waits for, or waited for last.
    pub waiting: Json<Vec<Waiting>>,
    /// The last position handed out.
    pub last_position: i64,
    /// When this was read, by the server's clock.
    pub at: DateTime<Utc>,
}

impl RelayRow {
    /// How many positions are settled; grows by what is published.
    pub fn settled(&self) -> i64 {
        self.high - self.open_positions
    }
}

/// Events that are stored and not settled.
#[derive(Debug, Default, sqlx::FromRow)]
pub struct Backlog {
    /// Stored in open ranges; at most [`MAX_COUNT`] and one.
    pub open_events: i64,
    /// Stored above the last position read; at most [`MAX_COUNT`] and one.
    pub new_events: i64,
    /// When the first of them was made, as its writer says.
    pub oldest_created_at: Option<Made>,
    /// Its age in seconds; none where that time is infinite.
    pub oldest_age_seconds: Option<f64>,
}

/// One look at a database, in one snapshot.
#[derive(Debug)]
pub struct State {
    /// Each relay with its backlog, and with what the broker has not taken.
    pub relays: Vec<(RelayRow, Backlog, Undelivered)>,
    /// The transactions that hold the outbox lock.
    pub lock_holders: Vec<LockHolder>,
    /// The server is a standby, or still starting: no relay leads there, and the rest is a copy.
    pub in_recovery: bool,
}

/// Looks at all relays, or at the one called `name`.
pub async fn look(conn: &mut PgConnection, name: Option<&str>) -> Result<State, sqlx::Error> {
    let last_position = last_position(conn).await?;
    let mut snapshot = conn.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let in_recovery = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut *snapshot).await?;
    let mut state = State { relays: Vec::new(), lock_holders: Vec::new(), in_recovery };
    for (row, undelivered) in relays_at(&mut snapshot, name, last_position).await? {
        let backlog = sqlx::query_as(BACKLOG).bind(&row.name).fetch_one(&mut *snapshot).await?;
        state.relays.push((row, backlog, undelivered));
    }
    state.lock_holders = lock_holders(&mut snapshot).await?;
    snapshot.commit().await?;
    Ok(state)
}

/// The last position handed out.
async fn last_position(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    sqlx::query_scalar("SELECT last_position FROM outbox.overview").fetch_one(conn).await
}

/// All relays, or the one called `name`, each with what the broker has not taken.
pub async fn relays(
    conn: &mut PgConnection,
    name: Option<&str>,
) -> Result<Vec<(RelayRow, Undelivered)>, sqlx::Error> {
    let last_position = last_position(conn).await?;
    relays_at(conn, name, last_position).await
}

async fn relays_at(
    conn: &mut PgConnection,
    name: Option<&str>,
    last_position: i64,
) -> Result<Vec<(RelayRow, Undelivered)>, sqlx::Error> {
    let rows: Vec<RelayRow> =
        sqlx::query_as(RELAYS).bind(name).bind(last_position).fetch_all(&mut *conn).await?;
    let mut relays = Vec::with_capacity(rows.len());
    for row in rows {
        let undelivered = Undelivered::of(conn, &row.name).await?;
        relays.push((row, undelivered));
    }
    Ok(relays)
}

/// Fails unless there is a relay called `name`, and says which ones there are.
pub async fn known(conn: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    let names: Vec<String> =
        sqlx::query_scalar("SELECT name FROM outbox.relay_status ORDER BY name").fetch_all(conn).await?;
    if names.iter().any(|known| known == name) {
        return Ok(());
    }
    if names.is_empty() {
        bail!("there is no relay called {name:?}: none has run on this database yet; start outbox-relay run");
    }
    bail!("there is no relay called {name:?} in this database; there is: {}", names.join(", "))
}
