//! Reading events by position, without losing any. All the SQL of a read.

use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use sqlx::PgConnection;

use crate::{
    event::Event,
    position::{Holder, Positions, Sample, Vxid},
    row::{self, Row, Unreadable},
};

/// Stretches of missing positions beyond which the relay stops reading on until some are resolved.
const MAX_GAPS: usize = 10_000;
/// Looks at `pg_locks` are at least this far apart: each takes a lock on the server's lock table.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);

/// Rows that the first read asks for. The server sends all of them, whatever the budget of bytes takes:
/// of a thousand large events that could be more than it sends in time, again and again.
const FIRST_ROWS: usize = 100;

/// How much one read may bring.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// At most so many events.
    pub events: usize,
    /// At most so many bytes, by [`Event::size`]; but always one event.
    pub bytes: usize,
}

/// What one read brought.
#[derive(Debug, Default)]
pub struct Batch {
    /// The events that are new, in order of position.
    pub events: Vec<Event>,
    /// Rows that are new and cannot be read as events.
    pub unreadable: Vec<Unreadable>,
    /// Positions among them that had been given up as rolled back.
    pub late: Vec<i64>,
    /// How many missing positions were given up now.
    pub died: i64,
    /// There is more to read right away.
    pub more: bool,
}

/// The read. One statement, one snapshot: gaps first and the rest after, in two statements, would let an
/// event overtake its predecessor. Each leg has its own order and limit, so that each is an index scan
/// of at most `$4` rows; a limit around the union would read the whole rest.
pub const READ: &str = "\
(SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload::text, e.headers, e.created_at,
        e.previous_id
 FROM unnest($1::bigint[], $2::bigint[]) AS gap (lo, hi)
 CROSS JOIN LATERAL (SELECT * FROM outbox.readable WHERE position BETWEEN gap.lo AND gap.hi ORDER BY position LIMIT $4) e
 ORDER BY e.position LIMIT $4)
UNION ALL
(SELECT position, id, aggregate_type, aggregate_id, version, type, payload::text, headers, created_at, previous_id
 FROM outbox.readable WHERE position > $3 ORDER BY position LIMIT $5)
ORDER BY position";

/// The transactions that hold the outbox lock in this database. A prepared one has no session.
const HOLDERS: &str = "\
SELECT split_part(virtual_transaction, '/', 1)::int, split_part(virtual_transaction, '/', 2)::bigint, pid IS NULL,
       idle_since, CASE WHEN pid IS NOT NULL THEN since END
FROM outbox.lock_holder";

/// The sequence's mark between two times of the server. `statement_timestamp()` was taken before the
/// sequence was read, `clock_timestamp()` is taken after.
const SAMPLE: &str = "\
SELECT statement_timestamp(), CASE WHEN is_called THEN last_value ELSE last_value - 1 END, clock_timestamp()
FROM outbox.position";

/// Reads events through one connection.
#[derive(Debug)]
pub struct Reader {
    positions: Positions,
    looked: Option<Instant>,
    sampled: Option<Instant>,
    /// Rows that the next read asks for: twice what the last one took, while there is more.
    rows: usize,
}

impl Reader {
    /// Continues from where `positions` stands.
    pub fn new(positions: Positions) -> Self {
        Self { positions, looked: None, sampled: None, rows: FIRST_ROWS }
    }

    /// Where the reading stands.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// So many stretches are missing, and may still come, that nothing above them is read for now.
    pub fn is_stalled(&self) -> bool {
        self.positions.gaps() > MAX_GAPS
    }

    /// The event at `position` is confirmed, set aside or dropped.
    pub fn settle(&mut self, position: i64) {
        self.positions.settle(position);
    }

    /// Reads once. An error leaves nothing that could be used again: give up the connection and this
    /// reader, and continue from what is stored.
    pub async fn read(&mut self, conn: &mut PgConnection, budget: Budget) -> Result<Batch, sqlx::Error> {
        let now = Instant::now();
        if self.sampled.is_none_or(|at| now - at >= LOOK_INTERVAL) {
            self.sampled = Some(now);
            let (before, last_value, after) = sqlx::query_as(SAMPLE).fetch_one(&mut *conn).await?;
            self.positions.sample(Sample { before, last_value, after });
        }
        if self.positions.wants_look() && self.looked.is_none_or(|at| now - at >= LOOK_INTERVAL) {
            self.looked = Some(now);
            self.positions.look(&holders(conn).await?);
        }

        let (from, to) = self.positions.missing(now);
        let high = self.positions.high();
        let most = budget.events.min(self.rows);
        let limit = i64::try_from(most).unwrap_or(i64::MAX);
        let above = if self.is_stalled() { 0 } else { limit };
        let mut rows = sqlx::query_as::<_, Row>(READ)
            .bind(&from)
            .bind(&to)
            .bind(high)
            .bind(limit)
            .bind(above)
            .fetch(&mut *conn);

        let mut found: Vec<Row> = Vec::new();
        let (mut missing, mut bytes, mut over_budget) = (0, 0, false);
        let mut covered = i64::MAX;
        let last = |found: &[Row]| found.last().map_or(high, Row::position);
        while let Some(row) = rows.try_next().await? {
            let position = row.position();
            if position > high && missing == most {
                // The leg of the gaps was cut off: what lies above must wait, or it could overtake.
                covered = last(&found);
                break;
            }
            missing += usize::from(position <= high);
            bytes += row.size();
            if bytes > budget.bytes && !found.is_empty() {
                over_budget = true;
                covered = last(&found);
                break;
            }
            found.push(row);
        }
        drop(rows);
        self.rows = match found.len() {
            taken if over_budget => taken * 2,
            taken if taken >= most => most * 2,
            // Caught up: what comes next may be of any size.
            _ => FIRST_ROWS,
        };
        if missing == most {
            covered = covered.min(last(&found));
        }

        let taken = self.positions.take(found.iter().map(Row::position), covered, now);
        let more = covered < i64::MAX || found.len() >= most;
        // What was found a second time is in memory already.
        if taken.fresh.len() < found.len() {
            found.retain(|row| taken.fresh.binary_search(&row.position()).is_ok());
        }
        let (events, unreadable) = row::split(found);
        Ok(Batch { events, unreadable, late: taken.late, died: taken.died, more })
    }
}

/// Looks at who holds the outbox lock now.
pub async fn holders(conn: &mut PgConnection) -> Result<Vec<Holder>, sqlx::Error> {
    type Row = (i32, i64, bool, Option<DateTime<Utc>>, Option<DateTime<Utc>>);
    let rows: Vec<Row> = sqlx::query_as(HOLDERS).fetch_all(conn).await?;
    rows.into_iter()
        .map(|(backend, local, prepared, asleep_since, began)| {
            let local = u32::try_from(local).map_err(|e| sqlx::Error::Decode(e.into()))?;
            Ok(Holder { vxid: Vxid(backend, local), prepared, asleep_since, began })
        })
        .collect()
}

/// Waits until everything that was visible to the last read can no longer be taken back by a crash of
/// the server. A commit with `synchronous_commit=off` is visible before its WAL is on disk; published
/// and then lost, its position would be handed out again for another event.
pub async fn ensure_flushed(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    // Written is read before flushed, so that it is flushed is certain. Else a tiny commit of our own flushes
    // everything before it, together with everybody else's.
    sqlx::query(
        "SELECT CASE WHEN pg_current_wal_insert_lsn() > pg_current_wal_flush_lsn()
                     THEN pg_logical_emit_message(true, 'outbox-relay', '') END",
    )
    .execute(conn)
    .await?;
    Ok(())
}
