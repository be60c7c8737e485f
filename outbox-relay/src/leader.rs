//! Leadership: one relay at a time reads and publishes for a database and a relay name.
//!
//! It is a session advisory lock on the connection that also does the reading, so that losing one is
//! losing the other. `epoch` fences what an old leader may still write.

use std::time::Duration;

use service::config::database::{Schema, SchemaError};
use sqlx::{ConnectOptions, Connection, PgConnection, postgres::PgConnectOptions};

use crate::{
    position::Positions,
    reader::{self, Batch, Budget, Reader},
};

/// No answer of the database takes longer, or the connection counts as lost.
const TIMEOUT: Duration = Duration::from_secs(15);
/// A session that says nothing for so long is ended by the server, and its leadership with it. Otherwise
/// a leader that is stopped, or whose host is gone without a word, would keep the others out for ever.
const LEASE: &str = "10s";
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
    /// Another relay took over; what this one had in memory is void.
    #[error("another relay has taken over")]
    Deposed,
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
        matches!(self, Self::Schema(_) | Self::Source(_) | Self::SequenceBehind { .. })
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

/// The leader's connection, and what it read.
#[derive(Debug)]
pub struct Leader {
    conn: PgConnection,
    reader: Reader,
    relay_id: i32,
    epoch: i64,
    stored: (i64, i64, Vec<(i64, i64)>),
    /// Who publishes from this database, as `app_id` spells it.
    pub source: String,
}

/// Runs a statement, or gives up the connection.
async fn answer<T, E: Into<LeaderError>>(
    statement: impl Future<Output = Result<T, E>>,
) -> Result<T, LeaderError> {
    tokio::time::timeout(TIMEOUT, statement).await.map_err(|_| LeaderError::Silent)?.map_err(Into::into)
}

impl Leader {
    /// Tries to take leadership of the relay name. None when another relay has it.
    pub async fn take(
        options: &PgConnectOptions,
        name: &str,
        begin: Begin,
        identity: &str,
    ) -> Result<Option<Self>, LeaderError> {
        let options = options.clone().disable_statement_logging().options([("idle_session_timeout", LEASE)]);
        let mut conn = answer(options.connect()).await?;
        // Before anything else: a standby answers queries, but not with what is true.
        if answer(sqlx::query_scalar("SELECT pg_is_in_recovery()").fetch_one(&mut conn)).await? {
            return Err(LeaderError::InRecovery);
        }
        answer(schema().check(&mut conn)).await?;
        let source = answer(outbox::source(&mut conn)).await?.to_string();
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

        // 1869968492 is "outl" in ASCII. Released by the server when the session ends, however it ends.
        let lock = sqlx::query_scalar("SELECT pg_try_advisory_lock(1869968492, $1)").bind(relay_id);
        if !answer(lock.fetch_one(&mut conn)).await? {
            let _ = answer(conn.close()).await;
            return Ok(None);
        }

        let begin = sqlx::query_as(
            "UPDATE outbox.relay
             SET epoch = epoch + 1, leader = $2, leader_since = now(), heartbeat_at = now()
             WHERE id = $1
             RETURNING epoch, low_water, high,
                       ARRAY(SELECT lower(r) FROM unnest(open) r), ARRAY(SELECT upper(r) - 1 FROM unnest(open) r)",
        );
        let (epoch, low_water, high, from, to): (i64, i64, i64, Vec<i64>, Vec<i64>) =
            answer(begin.bind(relay_id).bind(identity).fetch_one(&mut conn)).await?;

        let (last_value, stored): (i64, i64) = answer(
            sqlx::query_as(
                "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END,
                        coalesce((SELECT max(position) FROM outbox.event), 0)
                 FROM outbox.position",
            )
            .fetch_one(&mut conn),
        )
        .await?;
        // `high` counts as well: it was read, so it had been handed out.
        let mark = low_water.max(high).max(stored);
        if last_value < mark {
            return Err(LeaderError::SequenceBehind { last_value, mark });
        }

        let open: Vec<(i64, i64)> = from.into_iter().zip(to).collect();
        tracing::info!(relay = name, source, epoch, low_water, high, open = open.len(), "leading");
        let reader = Reader::new(Positions::restore(high, open.iter().copied()));
        Ok(Some(Self { conn, reader, relay_id, epoch, stored: (low_water, high, open), source }))
    }

    /// Reads what is new. What it returns survives a crash of the server.
    pub async fn read(&mut self, budget: Budget) -> Result<Batch, LeaderError> {
        let batch = answer(self.reader.read(&mut self.conn, budget)).await?;
        if !batch.events.is_empty() {
            answer(reader::ensure_flushed(&mut self.conn)).await?;
        }
        Ok(batch)
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

    /// Stores the progress and a heartbeat. Fails when another relay has taken over since.
    pub async fn save(&mut self) -> Result<(), LeaderError> {
        let (high, open) = self.positions().open(MAX_OPEN);
        let low_water = self.positions().low_water().min(high);
        let (from, to): (Vec<i64>, Vec<i64>) = open.iter().copied().unzip();
        let update = sqlx::query(
            "UPDATE outbox.relay
             SET low_water = $3, high = $4, heartbeat_at = now(),
                 open = coalesce((SELECT range_agg(int8range(lo, hi, '[]'))
                                  FROM unnest($5::bigint[], $6::bigint[]) AS o (lo, hi)), '{}')
             WHERE id = $1 AND epoch = $2",
        )
        .bind(self.relay_id)
        .bind(self.epoch)
        .bind(low_water)
        .bind(high)
        .bind(from)
        .bind(to);
        if answer(update.execute(&mut self.conn)).await?.rows_affected() == 0 {
            return Err(LeaderError::Deposed);
        }
        self.stored = (low_water, high, open);
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
