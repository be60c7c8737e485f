//! Events that were set aside, so that the rest can go on. All the SQL of parking.

use std::{collections::HashSet, time::Duration};

use daemon::config::database::Failure;
use sqlx::{Connection, PgConnection};

use crate::{
    evidence::{EventKind, PublishFailure},
    row::Unreadable,
    waiting::{self, RetryRow, StoredRetry},
};

/// Bulk retries take at most so many at a time.
const BATCH: i64 = 500;
/// About how many bytes of them.
const BATCH_BYTES: i64 = 4 * 1024 * 1024;

/// An event to be set aside.
#[derive(Clone, Debug)]
pub struct Parking {
    /// Which one.
    pub position: i64,
    /// Why.
    pub reason: PublishFailure,
    /// In words, without its body.
    pub detail: String,
}

/// What to look for among the events that are aside.
#[derive(Clone, Copy, Debug)]
pub struct ParkedQuery<'a> {
    /// Kinds that were taken again lately: all of them are due.
    pub flowing: &'a HashSet<EventKind>,
    /// What is in memory already.
    pub except: &'a HashSet<i64>,
}

/// What is aside.
#[derive(Debug, Default)]
pub struct ParkedEvents {
    /// How many.
    pub count: i64,
    /// What to try now, in order of position.
    pub events: Vec<StoredRetry>,
    /// What was to be tried, and cannot be read as an event.
    pub unreadable: Vec<Unreadable>,
}

/// What became of events that were to be set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum SetAside {
    /// They are stored.
    Done,
    /// An erasure is under way, which a copy could escape: try again later.
    Erasing,
    /// Another relay has taken over.
    Deposed,
}

impl SetAside {
    pub(crate) fn fenced(mine: bool) -> Self {
        if mine { Self::Done } else { Self::Deposed }
    }
}

/// Keeps erasures out to the end of the transaction. It waits for those that have begun, for at most `wait`: an erasure
/// may belong to a transaction that stays open for minutes, and publishing goes on beside it. While it waits, erasures
/// that come later wait behind it. False when it was in vain, and the transaction can only be rolled back.
pub(crate) async fn keep_erasures_out(tx: &mut PgConnection, wait: Duration) -> sqlx::Result<bool> {
    // In the order of the columns: the limit is for this lock alone.
    let sql = "SELECT set_config('lock_timeout', $1, true), outbox.keep_erasures_out(), \
                      set_config('lock_timeout', '0', true)";
    match sqlx::query(sql).bind(wait.as_millis().max(1).to_string()).execute(tx).await {
        Ok(_) => Ok(true),
        Err(error) if Failure::of(&error) == Failure::Locked => Ok(false),
        Err(error) => Err(error),
    }
}

/// The next attempt: after a pause as long as the event has been aside, from 1 s to 1 min, so that it doubles; plus up to
/// a quarter, so that kinds set aside together do not come back together. Attempts before that, while it waited, count
/// for nothing.
const NEXT: &str = "now() + least(greatest(now() - parked_at, interval '1 second'), interval '1 minute') \
                    * (1 + random() / 4)";

/// Copies the events into `outbox.parked`, if `epoch` is still the relay's.
///
/// While it does, nobody erases: an erasure that has begun is waited for, for at most `wait`, and its erased form copied;
/// one that comes later finds the copies. The lock comes in a statement of its own, so that the copying one sees
/// what was committed until then.
pub async fn park(
    conn: &mut PgConnection,
    relay: &str,
    epoch: i64,
    parkings: &[Parking],
    wait: Duration,
) -> Result<SetAside, sqlx::Error> {
    let positions: Vec<i64> = parkings.iter().map(|p| p.position).collect();
    let reasons: Vec<&str> = parkings.iter().map(|p| p.reason.as_str()).collect();
    let details: Vec<&str> = parkings.iter().map(|p| &*p.detail).collect();
    // By the primary key, in order of position, so that two who park the same do not deadlock. An event
    // that is aside already, because a leader was killed before it stored its progress, stays as it is;
    // one that waited gets its copy. What an operator has dropped meanwhile does not come back.
    let sql = "\
        WITH fence AS (SELECT dropped_by_hand FROM outbox.relay WHERE name = $1 AND epoch = $2), \
        parked AS ( \
            INSERT INTO outbox.parked (relay, position, id, aggregate_type, aggregate_id, version, type, payload, \
                                       headers, created_at, previous_id, reason, detail, next_attempt_at) \
            SELECT $1, e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload, \
                   e.headers, e.created_at, e.previous_id, p.reason, p.detail, \
                   CASE WHEN p.reason <> 'refused' THEN now() + interval '1 second' END \
            FROM unnest($3::bigint[], $4::text[], $5::text[]) AS p (position, reason, detail) \
            JOIN outbox.readable e USING (position) \
            WHERE EXISTS (SELECT FROM fence WHERE NOT dropped_by_hand @> e.position) \
            ORDER BY e.position \
            ON CONFLICT (relay, position) DO UPDATE \
            SET state = 'parked', payload = excluded.payload, headers = excluded.headers, \
                previous_id = excluded.previous_id, \
                reason = excluded.reason, detail = excluded.detail, attempts = parked.attempts + 1, \
                parked_at = now(), last_attempt_at = now(), next_attempt_at = excluded.next_attempt_at \
            WHERE parked.state = 'waiting') \
        SELECT EXISTS (SELECT FROM fence)";
    let mut tx = conn.begin().await?;
    if !keep_erasures_out(&mut tx, wait).await? {
        tx.rollback().await?;
        return Ok(SetAside::Erasing);
    }
    let mine = sqlx::query_scalar(sql)
        .bind(relay)
        .bind(epoch)
        .bind(positions)
        .bind(reasons)
        .bind(details)
        .fetch_one(&mut *tx)
        .await?;
    tx.commit().await?;
    Ok(SetAside::fenced(mine))
}

/// One more attempt in vain, because no queue takes events of this kind yet: they get their next turn,
/// later each time.
pub async fn postpone(conn: &mut PgConnection, relay: &str, positions: &[i64]) -> Result<(), sqlx::Error> {
    let sql = format!(
        "UPDATE outbox.parked SET attempts = attempts + 1, last_attempt_at = now(), next_attempt_at = {NEXT}
         WHERE relay = $1 AND position = ANY($2)"
    );
    sqlx::query(sqlx::AssertSqlSafe(sql)).bind(relay).bind(positions).execute(conn).await?;
    Ok(())
}

/// One more attempt at an event that is refused for itself: nothing is tried again without being told.
pub async fn refuse(
    conn: &mut PgConnection,
    relay: &str,
    position: i64,
    detail: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE outbox.parked SET attempts = attempts + 1, last_attempt_at = now(), next_attempt_at = NULL,
                                  reason = 'refused', detail = $3
         WHERE relay = $1 AND position = $2",
    )
    .bind(relay)
    .bind(position)
    .bind(detail)
    .execute(conn)
    .await?;
    Ok(())
}

/// Counts what is aside and reads what of it is to be tried now: of kinds that flow again all; of the
/// others the oldest, when it is due, to find out, so that none goes before an older one of its kind; and
/// what was refused, each for itself.
pub async fn due(
    conn: &mut PgConnection,
    relay: &str,
    due: ParkedQuery<'_>,
) -> Result<ParkedEvents, sqlx::Error> {
    let count = sqlx::query_scalar("SELECT parked_events FROM outbox.relay_status WHERE name = $1");
    let count: i64 = count.bind(relay).fetch_optional(&mut *conn).await?.unwrap_or(0);
    if count == 0 {
        return Ok(ParkedEvents::default());
    }
    let (types, aggregate_types): (Vec<&str>, Vec<&str>) =
        due.flowing.iter().map(|kind| (&*kind.type_, &*kind.aggregate_type)).unzip();
    let except: Vec<i64> = due.except.iter().copied().collect();
    // Bodies are read only of what is chosen, and no more of them than fit: a running sum stops it.
    let sql = "\
        WITH flowing AS (SELECT * FROM unnest($2::text[], $3::text[]) AS f (type, aggregate_type)), \
        oldest AS ( \
            SELECT DISTINCT ON (type, aggregate_type, CASE reason WHEN 'refused' THEN position END) \
                   position, next_attempt_at \
            FROM outbox.parked p \
            WHERE relay = $1 AND state = 'parked' \
              AND NOT EXISTS (SELECT FROM flowing f \
                              WHERE f.type = p.type AND f.aggregate_type = p.aggregate_type AND p.reason <> 'refused') \
            ORDER BY type, aggregate_type, CASE reason WHEN 'refused' THEN position END, position), \
        probes AS (SELECT position FROM oldest WHERE next_attempt_at <= now()), \
        flow AS ( \
            SELECT position FROM outbox.parked JOIN flowing USING (type, aggregate_type) \
            WHERE relay = $1 AND state = 'parked' AND reason <> 'refused'), \
        chosen AS ( \
            SELECT position, sum(pg_column_size(payload) + 512) OVER (ORDER BY position) AS bytes \
            FROM (SELECT position FROM probes UNION SELECT position FROM flow) c \
            JOIN outbox.parked p USING (position) \
            WHERE p.relay = $1 AND p.state = 'parked' AND position <> ALL ($4) \
            ORDER BY position LIMIT $5) \
        SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload::text, e.headers, \
               e.created_at, e.previous_id, q.attempts, q.reason, extract(epoch FROM now() - q.parked_at)::float8 \
        FROM chosen c \
        JOIN outbox.readable_parked e ON e.relay = $1 AND e.position = c.position \
        JOIN outbox.parked q ON q.relay = $1 AND q.position = c.position \
        WHERE c.bytes <= $6 OR c.position = (SELECT min(position) FROM chosen) \
        ORDER BY e.position";
    let rows: Vec<RetryRow> = sqlx::query_as(sql)
        .bind(relay)
        .bind(types)
        .bind(aggregate_types)
        .bind(except)
        .bind(BATCH)
        .bind(BATCH_BYTES)
        .fetch_all(conn)
        .await?;
    let (events, unreadable) = waiting::split(rows);
    Ok(ParkedEvents { count, events, unreadable })
}
