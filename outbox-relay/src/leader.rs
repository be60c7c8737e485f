//! Leadership: one relay at a time reads and publishes for a database and a relay name.
//!
//! It is a session advisory lock on the connection that also does the reading, so that losing one is
//! losing the other. `epoch` fences what an old leader may still write.

use std::time::Duration;

use service::config::database::{Schema, SchemaError};
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};

use crate::{
    lease::{self, Lease},
    parked::{self, Due, Parking},
    position::Positions,
    reader::{self, Batch, Budget, Reader},
    sabotage,
};

/// No answer of the database takes longer, or the connection counts as lost.
const TIMEOUT: Duration = Duration::from_secs(15);
/// A leader that has stored no heartbeat for so long, and whose session is there all the same, is ended
/// by one that stands by: the server does not call a session idle that is in the middle of a statement.
const SILENCE: Duration = Duration::from_secs(15);
/// Open ranges that are stored; beyond it a restart repeats more.
const MAX_OPEN: usize = 1_000;

/// Why there is no leadership, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum LeaderError {
    /// The database is away or does not answer: forget everything, connect anew.
    #[error("the database is away: {0}")]
    Database(#[from] sqlx::Error),
    /// As [`Database`](Self::Database), but without a word from it.
    #[error("the database did not answer within {TIMEOUT:?}")]
    Silent,
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

/// Checks that the connection is a session of its own: that it stays the same from one statement to the
/// next, and has got the settings that it asked for.
async fn own_session(conn: &mut PgConnection, lease: &str) -> Result<(), LeaderError> {
    let mut first = None;
    for _ in 0..3 {
        let session = sqlx::query_as(
            "SELECT pg_backend_pid(),
                    (SELECT setting = $1 FROM pg_settings WHERE name = 'idle_session_timeout')",
        );
        let (pid, arrived): (i32, bool) = answer(session.bind(lease).fetch_one(&mut *conn)).await?;
        if !arrived {
            return Err(LeaderError::Pooler("the connection's settings did not arrive"));
        }
        if *first.get_or_insert(pid) != pid {
            return Err(LeaderError::Pooler("its statements come to different sessions"));
        }
    }
    Ok(())
}

impl Candidate {
    /// Connects, checks the schema, and registers the relay name where it is new. `lease`: how long the
    /// session may say nothing before the server ends it, and with it whatever leadership it has.
    pub async fn connect(
        options: &PgConnectOptions,
        name: &str,
        begin: Begin,
        identity: &str,
        lease: Duration,
    ) -> Result<Self, LeaderError> {
        let milliseconds = lease.as_millis().to_string();
        let options = options.clone().disable_statement_logging().options([
            // A leader that is stopped, or whose host is gone without a word, would otherwise keep the
            // others out for ever. While the server has something to say to it, it is the second one.
            ("idle_session_timeout", milliseconds.as_str()),
            ("tcp_user_timeout", milliseconds.as_str()),
        ]);
        let mut conn = answer(options.connect()).await?;
        // Before anything else: a standby answers queries, but not with what is true.
        if answer(sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut conn)).await? {
            return Err(LeaderError::InRecovery);
        }
        own_session(&mut conn, &milliseconds).await?;
        answer(schema().check(&mut conn)).await?;
        answer(outbox::source(&mut conn)).await?;
        // Our own small commits are what makes other people's asynchronous ones durable.
        answer(sqlx::query("SET synchronous_commit = on").execute(&mut conn)).await?;

        let register = sqlx::query(
            "INSERT INTO outbox.relay (name, low_water, high)
             SELECT $1, mark, mark
             FROM (SELECT CASE WHEN $2 AND is_called THEN last_value ELSE 0 END AS mark FROM outbox.position) m
             WHERE NOT EXISTS (SELECT FROM outbox.relay WHERE name = $1)
             ON CONFLICT (name) DO NOTHING",
        );
        answer(register.bind(name).bind(begin == Begin::End).execute(&mut conn)).await?;
        let relay_id: i32 = answer(
            sqlx::query_scalar("SELECT id FROM outbox.relay WHERE name = $1").bind(name).fetch_one(&mut conn),
        )
        .await?;
        Ok(Self { conn, relay_id, name: name.to_owned(), identity: identity.to_owned(), lease })
    }

    /// Asks for leadership; false when another relay has it. Ask again well within the lease.
    pub async fn ask(&mut self) -> Result<bool, LeaderError> {
        // 1869968492 is "outl" in ASCII. Released by the server when the session ends, however it ends.
        let ask = sqlx::query_as(
            "SELECT pg_try_advisory_lock(1869968492, $1),
                    coalesce(heartbeat_at < clock_timestamp() - $2 * interval '1 second', false)
             FROM outbox.relay WHERE id = $1",
        );
        let ask = ask.bind(self.relay_id).bind(SILENCE.as_secs_f64());
        let (leads, silent): (bool, bool) = answer(ask.fetch_one(&mut self.conn)).await?;
        if !leads && silent {
            let end = sqlx::query_scalar::<_, bool>(
                "SELECT pg_terminate_backend(pid) FROM pg_locks
                 WHERE locktype = 'advisory' AND classid = 1869968492 AND objid::bigint = $1 AND objsubid = 2
                   AND granted
                   AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
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
                       ARRAY(SELECT lower(r) FROM unnest(open) r), ARRAY(SELECT upper(r) - 1 FROM unnest(open) r)",
        );
        let (epoch, low_water, high, from, to): (i64, i64, i64, Vec<i64>, Vec<i64>) =
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
        let (high, open) = sabotage::kept().unwrap_or((high, open));
        tracing::info!(relay = self.name, source, epoch, low_water, high, open = open.len(), "leading");
        let mut leader = Leader {
            conn: self.conn,
            reader: Reader::new(Positions::restore(high, open.iter().copied())),
            relay_id: self.relay_id,
            name: self.name,
            epoch,
            stored: (low_water, high, open),
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

    /// Reads what is new. What it returns survives a crash of the server.
    pub async fn read(&mut self, budget: Budget) -> Result<Batch, LeaderError> {
        let sent = lease::now();
        let batch = answer(self.reader.read(&mut self.conn, budget)).await?;
        if !batch.events.is_empty() {
            sabotage::has_read(&batch.events);
            answer(reader::ensure_flushed(&mut self.conn)).await?;
            sabotage::has_read(&[]);
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

    /// Events that were set aside are published, or dropped by a rule.
    pub async fn unpark(&mut self, positions: &[i64]) -> Result<(), LeaderError> {
        answer(parked::unpark(&mut self.conn, &self.name, positions)).await
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
        answer(parked::due(&mut self.conn, &self.name, due)).await
    }

    /// The event at `position` is confirmed or dropped.
    pub fn settle(&mut self, position: i64) {
        self.reader.settle(position);
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
        .bind(waiting);
        let saved: Option<(Option<String>,)> = answer(update.fetch_optional(&mut self.conn)).await?;
        let Some((paused,)) = saved else { return Err(LeaderError::Deposed) };
        self.lease.renew(sent);
        self.stored = (low_water, high, open);
        self.paused = paused;
        Ok(())
    }

    /// Gives up leadership, so that another relay can take it at once.
    pub async fn resign(self) -> Result<(), LeaderError> {
        answer(self.conn.close()).await
    }
}

/// The schema that the relay needs.
pub fn schema() -> Schema {
    Schema {
        name: outbox::SCHEMA,
        migrator: outbox::migrator(),
        command: "outbox-relay migrate --source NAME",
    }
}
