//! Events that wait in `outbox.parked`, and later events of their aggregates behind them. All the SQL of waiting.

use std::{collections::HashMap, time::Duration};

use sqlx::{Connection, PgConnection};

use crate::{
    event::Event,
    evidence::{EventKind, PublishFailure},
    row::{Row, Unreadable},
};

/// Rows that are read at once.
const BATCH: i64 = 500;
/// About how many bytes of them.
const BATCH_BYTES: i64 = 4 * 1024 * 1024;
/// Of an aggregate whose first event is likely to be taken, so many come with it.
const TOGETHER: i64 = 20;

/// Of each aggregate of the rows that `gone` names, the first one that is left is tried next. `$1` is the relay, `$2`
/// are positions that are not to be counted, because this statement still sees them.
const NEXT: &str = "\
    UPDATE outbox.parked SET next_attempt_at = now() \
    WHERE relay = $1 AND position IN ( \
        SELECT h.position \
        FROM (SELECT DISTINCT aggregate_type, aggregate_id FROM gone) a \
        CROSS JOIN LATERAL ( \
            SELECT w.position, w.next_attempt_at FROM outbox.parked w \
            WHERE w.relay = $1 AND w.state = 'waiting' AND w.aggregate_type = a.aggregate_type \
              AND w.aggregate_id = a.aggregate_id AND w.position <> ALL ($2) \
            ORDER BY w.position LIMIT 1) h \
        WHERE h.next_attempt_at IS NULL)";

/// How many rows of each kind wait.
pub type WaitingCounts = HashMap<EventKind, i64>;

/// An event that is to wait in `outbox.parked`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spilled {
    /// Which one.
    pub position: i64,
    /// Its kind.
    pub kind: EventKind,
    /// How it was not taken, or `behind` when it was not tried.
    pub reason: &'static str,
    /// In words.
    pub detail: String,
    /// How often it was not taken.
    pub tries: u32,
    /// The first of its aggregate: after this pause it is tried again. None for what waits behind it.
    pub retry: Option<Duration>,
}

/// Which rows to read.
#[derive(Debug, Default)]
pub struct WaitingQuery<'a> {
    /// Of these kinds; of one that flows again, whatever is not due yet, too.
    pub kinds: Vec<(&'a EventKind, bool)>,
    /// Of each kind, so many that were tried before.
    pub tried: i64,
    /// And so many that were not.
    pub untried: i64,
    /// What is in memory already.
    pub except: Vec<i64>,
}

/// An event with a row in `outbox.parked` that is to be tried again.
#[derive(Debug)]
pub struct StoredRetry {
    /// The event.
    pub event: Event,
    /// How often it was not taken.
    pub tries: u32,
    /// How.
    pub failure: Option<PublishFailure>,
    /// How long it has had its row.
    pub age: Duration,
}

/// Has events wait, if `epoch` is still the relay's; none when it is not. Returns what there is now of each kind more.
pub async fn spill(
    conn: &mut PgConnection,
    relay: &str,
    epoch: i64,
    spilled: &[Spilled],
) -> Result<Option<WaitingCounts>, sqlx::Error> {
    let positions: Vec<i64> = spilled.iter().map(|s| s.position).collect();
    let reasons: Vec<&str> = spilled.iter().map(|s| s.reason).collect();
    let details: Vec<&str> = spilled.iter().map(|s| &*s.detail).collect();
    let tries: Vec<i32> = spilled.iter().map(|s| i32::try_from(s.tries).unwrap_or(i32::MAX)).collect();
    let pauses: Vec<Option<f64>> = spilled.iter().map(|s| s.retry.map(|pause| pause.as_secs_f64())).collect();
    // An event that is there already, because a leader was killed before it stored its progress, stays as it is.
    let sql = "\
        WITH fence AS (SELECT dropped_by_hand FROM outbox.relay WHERE name = $1 AND epoch = $2), \
        waiting AS ( \
            INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, created_at, \
                                       reason, detail, attempts, next_attempt_at, state) \
            SELECT $1, e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.created_at, \
                   s.reason, s.detail, s.tries, now() + s.pause * interval '1 second', 'waiting' \
            FROM unnest($3::bigint[], $4::text[], $5::text[], $6::int[], $7::float8[]) \
                 AS s (position, reason, detail, tries, pause) \
            JOIN outbox.event e USING (position) \
            WHERE EXISTS (SELECT FROM fence WHERE NOT dropped_by_hand @> e.position) \
            ORDER BY e.position \
            ON CONFLICT (relay, position) DO NOTHING \
            RETURNING type, aggregate_type) \
        SELECT EXISTS (SELECT FROM fence), type, aggregate_type, n \
        FROM (SELECT) one LEFT JOIN (SELECT type, aggregate_type, count(*) AS n FROM waiting GROUP BY 1, 2) w ON true";
    let mut tx = conn.begin().await?;
    let rows: Vec<Counted> = sqlx::query_as(sql)
        .bind(relay)
        .bind(epoch)
        .bind(&positions)
        .bind(reasons)
        .bind(details)
        .bind(tries)
        .bind(pauses)
        .fetch_all(&mut *tx)
        .await?;
    // Where the first of an aggregate was there already, set aside, the next one begins.
    let sql = format!(
        "WITH gone AS (SELECT aggregate_type, aggregate_id FROM outbox.event WHERE position = ANY ($3)) {NEXT}"
    );
    let next = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(relay).bind(&[] as &[i64]).bind(positions);
    next.execute(&mut *tx).await?;
    tx.commit().await?;
    Ok(counted(rows))
}

/// Whether the relay's epoch is the stored one; and a kind, with how many there are.
type Counted = (bool, Option<String>, Option<String>, Option<i64>);
/// The same; and one event's kind and position, and whether its row is new.
type Behind = (bool, Option<String>, Option<String>, Option<i64>, Option<bool>);

/// Of events that were read, has those wait whose aggregate does, if `epoch` is still the relay's; none when it is
/// not. Returns their positions, and what there is of each kind more.
pub async fn divert(
    conn: &mut PgConnection,
    relay: &str,
    epoch: i64,
    positions: &[i64],
) -> Result<Option<(Vec<i64>, WaitingCounts)>, sqlx::Error> {
    let sql = "\
        WITH fence AS (SELECT FROM outbox.relay WHERE name = $1 AND epoch = $2), \
        behind AS ( \
            SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.created_at \
            FROM outbox.event e \
            WHERE e.position = ANY ($3) AND EXISTS (SELECT FROM fence) \
              AND EXISTS (SELECT FROM outbox.parked w \
                          WHERE w.relay = $1 AND w.state = 'waiting' AND w.aggregate_type = e.aggregate_type \
                            AND w.aggregate_id = e.aggregate_id)), \
        waiting AS ( \
            INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, created_at, \
                                       reason, detail, attempts, state) \
            SELECT $1, position, id, aggregate_type, aggregate_id, version, type, created_at, 'behind', '', 0, 'waiting' \
            FROM behind ORDER BY position \
            ON CONFLICT (relay, position) DO NOTHING \
            RETURNING position) \
        SELECT EXISTS (SELECT FROM fence), b.type, b.aggregate_type, b.position, w.position IS NOT NULL \
        FROM (SELECT) one LEFT JOIN behind b ON true LEFT JOIN waiting w USING (position)";
    let rows: Vec<Behind> =
        sqlx::query_as(sql).bind(relay).bind(epoch).bind(positions).fetch_all(conn).await?;
    let (mut diverted, mut counts) = (Vec::new(), WaitingCounts::new());
    for (fence, type_, aggregate_type, position, new) in rows {
        if !fence {
            return Ok(None);
        }
        if let (Some(type_), Some(aggregate_type), Some(position)) = (type_, aggregate_type, position) {
            diverted.push(position);
            *counts.entry(EventKind { type_, aggregate_type }).or_default() += i64::from(new == Some(true));
        }
    }
    Ok(Some((diverted, counts)))
}

/// These are taken, or dropped: their rows go, and the next one of each aggregate is tried. Returns what there is of
/// each kind less that waited.
pub async fn remove_rows(
    conn: &mut PgConnection,
    relay: &str,
    positions: &[i64],
) -> Result<WaitingCounts, sqlx::Error> {
    let sql = format!(
        "WITH gone AS (DELETE FROM outbox.parked WHERE relay = $1 AND position = ANY ($2) \
                       RETURNING type, aggregate_type, aggregate_id, state), \
         next AS ({NEXT}) \
         SELECT true, type, aggregate_type, count(*) FROM gone WHERE state = 'waiting' GROUP BY 2, 3"
    );
    let rows = sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(relay).bind(positions).fetch_all(conn).await?;
    Ok(counted(rows).unwrap_or_default())
}

/// These were set aside meanwhile: what waited behind them is tried.
pub async fn release_next(
    conn: &mut PgConnection,
    relay: &str,
    positions: &[i64],
) -> Result<(), sqlx::Error> {
    let sql = format!(
        "WITH gone AS (SELECT aggregate_type, aggregate_id FROM outbox.parked WHERE relay = $1 AND position = ANY ($2)) \
         {NEXT}"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql)).bind(relay).bind(positions).execute(conn).await?;
    Ok(())
}

/// These were not taken once more: they wait for their next turn.
pub async fn postpone(
    conn: &mut PgConnection,
    relay: &str,
    failed: &[(i64, PublishFailure, String, f64)],
) -> Result<(), sqlx::Error> {
    let positions: Vec<i64> = failed.iter().map(|(position, ..)| *position).collect();
    let reasons: Vec<&str> = failed.iter().map(|(_, failure, ..)| failure.as_str()).collect();
    let details: Vec<&str> = failed.iter().map(|(_, _, why, _)| &**why).collect();
    let pauses: Vec<f64> = failed.iter().map(|(.., pause)| *pause).collect();
    let sql = "\
        UPDATE outbox.parked p \
        SET attempts = p.attempts + 1, last_attempt_at = now(), reason = f.reason, detail = f.detail, \
            next_attempt_at = now() + f.pause * interval '1 second' \
        FROM unnest($2::bigint[], $3::text[], $4::text[], $5::float8[]) AS f (position, reason, detail, pause) \
        WHERE p.relay = $1 AND p.position = f.position AND p.state = 'waiting'";
    let update = sqlx::query(sql).bind(relay).bind(positions).bind(reasons).bind(details).bind(pauses);
    update.execute(conn).await?;
    Ok(())
}

/// How many of each kind wait.
pub async fn count(conn: &mut PgConnection, relay: &str) -> Result<WaitingCounts, sqlx::Error> {
    let sql = "SELECT true, type, aggregate_type, count(*) FROM outbox.parked \
               WHERE relay = $1 AND state = 'waiting' GROUP BY 2, 3";
    Ok(counted(sqlx::query_as(sql).bind(relay).fetch_all(conn).await?).unwrap_or_default())
}

/// Reads what is to be tried of what waits: the first of each aggregate, and some of those behind it.
pub async fn due(
    conn: &mut PgConnection,
    relay: &str,
    wanted: &WaitingQuery<'_>,
) -> Result<(Vec<StoredRetry>, Vec<Unreadable>), sqlx::Error> {
    let types: Vec<&str> = wanted.kinds.iter().map(|(kind, _)| &*kind.type_).collect();
    let aggregate_types: Vec<&str> = wanted.kinds.iter().map(|(kind, _)| &*kind.aggregate_type).collect();
    let flows: Vec<bool> = wanted.kinds.iter().map(|(_, flows)| *flows).collect();
    let sql = "\
        WITH head AS ( \
            SELECT h.*, k.flows \
            FROM unnest($2::text[], $3::text[], $4::bool[]) AS k (type, aggregate_type, flows) \
            CROSS JOIN LATERAL ( \
                (SELECT w.position, w.aggregate_type, w.aggregate_id, w.attempts, w.next_attempt_at \
                 FROM outbox.parked w \
                 WHERE w.relay = $1 AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL AND w.type = k.type \
                   AND w.aggregate_type = k.aggregate_type AND least(w.attempts, 1) = 1 \
                   AND (k.flows OR w.next_attempt_at <= now()) AND w.position <> ALL ($7) \
                 ORDER BY w.next_attempt_at LIMIT $5) \
                UNION ALL \
                (SELECT w.position, w.aggregate_type, w.aggregate_id, w.attempts, w.next_attempt_at \
                 FROM outbox.parked w \
                 WHERE w.relay = $1 AND w.state = 'waiting' AND w.next_attempt_at IS NOT NULL AND w.type = k.type \
                   AND w.aggregate_type = k.aggregate_type AND least(w.attempts, 1) = 0 \
                   AND (k.flows OR w.next_attempt_at <= now()) AND w.position <> ALL ($7) \
                 ORDER BY w.next_attempt_at LIMIT $6)) h), \
        chosen AS ( \
            SELECT r.position, r.attempts, r.reason, r.parked_at, \
                   row_number() OVER turn AS n, sum(pg_column_size(e.payload) + 512) OVER turn AS bytes \
            FROM head h \
            CROSS JOIN LATERAL ( \
                SELECT w.position, w.attempts, w.reason, w.parked_at FROM outbox.parked w \
                WHERE w.relay = $1 AND w.state = 'waiting' AND w.aggregate_type = h.aggregate_type \
                  AND w.aggregate_id = h.aggregate_id AND w.position >= h.position \
                ORDER BY w.position LIMIT CASE WHEN h.attempts = 1 AND NOT h.flows THEN 1 ELSE $8 END) r \
            JOIN outbox.event e ON e.position = r.position \
            WINDOW turn AS (ORDER BY h.next_attempt_at, h.position, r.position) \
            ORDER BY n LIMIT $9) \
        SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload::text, e.headers, \
               e.created_at, e.previous_id, c.attempts, c.reason, extract(epoch FROM now() - c.parked_at)::float8 \
        FROM chosen c JOIN outbox.readable e ON e.position = c.position \
        WHERE c.bytes <= $10 OR c.n = 1 \
        ORDER BY c.n";
    let rows: Vec<RetryRow> = sqlx::query_as(sql)
        .bind(relay)
        .bind(types)
        .bind(aggregate_types)
        .bind(flows)
        .bind(wanted.tried)
        .bind(wanted.untried)
        .bind(&wanted.except)
        .bind(TOGETHER)
        .bind(BATCH)
        .bind(BATCH_BYTES)
        .fetch_all(conn)
        .await?;
    Ok(split(rows))
}

/// Separates rows that can be read from those that cannot.
pub(crate) fn split(rows: Vec<RetryRow>) -> (Vec<StoredRetry>, Vec<Unreadable>) {
    let (mut waiters, mut unreadable) = (Vec::new(), Vec::new());
    for row in rows {
        match row.event {
            Row::Event(event) => waiters.push(StoredRetry {
                event,
                tries: u32::try_from(row.attempts).unwrap_or(u32::MAX),
                failure: PublishFailure::stored(&row.reason),
                age: Duration::try_from_secs_f64(row.age).unwrap_or_default(),
            }),
            Row::Unreadable(row) => unreadable.push(row),
        }
    }
    (waiters, unreadable)
}

/// An event's columns, and after them `attempts`, `reason` and the row's age in seconds.
pub(crate) struct RetryRow {
    event: Row,
    attempts: i32,
    reason: String,
    age: f64,
}

impl<'r> sqlx::FromRow<'r, sqlx::postgres::PgRow> for RetryRow {
    fn from_row(row: &'r sqlx::postgres::PgRow) -> Result<Self, sqlx::Error> {
        use sqlx::Row as _;
        Ok(Self {
            event: Row::from_row(row)?,
            attempts: row.try_get(10)?,
            reason: row.try_get(11)?,
            age: row.try_get(12)?,
        })
    }
}

fn counted(rows: Vec<Counted>) -> Option<WaitingCounts> {
    let mut counts = WaitingCounts::new();
    for (fence, type_, aggregate_type, n) in rows {
        if !fence {
            return None;
        }
        if let (Some(type_), Some(aggregate_type), Some(n)) = (type_, aggregate_type, n) {
            counts.insert(EventKind { type_, aggregate_type }, n);
        }
    }
    Some(counts)
}
