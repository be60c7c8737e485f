//! What a database tells about its relays. All the SQL of `status`, part of that of `doctor`.

use anyhow::bail;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, types::Json};

/// A leader that has stored no heartbeat for so many seconds is none.
pub const SILENCE: f64 = 15.0;
/// Events are counted up to here; beyond it, that there are more is all that is told.
pub const MAX_COUNT: i64 = 10_000;

/// Every relay name, or the one in `$1`: few rows. Who leads is whoever holds the leader's lock (class
/// 1869968492, key: the relay's id). The sequence is no part of the snapshot and is read after it, so
/// that its mark is never behind the positions beside it.
const RELAYS: &str = "\
SELECT r.name, r.leader, r.leader_since,
       extract(epoch FROM clock_timestamp() - r.heartbeat_at)::float8 AS heartbeat_age, l.pid,
       r.low_water, r.high,
       (SELECT count(*) FROM unnest(r.open)) AS open_ranges,
       (SELECT coalesce(sum(upper(o) - lower(o)), 0)::bigint FROM unnest(r.open) o) AS open_positions,
       r.paused_at, r.paused_by, r.waiting, p.mark, clock_timestamp() AS at
FROM outbox.relay r
CROSS JOIN (SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END AS mark
            FROM outbox.position) p
LEFT JOIN pg_locks l
       ON l.locktype = 'advisory' AND l.classid = 1869968492 AND l.objid::bigint = r.id
      AND l.objsubid = 2 AND l.granted
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
WHERE $1::text IS NULL OR r.name = $1
ORDER BY r.name";

/// What is stored and not settled: what lies in an open range, and what lies above `high`. By the
/// primary key, each leg in its order and with its limit, so that a statement reads at most twice `$2`
/// rows however large the table is.
const BACKLOG: &str = "\
WITH relay AS (SELECT high, open FROM outbox.relay WHERE name = $1),
open AS (
    SELECT e.position, e.created_at
    FROM relay CROSS JOIN LATERAL unnest(relay.open) AS o (range)
    CROSS JOIN LATERAL (SELECT position, created_at FROM outbox.event
                        WHERE position >= lower(o.range) AND position < upper(o.range)
                        ORDER BY position LIMIT $2) e
    LIMIT $2),
above AS (
    SELECT e.position, e.created_at
    FROM relay
    CROSS JOIN LATERAL (SELECT position, created_at FROM outbox.event WHERE position > relay.high
                        ORDER BY position LIMIT $2) e)
SELECT (SELECT count(*) FROM open), (SELECT count(*) FROM above), o.created_at,
       extract(epoch FROM clock_timestamp() - o.created_at)::float8
FROM (SELECT) one
LEFT JOIN (SELECT position, created_at FROM open UNION ALL SELECT position, created_at FROM above
           ORDER BY position LIMIT 1) o ON true";

/// What is set aside: at most as many rows as `--max-parked` allows, by the primary key of each relay.
const PARKED: &str = "\
SELECT relay, count(*) FILTER (WHERE reason = 'unroutable'), count(*) FILTER (WHERE reason = 'refused')
FROM outbox.parked WHERE $1::text IS NULL OR relay = $1 GROUP BY relay";

/// Who holds the outbox lock (class 1869968482, key 1), for the longest first. A prepared transaction
/// has no session; its lock belongs to `-1/<xid>`. Ages are unknown to a role without
/// `pg_read_all_stats`, but for its own sessions.
const HOLDERS: &str = "\
SELECT l.pid, a.application_name, a.state, p.gid, coalesce(a.xact_start, p.prepared) AS since,
       extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8 AS seconds
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND l.virtualtransaction = '-1/' || p.transaction::text
WHERE l.locktype = 'advisory' AND l.classid = 1869968482 AND l.objid = 1 AND l.objsubid = 2 AND l.granted
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
ORDER BY since NULLS LAST, l.pid
LIMIT 100";

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

/// A relay name's row, and what belongs to it elsewhere.
#[derive(Debug, sqlx::FromRow)]
pub struct RelayRow {
    /// The relay name.
    pub name: String,
    /// Who leads, or led last.
    pub leader: Option<String>,
    /// Since when.
    pub leader_since: Option<DateTime<Utc>>,
    /// Seconds since the last heartbeat.
    pub heartbeat_age: Option<f64>,
    /// The session that holds the leader's lock.
    pub pid: Option<i32>,
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
    /// Who paused it.
    pub paused_by: Option<String>,
    /// What its leader waits for, or waited for last.
    pub waiting: Json<Vec<Waiting>>,
    /// The last position handed out.
    pub mark: i64,
    /// When this was read, by the server's clock.
    pub at: DateTime<Utc>,
}

impl RelayRow {
    /// Somebody leads, and is heard of.
    pub fn is_led(&self) -> bool {
        self.pid.is_some() && self.heartbeat_age.is_some_and(|age| age <= SILENCE)
    }

    /// How many positions are settled; grows by what is published.
    pub fn settled(&self) -> i64 {
        self.high - self.open_positions
    }
}

/// What is stored and not settled.
#[derive(Debug, Default)]
pub struct Backlog {
    /// Stored in open ranges; at most [`MAX_COUNT`] and one.
    pub open: i64,
    /// Stored above what was read; at most [`MAX_COUNT`] and one.
    pub above: i64,
    /// When the transaction of the first of them began, and its age in seconds.
    pub oldest: Option<(DateTime<Utc>, f64)>,
}

/// Events that are set aside, by reason.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Parked {
    /// No queue takes them; tried again by themselves.
    pub unroutable: i64,
    /// The broker will not have them; tried again by hand.
    pub refused: i64,
}

impl Parked {
    /// All of them.
    pub fn all(self) -> i64 {
        self.unroutable + self.refused
    }
}

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

/// One look at a database, in one snapshot.
#[derive(Debug)]
pub struct State {
    /// Each relay with its backlog and what is set aside.
    pub relays: Vec<(RelayRow, Backlog, Parked)>,
    /// Who holds the outbox lock.
    pub holders: Vec<LockHolder>,
    /// The server is a standby, or still starting: nobody leads there, and the rest is a copy.
    pub in_recovery: bool,
}

/// Looks at all relays, or at the one called `name`.
pub async fn look(conn: &mut PgConnection, name: Option<&str>) -> Result<State, sqlx::Error> {
    let mut snapshot = conn.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let in_recovery = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut *snapshot).await?;
    let mut state = State { relays: Vec::new(), holders: Vec::new(), in_recovery };
    for (row, parked) in relays(&mut snapshot, name).await? {
        let backlog = backlog(&mut snapshot, &row.name).await?;
        state.relays.push((row, backlog, parked));
    }
    state.holders = holders(&mut snapshot).await?;
    snapshot.commit().await?;
    Ok(state)
}

/// All relays, or the one called `name`, and what each has set aside.
pub async fn relays(
    conn: &mut PgConnection,
    name: Option<&str>,
) -> Result<Vec<(RelayRow, Parked)>, sqlx::Error> {
    let rows: Vec<RelayRow> = sqlx::query_as(RELAYS).bind(name).fetch_all(&mut *conn).await?;
    let parked: Vec<(String, i64, i64)> = sqlx::query_as(PARKED).bind(name).fetch_all(conn).await?;
    let parked = |row: &RelayRow| {
        let aside = parked.iter().find(|(relay, ..)| *relay == row.name);
        aside.map_or_else(Parked::default, |&(_, unroutable, refused)| Parked { unroutable, refused })
    };
    Ok(rows
        .into_iter()
        .map(|row| {
            let parked = parked(&row);
            (row, parked)
        })
        .collect())
}

async fn backlog(conn: &mut PgConnection, name: &str) -> Result<Backlog, sqlx::Error> {
    let (open, above, created_at, age): (i64, i64, Option<DateTime<Utc>>, Option<f64>) =
        sqlx::query_as(BACKLOG).bind(name).bind(MAX_COUNT + 1).fetch_one(conn).await?;
    Ok(Backlog { open, above, oldest: created_at.zip(age) })
}

/// Who holds the outbox lock.
pub async fn holders(conn: &mut PgConnection) -> Result<Vec<LockHolder>, sqlx::Error> {
    sqlx::query_as(HOLDERS).fetch_all(conn).await
}

/// Fails unless there is a relay called `name`, and says which ones there are.
pub async fn known(conn: &mut PgConnection, name: &str) -> anyhow::Result<()> {
    let names: Vec<String> =
        sqlx::query_scalar("SELECT name FROM outbox.relay ORDER BY name").fetch_all(conn).await?;
    if names.iter().any(|known| known == name) {
        return Ok(());
    }
    if names.is_empty() {
        bail!("there is no relay called {name:?}: none has run on this database yet; start outbox-relay run");
    }
    bail!("there is no relay called {name:?} in this database; there is: {}", names.join(", "))
}
