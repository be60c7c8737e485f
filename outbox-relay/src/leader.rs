//! Leadership: one relay at a time reads and publishes for a database and a relay name.
//!
//! It is a session advisory lock on the connection that also does the reading, so that losing one is
//! losing the other. `epoch` fences what an old leader may still write.

use std::{ops::Range, time::Duration};

use daemon::config::database::{Database, Needs, Schema, SchemaError, shared};
use sqlx::{Connection, PgConnection};

use crate::{
    evidence::Failure,
    lease::{self, Lease},
    parked::{self, Due, Parking, Reason},
    position::Positions,
    queue::Spilled,
    reader::{self, Batch, Budget, Reader},
    row::Unreadable,
    unreadable,
    waiting::{self, Counts, Waiter, Wanted},
};

/// A relay's row as a leadership begins: its epoch, `low_water`, `high`, the ends of its open ranges, and those of what
/// was dropped by hand above `low_water`.
type Begun = (i64, i64, i64, Vec<i64>, Vec<i64>, Vec<i64>, Vec<i64>);

/// No answer of the database takes longer, or the connection counts as lost.
const TIMEOUT: Duration = Duration::from_secs(15);
/// A leader that has stored no heartbeat for so long, and whose session is there all the same, is ended
/// by one that stands by: the server does not call a session idle that is in the middle of a statement.
const SILENCE: Duration = Duration::from_secs(15);
/// Open ranges that are stored; beyond it a restart repeats more.
const MAX_OPEN: usize = 1_000;
/// Ranges of dropped events that are kept, to tell what became of each. The view `outbox.event_progress` knows it.
pub const MAX_DROPPED: i64 = 200;

/// Why there is no leadership, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    /// The database is away or refuses a statement: forget everything, connect anew.
    #[error("{}", outbox::database::reason(.0))]
    Database(#[from] sqlx::Error),
    /// As [`Database`](Self::Database), but without a word from it.
    #[error("the database did not answer within {TIMEOUT:?}")]
    Silent,
    /// The database refuses something that a relay needs, until an operator changes it.
    #[error("{0}")]
    Unmet(String),
    /// This server is a standby, whose commits may still be undone by a failover.
    #[error("the server is in recovery: it is a standby or still starting; connect to the primary")]
    InRecovery,
    /// Leadership would be a lock of somebody else's session, and what is asked of the session is lost.
    #[error(
        "there is a pooler between, which does not keep one session for one connection: {0}; connect the \
         relay to PostgreSQL itself, or let the pooler do so for it (session mode)"
    )]
    Pooler(&'static str),
    /// Another relay took over; what this one had in memory is void.
    #[error("another relay has taken over")]
    Deposed,
    /// A defect of ours: a lane came to an end.
    #[error("a lane ended by itself: {0}")]
    Lane(String),
    /// The sequence is behind what was published or stored, so that positions would be handed out twice.
    #[error(
        "the sequence outbox.position stands at {last_value}, behind {mark}, which is stored or published \
         already (logical replication and some restores do not carry sequences). Nothing is published, \
         since new events would be skipped. If no published event was lost, run: \
         SELECT setval('outbox.position', {mark}); otherwise begin a new incarnation"
    )]
    SequenceBehind {
        /// Where the sequence stands.
        last_value: i64,
        /// Where it must at least stand.
        mark: i64,
    },
    /// The schema is not what this program was built for.
    #[error(transparent)]
    Schema(SchemaError),
    /// The schema is there, but nobody said who publishes.
    #[error(transparent)]
    Source(outbox::SourceError),
}

impl LeaderError {
    /// Whether waiting and trying again can help. What it cannot help ends the process.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Self::Schema(_) | Self::Source(_) | Self::SequenceBehind { .. } | Self::Pooler(_))
    }
}

impl From<SchemaError> for LeaderError {
    fn from(error: SchemaError) -> Self {
        match error {
            SchemaError::Database(error) => Self::Database(error),
            SchemaError::Unmet(why) => Self::Unmet(why),
            other => Self::Schema(other),
        }
    }
}

impl From<outbox::SourceError> for LeaderError {
    fn from(error: outbox::SourceError) -> Self {
        match error {
            outbox::SourceError::Database(error) => Self::Database(error),
            other => Self::Source(other),
        }
    }
}

/// Where a relay name that does not exist yet begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Begin {
    /// With the first event that is still stored.
    #[default]
    Start,
    /// With the events that are appended from now on.
    End,
}

/// A relay that may lead: connected to a database that is as it should be.
#[derive(Debug)]
pub struct Candidate {
    conn: PgConnection,
    relay_id: i32,
    name: String,
    identity: String,
    lease: Duration,
    /// Who publishes from this database, without the incarnation.
    pub source: String,
}

/// The leader's connection, and what it read.
#[derive(Debug)]
pub struct Leader {
    conn: PgConnection,
    reader: Reader,
    relay_id: i32,
    name: String,
    epoch: i64,
    stored: (i64, i64, Vec<(i64, i64)>),
    /// Positions of events that a rule let go since the last save.
    dropped: Vec<i64>,
    /// What an operator had dropped when the leadership began, and may not be settled yet.
    dropped_by_hand: Vec<Range<i64>>,
    lease: Lease,
    /// Who publishes from this database, as `app_id` spells it.
    pub source: String,
    /// An operator paused this relay name, as of the last save: since when, and who.
    pub paused: Option<String>,
}

/// Runs a statement, or gives up the connection.
async fn answer<T, E: Into<LeaderError>>(
    statement: impl Future<Output = Result<T, E>>,
) -> Result<T, LeaderError> {
    tokio::time::timeout(TIMEOUT, statement).await.map_err(|_| LeaderError::Silent)?.map_err(Into::into)
}

/// Checks that the connection is a session of its own, with the help of a second one.
async fn own_session(conn: &mut PgConnection, database: &Database) -> Result<(), LeaderError> {
    let mut second = answer(database.connect()).await?;
    let shared = answer(shared(conn, &mut second)).await?;
    answer(second.close()).await?;
    if shared { Err(LeaderError::Pooler("its statements come to different sessions")) } else { Ok(()) }
}

impl Candidate {
    /// Connects, checks the schema, and registers the relay name where it is new. `lease`: how long the
    /// session may say nothing before the server ends it, and with it whatever leadership it has.
    pub async fn connect(
        database: &Database,
        name: &str,
        begin: Begin,
        identity: &str,
        lease: Duration,
    ) -> Result<Self, LeaderError> {
        let milliseconds = lease.as_millis().to_string();
        let database = database.clone().quiet();
        // A leader that is stopped, or whose host is gone without a word, would otherwise keep the
        // others out for ever. While the server has something to say to it, it is the second one.
        let leading = database.clone().with("idle_session_timeout", milliseconds.as_str());
        let mut conn = answer(leading.with("tcp_user_timeout", milliseconds.as_str()).connect()).await?;
        own_session(&mut conn, &database).await?;
        // Before anything else: a standby answers queries, but not with what is true.
        if answer(sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut conn)).await? {
            return Err(LeaderError::InRecovery);
        }
        answer(outbox::require_utf8(&mut conn)).await?;
        answer(needs().check(&mut conn)).await?;
        let source = answer(outbox::source(&mut conn)).await?.name;
        // Our own small commits are what makes other people's asynchronous ones durable.
        answer(sqlx::query("SET synchronous_commit = on").execute(&mut conn)).await?;

        let register = sqlx::query(
            "INSERT INTO outbox.relay (name, low_water, high, told_from)
             SELECT $1, mark, mark, mark
             FROM (SELECT CASE WHEN $2 AND is_called THEN last_value ELSE 0 END AS mark FROM outbox.position) m
             WHERE NOT EXISTS (SELECT FROM outbox.relay WHERE name = $1)
             ON CONFLICT (name) DO NOTHING",
        );
        answer(register.bind(name).bind(begin == Begin::End).execute(&mut conn)).await?;
        let relay_id: i32 = answer(
            sqlx::query_scalar("SELECT id FROM outbox.relay WHERE name = $1").bind(name).fetch_one(&mut conn),
        )
        .await?;
        Ok(Self { conn, relay_id, name: name.to_owned(), identity: identity.to_owned(), lease, source })
    }

    /// Asks for leadership; false when another relay has it. Ask again well within the lease.
    pub async fn ask(&mut self) -> Result<bool, LeaderError> {
        // A session lock. The server releases it when the session ends, however it ends.
        let ask = sqlx::query_as(
            "SELECT outbox.try_lead($1),
                    coalesce(heartbeat_at < clock_timestamp() - $2 * interval '1 second', false)
             FROM outbox.relay WHERE id = $1",
        );
        let ask = ask.bind(self.relay_id).bind(SILENCE.as_secs_f64());
        let (leads, silent): (bool, bool) = answer(ask.fetch_one(&mut self.conn)).await?;
        if !leads && silent {
            let end = sqlx::query_scalar::<_, bool>(
                "SELECT pg_terminate_backend(pid) FROM outbox.leader_session WHERE relay_id = $1",
            );
            match answer(end.bind(i64::from(self.relay_id)).fetch_optional(&mut self.conn)).await {
                Ok(ended) => tracing::warn!(?ended, "the leader says nothing; its session is ended"),
                // Another role's session, for example.
                Err(LeaderError::Database(sqlx::Error::Database(error))) => {
                    tracing::warn!(error = error.message(), "the leader says nothing, and cannot be ended");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(leads)
    }

    /// Begins the leadership that [`ask`](Self::ask) got.
    pub async fn lead(mut self) -> Result<Leader, LeaderError> {
        let begin = sqlx::query_as(
            "UPDATE outbox.relay
             SET epoch = epoch + 1, leader = $2, leader_since = now(), heartbeat_at = now(), waiting = '[]'
             WHERE id = $1
             RETURNING epoch, low_water, high,
                       ARRAY(SELECT lower(r) FROM unnest(open) r), ARRAY(SELECT upper(r) - 1 FROM unnest(open) r),
                       ARRAY(SELECT lower(r) FROM unnest(dropped_by_hand) r WHERE upper(r) > low_water + 1),
                       ARRAY(SELECT upper(r) FROM unnest(dropped_by_hand) r WHERE upper(r) > low_water + 1)",
        );
        let (epoch, low_water, high, from, to, dropped_from, dropped_to): Begun =
            answer(begin.bind(self.relay_id).bind(&self.identity).fetch_one(&mut self.conn)).await?;
        // After the epoch was raised: whoever begins a new incarnation raises the epoch as well, so that a
        // source that was read before would be fenced off.
        let source = answer(outbox::source(&mut self.conn)).await?.to_string();

        let (last_value, stored): (i64, i64) = answer(
            sqlx::query_as(
                "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END,
                        coalesce((SELECT max(position) FROM outbox.event), 0)
                 FROM outbox.position",
            )
            .fetch_one(&mut self.conn),
        )
        .await?;
        // `high` counts as well: it was read, so it had been handed out.
        let mark = low_water.max(high).max(stored);
        if last_value < mark {
            return Err(LeaderError::SequenceBehind { last_value, mark });
        }

        let open: Vec<(i64, i64)> = from.into_iter().zip(to).collect();
        tracing::info!(relay = self.name, source, epoch, low_water, high, open = open.len(), "leading");
        let mut leader = Leader {
            conn: self.conn,
            reader: Reader::new(Positions::restore(high, open.iter().copied())),
            relay_id: self.relay_id,
            name: self.name,
            epoch,
            stored: (low_water, high, open),
            dropped: Vec::new(),
            dropped_by_hand: dropped_from.into_iter().zip(dropped_to).map(|(from, to)| from..to).collect(),
            lease: Lease::new(self.lease),
            source,
            paused: None,
        };
        leader.save("[]").await?;
        Ok(leader)
    }

    /// Goes away in good order.
    pub async fn close(self) {
        let _ = answer(self.conn.close()).await;
    }
}

impl Leader {
    /// How long it may publish without a word from the database.
    pub fn lease(&self) -> Lease {
        self.lease.clone()
    }

    /// Reads what is new. What it returns survives a crash of the server. Rows that cannot be read as events
    /// are set aside already, and settled. So is what an operator has dropped, when an earlier leader set it aside and
    /// was killed before it stored that.
    pub async fn read(&mut self, budget: Budget) -> Result<Batch, LeaderError> {
        let sent = lease::now();
        let mut batch = answer(self.reader.read(&mut self.conn, budget)).await?;
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
        if !batch.unreadable.is_empty() {
            let aside = unreadable::set_aside(&mut self.conn, &self.name, self.epoch, &batch.unreadable);
            if !answer(aside).await? {
                return Err(LeaderError::Deposed);
            }
            for row in &batch.unreadable {
                self.reader.settle(row.position);
            }
        }
        if !batch.events.is_empty() {
            answer(reader::ensure_flushed(&mut self.conn)).await?;
        }
        self.lease.renew(sent);
        Ok(batch)
    }

    /// Sets events aside, in the database; the caller settles them then. Those that were aside already
    /// have had one more attempt.
    pub async fn park(&mut self, parkings: &[Parking]) -> Result<(), LeaderError> {
        let sent = lease::now();
        let stored = answer(parked::park(&mut self.conn, &self.name, self.epoch, parkings)).await?;
        if !stored {
            return Err(LeaderError::Deposed);
        }
        self.lease.renew(sent);
        Ok(())
    }

    /// Has events wait, in the database; the caller settles them then. Returns what there is of each kind more.
    pub async fn wait(&mut self, spilled: &[Spilled]) -> Result<Counts, LeaderError> {
        let sent = lease::now();
        let stored = answer(waiting::wait(&mut self.conn, &self.name, self.epoch, spilled)).await?;
        self.lease.renew(sent);
        stored.ok_or(LeaderError::Deposed)
    }

    /// Of events that were read, has those wait whose aggregate does; the caller settles them then. Returns their
    /// positions, and what there is of each kind more.
    pub async fn divert(&mut self, positions: &[i64]) -> Result<(Vec<i64>, Counts), LeaderError> {
        let stored = answer(waiting::divert(&mut self.conn, &self.name, self.epoch, positions)).await?;
        stored.ok_or(LeaderError::Deposed)
    }

    /// Events with rows are published, or dropped by a rule. Returns what there is of each kind less that waited.
    pub async fn gone(&mut self, positions: &[i64]) -> Result<Counts, LeaderError> {
        answer(waiting::gone(&mut self.conn, &self.name, positions)).await
    }

    /// These were set aside, and what waited behind them is tried.
    pub async fn next(&mut self, positions: &[i64]) -> Result<(), LeaderError> {
        answer(waiting::next(&mut self.conn, &self.name, positions)).await
    }

    /// These were not taken once more, and wait.
    pub async fn wait_longer(&mut self, failed: &[(i64, Failure, String, f64)]) -> Result<(), LeaderError> {
        answer(waiting::postpone(&mut self.conn, &self.name, failed)).await
    }

    /// What of those that wait is to be tried now.
    pub async fn waiters(&mut self, wanted: &Wanted<'_>) -> Result<Vec<Waiter>, LeaderError> {
        let (waiters, unreadable) = answer(waiting::due(&mut self.conn, &self.name, wanted)).await?;
        // They could be read once, or they would not wait: somebody has changed the rows since.
        if !unreadable.is_empty() {
            let detail = |row: &Unreadable| format!("it cannot be read: {}", row.reason);
            let parkings = unreadable.iter().map(|row| Parking {
                position: row.position,
                reason: Reason::Refused,
                detail: detail(row),
            });
            self.park(&parkings.collect::<Vec<_>>()).await?;
            let positions: Vec<i64> = unreadable.iter().map(|row| row.position).collect();
            self.next(&positions).await?;
        }
        Ok(waiters)
    }

    /// How many of each kind wait.
    pub async fn count_waiting(&mut self) -> Result<Counts, LeaderError> {
        answer(waiting::count(&mut self.conn, &self.name)).await
    }

    /// No queue takes these yet: they wait for their next turn.
    pub async fn postpone(&mut self, positions: &[i64]) -> Result<(), LeaderError> {
        answer(parked::postpone(&mut self.conn, &self.name, positions)).await
    }

    /// An event that was set aside is refused once more, for itself.
    pub async fn refuse(&mut self, position: i64, why: &str) -> Result<(), LeaderError> {
        answer(parked::refuse(&mut self.conn, &self.name, position, why)).await
    }

    /// What is aside, and what of it is to be tried now, but for what is in memory already.
    pub async fn due(&mut self, due: Due<'_>) -> Result<parked::Aside, LeaderError> {
        let aside = answer(parked::due(&mut self.conn, &self.name, due)).await?;
        for row in &aside.unreadable {
            self.refuse(row.position, &format!("it cannot be read: {}", row.reason)).await?;
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
    pub async fn save(&mut self, waiting: &str) -> Result<(), LeaderError> {
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
        let saved: Option<(Option<String>,)> = answer(update.fetch_optional(&mut self.conn)).await?;
        let Some((paused,)) = saved else { return Err(LeaderError::Deposed) };
        self.lease.renew(sent);
        self.stored = (low_water, high, open);
        self.dropped.clear();
        self.paused = paused;
        Ok(())
    }

    /// Gives up leadership, so that another relay can take it at once.
    pub async fn resign(self) -> Result<(), LeaderError> {
        answer(self.conn.close()).await
    }
}

/// What a relay needs of its database.
fn needs() -> Needs {
    const RIGHTS: &[(&str, &str)] = &[
        ("outbox.source", "SELECT"),
        ("outbox.event", "SELECT"),
        ("outbox.relay", "SELECT"),
        ("outbox.relay", "INSERT"),
        ("outbox.relay", "UPDATE"),
        ("outbox.parked", "SELECT"),
        ("outbox.parked", "INSERT"),
        ("outbox.parked", "UPDATE"),
        ("outbox.parked", "DELETE"),
        ("outbox.lock_holder", "SELECT"),
        ("outbox.leader_session", "SELECT"),
    ];
    Needs { schemas: vec![schema()], writes: true, rights: RIGHTS }
}

/// The schema that the relay needs.
pub fn schema() -> Schema {
    Schema {
        name: outbox::SCHEMA,
        migrator: outbox::migrator(),
        command: "outbox-relay migrate --source NAME",
    }
}
