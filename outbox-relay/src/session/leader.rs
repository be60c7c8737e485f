//! The session of the leader: what it reads, sets aside, and stores of its progress.

use std::{ops::Range, time::Duration};

use sqlx::{Connection, PgConnection};

use super::{SessionError, Watch, within_timeout};
use crate::{
    evidence::PublishFailure,
    lease::{self, Lease},
    message::Origin,
    parked::{self, ParkedQuery, Parking, SetAside},
    position::Positions,
    reader::{self, Batch, Budget, Reader},
    row::Unreadable,
    unreadable,
    waiting::{self, Spilled, StoredRetry, WaitingCounts, WaitingQuery},
};

/// Open ranges that are stored; beyond it a restart repeats more.
const MAX_OPEN: usize = 1_000;
/// Ranges of dropped events that are kept, to tell what became of each. The view `outbox.event_progress` knows it.
pub const MAX_DROPPED: i64 = 200;

/// The leader's session, and what it read through it.
#[derive(Debug)]
pub struct LeaderSession {
    pub(super) conn: PgConnection,
    pub(super) reader: Reader,
    pub(super) relay_id: i32,
    pub(super) name: String,
    pub(super) epoch: i64,
    pub(super) stored: (i64, i64, Vec<(i64, i64)>),
    /// Positions of events that a rule let go since the last save.
    pub(super) dropped: Vec<i64>,
    /// What an operator had dropped when the leadership began, and may not be settled yet.
    pub(super) dropped_by_hand: Vec<Range<i64>>,
    /// Rows that cannot be read and are not set aside yet, because an erasure is under way.
    pub(super) unreadable: Vec<Unreadable>,
    pub(super) lease: Lease,
    /// Who publishes from this database.
    pub origin: Origin,
    /// An operator paused this relay name, as of the last save: since when, and who.
    pub paused: Option<String>,
}

/// What no statement of the leader notices by itself.
#[derive(Debug, sqlx::FromRow)]
pub struct Look {
    /// The database is somewhere else than where it was last known to have lost nothing.
    pub is_elsewhere: bool,
    /// The highest position that is stored or was read.
    pub used_position: i64,
    /// Where the sequence stands.
    pub last_position: i64,
}

impl LeaderSession {
    /// How long it may publish without a word from the database.
    pub fn lease(&self) -> Lease {
        self.lease.clone()
    }

    /// Reads what is new. What it returns survives a crash of the server. Rows that cannot be read as events
    /// are kept for [`set_unreadable_aside`](Self::set_unreadable_aside). Settled already is what an
    /// operator has dropped, when an earlier leader set it aside and was killed before it stored that.
    pub async fn read(&mut self, budget: Budget) -> Result<Batch, SessionError> {
        let sent = lease::now();
        let mut batch = within_timeout(self.reader.read(&mut self.conn, budget)).await?;
        let Self { dropped_by_hand, reader, .. } = self;
        let mut goes_on = |position: i64| {
            let dropped = dropped_by_hand.iter().any(|range| range.contains(&position));
            if dropped {
                reader.settle(position);
            }
            !dropped
        };
        batch.events.retain(|event| goes_on(event.position));
        batch.unreadable.retain(|row| goes_on(row.position));
        self.unreadable.append(&mut batch.unreadable);
        if !batch.events.is_empty() {
            within_timeout(reader::ensure_flushed(&mut self.conn)).await?;
        }
        self.lease.renew(sent);
        Ok(batch)
    }

    /// How many rows were read that cannot be read as events, and are not set aside yet.
    pub fn unreadable(&self) -> usize {
        self.unreadable.len()
    }

    /// Sets those aside, in the database, and settles them. Returns them; none when an erasure is under way for longer
    /// than `wait`.
    pub async fn set_unreadable_aside(
        &mut self,
        wait: Duration,
    ) -> Result<Option<Vec<Unreadable>>, SessionError> {
        let sent = lease::now();
        let aside = unreadable::set_aside(&mut self.conn, &self.name, self.epoch, &self.unreadable, wait);
        let aside = within_timeout(aside).await?;
        if !self.is_aside(aside, sent)? {
            return Ok(None);
        }
        for row in &self.unreadable {
            self.reader.settle(row.position);
        }
        Ok(Some(std::mem::take(&mut self.unreadable)))
    }

    /// Sets events aside, in the database; the caller settles them then. Those that were aside already
    /// have had one more attempt. False when an erasure is under way for longer than `wait`.
    pub async fn park(&mut self, parkings: &[Parking], wait: Duration) -> Result<bool, SessionError> {
        let sent = lease::now();
        let aside = parked::park(&mut self.conn, &self.name, self.epoch, parkings, wait);
        let aside = within_timeout(aside).await?;
        self.is_aside(aside, sent)
    }

    fn is_aside(&self, aside: SetAside, sent: u64) -> Result<bool, SessionError> {
        if aside == SetAside::Deposed {
            return Err(SessionError::Deposed);
        }
        self.lease.renew(sent);
        Ok(aside == SetAside::Done)
    }

    /// Has events wait, in the database; the caller settles them then. Returns what there is of each kind more.
    pub async fn spill(&mut self, spilled: &[Spilled]) -> Result<WaitingCounts, SessionError> {
        let sent = lease::now();
        let stored = within_timeout(waiting::spill(&mut self.conn, &self.name, self.epoch, spilled)).await?;
        self.lease.renew(sent);
        stored.ok_or(SessionError::Deposed)
    }

    /// Of events that were read, has those wait whose aggregate does; the caller settles them then. Returns their
    /// positions, and what there is of each kind more.
    pub async fn divert(&mut self, positions: &[i64]) -> Result<(Vec<i64>, WaitingCounts), SessionError> {
        let stored =
            within_timeout(waiting::divert(&mut self.conn, &self.name, self.epoch, positions)).await?;
        stored.ok_or(SessionError::Deposed)
    }

    /// Events with rows are published, or dropped by a rule. Returns what there is of each kind less that waited.
    pub async fn remove_rows(&mut self, positions: &[i64]) -> Result<WaitingCounts, SessionError> {
        within_timeout(waiting::remove_rows(&mut self.conn, &self.name, positions)).await
    }

    /// These were set aside, and what waited behind them is tried.
    pub async fn release_next(&mut self, positions: &[i64]) -> Result<(), SessionError> {
        within_timeout(waiting::release_next(&mut self.conn, &self.name, positions)).await
    }

    /// These were not taken once more, and wait.
    pub async fn postpone_waiting(
        &mut self,
        failed: &[(i64, PublishFailure, String, f64)],
    ) -> Result<(), SessionError> {
        within_timeout(waiting::postpone(&mut self.conn, &self.name, failed)).await
    }

    /// What of those that wait is to be tried now.
    pub async fn waiting_due(&mut self, wanted: &WaitingQuery<'_>) -> Result<Vec<StoredRetry>, SessionError> {
        let (waiters, unreadable) = within_timeout(waiting::due(&mut self.conn, &self.name, wanted)).await?;
        // They could be read once, or they would not wait: somebody has changed the rows since.
        if !unreadable.is_empty() {
            let detail = |row: &Unreadable| format!("it cannot be read: {}", row.reason);
            let parkings = unreadable.iter().map(|row| Parking {
                position: row.position,
                reason: PublishFailure::Refused,
                detail: detail(row),
            });
            // Otherwise they are found again.
            if self.park(&parkings.collect::<Vec<_>>(), Duration::ZERO).await? {
                let positions: Vec<i64> = unreadable.iter().map(|row| row.position).collect();
                self.release_next(&positions).await?;
            }
        }
        Ok(waiters)
    }

    /// How many of each kind wait.
    pub async fn count_waiting(&mut self) -> Result<WaitingCounts, SessionError> {
        within_timeout(waiting::count(&mut self.conn, &self.name)).await
    }

    /// No queue takes these yet: they wait for their next turn.
    pub async fn postpone_parked(&mut self, positions: &[i64]) -> Result<(), SessionError> {
        within_timeout(parked::postpone(&mut self.conn, &self.name, positions)).await
    }

    /// An event that was set aside is refused once more, for itself.
    pub async fn refuse_parked(&mut self, position: i64, why: &str) -> Result<(), SessionError> {
        within_timeout(parked::refuse(&mut self.conn, &self.name, position, why)).await
    }

    /// What is aside, and what of it is to be tried now, but for what is in memory already.
    pub async fn parked_due(&mut self, due: ParkedQuery<'_>) -> Result<parked::ParkedEvents, SessionError> {
        let aside = within_timeout(parked::due(&mut self.conn, &self.name, due)).await?;
        for row in &aside.unreadable {
            self.refuse_parked(row.position, &format!("it cannot be read: {}", row.reason)).await?;
        }
        Ok(aside)
    }

    /// The event at `position` is confirmed or dropped.
    pub fn settle(&mut self, position: i64) {
        self.reader.settle(position);
    }

    /// A rule lets the event at `position` go: the next save notes it, so that it can be told of it later.
    pub fn drop(&mut self, position: i64) {
        self.dropped.push(position);
    }

    /// So many positions are missing that nothing new is read until the transactions that may still
    /// fill them have ended.
    pub fn is_stalled(&self) -> bool {
        self.reader.is_stalled()
    }

    /// Where the reading stands.
    pub fn positions(&self) -> &Positions {
        self.reader.positions()
    }

    /// Whether there is progress that is not stored.
    pub fn has_progress(&self) -> bool {
        let (high, open) = self.positions().open(MAX_OPEN);
        self.stored != (self.positions().low_water().min(high), high, open)
    }

    /// Stores the progress, a heartbeat and what the relay waits for (a JSON array), and learns whether it
    /// is paused. Fails when another relay has taken over since.
    pub async fn save(&mut self, waiting: &str) -> Result<(), SessionError> {
        let (high, open) = self.positions().open(MAX_OPEN);
        let low_water = self.positions().low_water().min(high);
        let (from, to): (Vec<i64>, Vec<i64>) = open.iter().copied().unzip();
        let sent = lease::now();
        let update = sqlx::query_as(
            "UPDATE outbox.relay
             SET low_water = $3, high = $4, heartbeat_at = now(), waiting = $7::jsonb,
                 dropped_by_rule = CASE WHEN $8::bigint[] = '{}' THEN dropped_by_rule ELSE (
                     SELECT range_agg(range) FROM (
                         SELECT range
                         FROM unnest(dropped_by_rule + (SELECT range_agg(int8range(d.position, d.position, '[]'))
                                                        FROM unnest($8::bigint[]) AS d (position))) AS o (range)
                         ORDER BY range DESC LIMIT $9) newest) END,
                 open = coalesce((SELECT range_agg(int8range(lo, hi, '[]'))
                                  FROM unnest($5::bigint[], $6::bigint[]) AS o (lo, hi)), '{}')
             WHERE id = $1 AND epoch = $2
             RETURNING 'paused' || coalesce(' by ' || paused_by, '') || ' since '
                       || to_char(paused_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS \"UTC\"')",
        )
        .bind(self.relay_id)
        .bind(self.epoch)
        .bind(low_water)
        .bind(high)
        .bind(from)
        .bind(to)
        .bind(waiting)
        .bind(&self.dropped)
        .bind(MAX_DROPPED);
        let saved: Option<(Option<String>,)> = within_timeout(update.fetch_optional(&mut self.conn)).await?;
        let Some((paused,)) = saved else { return Err(SessionError::Deposed) };
        self.lease.renew(sent);
        self.stored = (low_water, high, open);
        self.dropped.clear();
        self.paused = paused;
        Ok(())
    }

    /// Where the database is, and where its sequence stands.
    pub async fn look(&mut self) -> Result<Look, SessionError> {
        // In one statement: what was used is of its snapshot, and the sequence is read after that, and only goes on.
        let sql = sqlx::query_as(
            "SELECT coalesce(is_elsewhere, false) AS is_elsewhere, used_position, last_position FROM outbox.overview",
        );
        within_timeout(sql.fetch_one(&mut self.conn)).await
    }

    /// Shows how the database is, if it is time to.
    pub async fn watch(&mut self, watch: &mut Watch) -> Result<(), SessionError> {
        watch.look_if_due(&mut self.conn).await
    }

    /// Gives up leadership, so that another relay can take it at once.
    pub async fn resign(self) -> Result<(), SessionError> {
        within_timeout(self.conn.close()).await
    }
}
