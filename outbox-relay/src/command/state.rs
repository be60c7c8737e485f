//! What a database tells about its relays. All the SQL of `status`, part of that of `doctor`.

use std::fmt::Write as _;

use anyhow::bail;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection, types::Json};
use uuid::Uuid;

use crate::row::Made;

/// A leader that has stored no heartbeat for so many seconds is none.
pub const SILENCE: f64 = 15.0;
/// Events are counted up to here; beyond it, that there are more is all that is told.
pub const MAX_COUNT: i64 = 10_000;
/// Of so many kinds of events it is told what waits.
const MAX_KINDS: i64 = 20;

/// Every relay name, or the one in `$1`: few rows. Who leads is whoever holds the leader's lock (class
/// 1869968492, key: the relay's id). `$2` is the sequence's mark of before the snapshot, of which the sequence is no
/// part: so what was handed out by then and is not stored was taken by a transaction that is open, or was rolled back.
const RELAYS: &str = "\
SELECT r.name, r.leader, r.leader_since,
       extract(epoch FROM clock_timestamp() - r.heartbeat_at)::float8 AS heartbeat_age, l.pid,
       r.low_water, r.high,
       (SELECT count(*) FROM unnest(r.open)) AS open_ranges,
       (SELECT coalesce(sum(upper(o) - lower(o)), 0)::bigint FROM unnest(r.open) o) AS open_positions,
       r.paused_at, r.paused_by, r.waiting, greatest($2, r.high) AS mark, clock_timestamp() AS at
FROM outbox.relay r
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
       CASE WHEN isfinite(o.created_at) THEN extract(epoch FROM clock_timestamp() - o.created_at)::float8 END
FROM (SELECT) one
LEFT JOIN (SELECT position, created_at FROM open UNION ALL SELECT position, created_at FROM above
           ORDER BY position LIMIT 1) o ON true";

/// What is set aside: at most as many rows as `--max-parked` allows.
const PARKED: &str = "\
SELECT relay, count(*) FILTER (WHERE reason = 'unroutable') AS unroutable,
       count(*) FILTER (WHERE reason = 'refused') AS refused, count(*) FILTER (WHERE reason = 'nacked') AS nacked,
       count(*) FILTER (WHERE reason = 'silent') AS silent
FROM outbox.parked WHERE state = 'parked' AND ($1::text IS NULL OR relay = $1) GROUP BY relay";

/// What waits in the database, by type and reason: of each kind, up to `$2` first events of aggregates. A kind is found
/// by one step in the index `parked_waiting_due`, so that this is quick in front of millions of rows.
const WAITING: &str = "\
WITH RECURSIVE kind AS (
    (SELECT w.type, w.aggregate_type FROM outbox.parked w
     WHERE w.relay = $1 AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL
     ORDER BY w.type, w.aggregate_type LIMIT 1)
    UNION ALL
    SELECT n.type, n.aggregate_type FROM kind k
    CROSS JOIN LATERAL (SELECT w.type, w.aggregate_type FROM outbox.parked w
                        WHERE w.relay = $1 AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL
                          AND (w.type, w.aggregate_type) > (k.type, k.aggregate_type)
                        ORDER BY w.type, w.aggregate_type LIMIT 1) n),
first AS (
    SELECT f.* FROM (SELECT type, aggregate_type FROM kind LIMIT $3) k
    CROSS JOIN LATERAL (SELECT w.position, w.id, w.type, w.reason, w.detail, w.parked_at, w.next_attempt_at
                        FROM outbox.parked w
                        WHERE w.relay = $1 AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL
                          AND w.type = k.type AND w.aggregate_type = k.aggregate_type LIMIT $2) f)
SELECT type, reason, count(*) AS aggregates, min(parked_at) AS since,
       (array_agg(id ORDER BY position))[1] AS oldest, (array_agg(detail ORDER BY position))[1] AS detail,
       min(next_attempt_at) AS next_attempt_at
FROM first GROUP BY type, reason ORDER BY since, type, reason";

/// Who holds the outbox lock (class 1869968482, key 1), for the longest first. A prepared transaction has no session. Its
/// locks keep the virtual transaction id of the session that prepared it, and have `-1/<xid>` after a restart of the
/// server; among them is the one on its transaction id, by which it is found. Ages are unknown to a role without
/// `pg_read_all_stats`, but for its own sessions.
const HOLDERS: &str = "\
SELECT l.pid, a.application_name, a.state, p.gid, coalesce(a.xact_start, p.prepared) AS since,
       extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8 AS seconds
FROM pg_locks l
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LEFT JOIN LATERAL (
    SELECT x.gid, x.prepared FROM pg_locks t JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
    WHERE l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
      AND t.virtualtransaction = l.virtualtransaction) p ON true
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
    /// When the first of them was made, as its writer says.
    pub oldest: Option<Made>,
    /// Its age in seconds; none where that time is infinite.
    pub age: Option<f64>,
}

/// Events that are set aside, by reason.
#[derive(Clone, Copy, Debug, Default, Serialize, sqlx::FromRow)]
pub struct Parked {
    /// No queue takes them; tried again by themselves.
    pub unroutable: i64,
    /// The broker will not have them; tried again by hand.
    pub refused: i64,
    /// A full queue refuses them, and a rule lets later ones go on; tried again by themselves.
    pub nacked: i64,
    /// The broker does not answer for them, and a rule lets later ones go on; tried again by themselves.
    pub silent: i64,
}

impl Parked {
    /// All of them.
    pub fn all(self) -> i64 {
        self.unroutable + self.refused + self.nacked + self.silent
    }

    /// How many for which reason, without the reasons that only a rule brings up.
    pub fn text(self) -> String {
        let Self { unroutable, refused, nacked, silent } = self;
        let mut text = format!("{unroutable} unroutable, {refused} refused");
        for (count, reason) in [(nacked, "nacked"), (silent, "silent")] {
            if count > 0 {
                let _ = write!(text, ", {count} {reason}");
            }
        }
        text
    }
}

/// Events that wait in the database, and later events of their aggregates behind them.
#[derive(Clone, Debug, Serialize)]
pub struct WaitingEvents {
    /// How many; none when there are more than are counted.
    pub events: Option<i64>,
    /// When the first of them got its row.
    pub since: Option<DateTime<Utc>>,
    /// The first event of each aggregate, by type and reason.
    pub groups: Vec<WaitingGroup>,
}

/// The first events of aggregates, of one type and for one reason: they are tried again, and the rest waits behind.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct WaitingGroup {
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// How they are not taken; `behind` when they were not tried yet.
    pub reason: String,
    /// How many; at most [`MAX_COUNT`] and one of each aggregate type.
    pub aggregates: i64,
    /// When the first of them got its row.
    pub since: DateTime<Utc>,
    /// The id of the oldest.
    pub oldest: Uuid,
    /// Why it is not taken, in the relay's words.
    pub detail: String,
    /// When one of them is tried next.
    pub next_attempt_at: DateTime<Utc>,
}

impl WaitingEvents {
    /// Nothing waits.
    pub fn is_empty(&self) -> bool {
        self.events == Some(0)
    }

    /// How many, and since when.
    pub fn text(&self) -> String {
        let since = super::status::time(self.since);
        match self.events {
            Some(events) => {
                let wait = if events == 1 { "waits" } else { "wait" };
                format!("{} {wait}, the oldest since {since}", super::many(events, "event"))
            }
            None => format!("more than {MAX_COUNT} events wait, the oldest since {since} or longer"),
        }
    }
}

impl WaitingGroup {
    /// How many, and for what.
    pub fn text(&self) -> String {
        let Self { type_, aggregates, reason, detail, .. } = self;
        let (count, begin) = match *aggregates {
            1 => ("1 aggregate".to_owned(), "begins"),
            count if count <= MAX_COUNT => (format!("{count} aggregates"), "begin"),
            _ => (format!("more than {MAX_COUNT} aggregates"), "begin"),
        };
        match &**reason {
            "behind" => format!("{count} {begin} with {type_}, not tried yet"),
            _ => format!("{count} {begin} with {type_}, {reason}: {detail}"),
        }
    }

    /// What to do so that they are taken.
    pub fn advice(&self) -> String {
        let advice = match &*self.reason {
            "unroutable" => "bind a queue that takes the type to the exchange",
            "nacked" => "let the full queue's consumers catch up, or raise or remove its length limit",
            "silent" => "start the broker's nodes that are down, so that the queue has its majority again",
            "refused" => {
                let oldest = self.oldest;
                return format!(
                    "remove the cause that the broker gives, or give the event up: outbox-relay parked drop --id {oldest} --yes"
                );
            }
            _ => "the relay that leads tries them soon",
        };
        advice.to_owned()
    }
}

/// What a relay has read, and the broker has not taken.
#[derive(Clone, Debug)]
pub struct NotTaken {
    /// Set aside: later events of their aggregates go on.
    pub parked: Parked,
    /// Waiting: later events of their aggregates wait behind them.
    pub waiting: WaitingEvents,
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
    /// Each relay with its backlog, and what is set aside and waits.
    pub relays: Vec<(RelayRow, Backlog, NotTaken)>,
    /// Who holds the outbox lock.
    pub holders: Vec<LockHolder>,
    /// The server is a standby, or still starting: nobody leads there, and the rest is a copy.
    pub in_recovery: bool,
}

/// Looks at all relays, or at the one called `name`.
pub async fn look(conn: &mut PgConnection, name: Option<&str>) -> Result<State, sqlx::Error> {
    let mark = mark(conn).await?;
    let mut snapshot = conn.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let in_recovery = sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut *snapshot).await?;
    let mut state = State { relays: Vec::new(), holders: Vec::new(), in_recovery };
    for (row, not_taken) in relays_at(&mut snapshot, name, mark).await? {
        let backlog = backlog(&mut snapshot, &row.name).await?;
        state.relays.push((row, backlog, not_taken));
    }
    state.holders = holders(&mut snapshot).await?;
    snapshot.commit().await?;
    Ok(state)
}

/// The last position handed out.
async fn mark(conn: &mut PgConnection) -> Result<i64, sqlx::Error> {
    let mark = "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM outbox.position";
    sqlx::query_scalar(mark).fetch_one(conn).await
}

/// All relays, or the one called `name`, and what of each is not taken.
pub async fn relays(
    conn: &mut PgConnection,
    name: Option<&str>,
) -> Result<Vec<(RelayRow, NotTaken)>, sqlx::Error> {
    let mark = mark(conn).await?;
    relays_at(conn, name, mark).await
}

async fn relays_at(
    conn: &mut PgConnection,
    name: Option<&str>,
    mark: i64,
) -> Result<Vec<(RelayRow, NotTaken)>, sqlx::Error> {
    let rows: Vec<RelayRow> = sqlx::query_as(RELAYS).bind(name).bind(mark).fetch_all(&mut *conn).await?;
    let parked: Vec<ParkedRow> = sqlx::query_as(PARKED).bind(name).fetch_all(&mut *conn).await?;
    let mut relays = Vec::new();
    for row in rows {
        let parked = parked.iter().find(|aside| aside.relay == row.name);
        let parked = parked.map_or_else(Parked::default, |aside| aside.parked);
        let waiting = waiting(conn, &row.name).await?;
        relays.push((row, NotTaken { parked, waiting }));
    }
    Ok(relays)
}

#[derive(sqlx::FromRow)]
struct ParkedRow {
    relay: String,
    #[sqlx(flatten)]
    parked: Parked,
}

async fn waiting(conn: &mut PgConnection, name: &str) -> Result<WaitingEvents, sqlx::Error> {
    let sql =
        "SELECT count(*) FROM (SELECT FROM outbox.parked WHERE relay = $1 AND state = 'waiting' LIMIT $2) w";
    let events: i64 = sqlx::query_scalar(sql).bind(name).bind(MAX_COUNT + 1).fetch_one(&mut *conn).await?;
    let mut groups: Vec<WaitingGroup> = Vec::new();
    if events > 0 {
        let waiting = sqlx::query_as(WAITING).bind(name).bind(MAX_COUNT + 1).bind(MAX_KINDS);
        groups = waiting.fetch_all(conn).await?;
    }
    let since = groups.iter().map(|group| group.since).min();
    Ok(WaitingEvents { events: (events <= MAX_COUNT).then_some(events), since, groups })
}

async fn backlog(conn: &mut PgConnection, name: &str) -> Result<Backlog, sqlx::Error> {
    let (open, above, oldest, age): (i64, i64, Option<Made>, Option<f64>) =
        sqlx::query_as(BACKLOG).bind(name).bind(MAX_COUNT + 1).fetch_one(conn).await?;
    Ok(Backlog { open, above, oldest, age })
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
