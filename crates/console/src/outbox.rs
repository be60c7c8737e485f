//! One outbox as the console sees it.

use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use daemon::config::database::Database;
use outbox_relay::command::{
    state,
    status::{self, Progress, Status},
};
use sqlx::{PgConnection, PgPool};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    looks::Looks,
    sample::{Sample, Samples},
    watch::{Target, Watch},
};

/// For what a page asks beyond the looks, which have one of their own.
const CONNECTIONS: u32 = 1;
/// Rates are measured over about this time.
const RATE: Duration = Duration::from_secs(10);
/// A transaction that is open for so long is shown.
const LONG: f64 = 60.0;

/// An outbox.
#[derive(Debug)]
pub struct Outbox {
    /// What the file calls it.
    pub name: String,
    /// The only relay name to look at, if any.
    pub relay: Option<String>,
    /// Its database's address and user, without the password.
    pub address: String,
    /// Its database.
    pub database: Database,
    /// One examination at a time.
    pub examining: Semaphore,
    /// Connections for what a page asks.
    pub pool: PgPool,
    looks: Looks,
    /// What was seen last.
    pub watch: Watch<Look>,
    /// The last hour.
    pub samples: Samples,
    /// Earlier looks, for the rates: the first is about ten seconds old.
    before: Mutex<VecDeque<(Instant, Vec<Progress>)>>,
}

/// What one look sees.
#[derive(Debug)]
pub struct Look {
    /// Where the relays are, as `outbox-relay status` tells.
    pub status: Status,
    /// The outbox as a whole.
    pub overview: Overview,
    /// Transactions that are open for more than a minute, the oldest first.
    pub long_transactions: Vec<LongTransaction>,
    /// Tables of the outbox with many dead rows.
    pub unvacuumed: Vec<Unvacuumed>,
}

/// The row of `outbox.overview`.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Overview {
    /// Who publishes from it.
    pub source: Option<String>,
    /// The source's incarnation.
    pub incarnation: Option<i64>,
    /// The last position handed out.
    pub last_position: i64,
    /// The highest position in use.
    pub used_position: i64,
    /// The first position after the next one that has no partition of its own.
    pub partitions_end: Option<i64>,
    /// Ended aggregates that are still being erased.
    pub pending_erasures: i64,
}

/// A transaction that is open for long.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct LongTransaction {
    /// Its session.
    pub pid: i32,
    /// What the session calls itself.
    pub application_name: Option<String>,
    /// What it does; none without `pg_read_all_stats`.
    pub state: Option<String>,
    /// For how many seconds.
    pub seconds: f64,
}

/// A table with many dead rows.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Unvacuumed {
    /// The table.
    pub name: String,
    /// How many dead rows.
    pub dead: i64,
    /// How many that live.
    pub live: i64,
    /// When it was vacuumed last.
    pub vacuumed_at: Option<DateTime<Utc>>,
}

const OVERVIEW: &str = "\
SELECT source, incarnation, last_position, used_position, partitions_end, pending_erasures FROM outbox.overview";

const LONG_TRANSACTIONS: &str = "\
SELECT pid, application_name, state, extract(epoch FROM statement_timestamp() - xact_start)::float8 AS seconds
FROM pg_stat_activity
WHERE datname = current_database() AND backend_type = 'client backend'
  AND xact_start < statement_timestamp() - make_interval(secs => $1)
ORDER BY xact_start LIMIT 10";

/// Not of `outbox.touched`, which a migration fills and empties, so that its plans are of a large table.
const UNVACUUMED: &str = "\
SELECT relname::text AS name, n_dead_tup AS dead, n_live_tup AS live, greatest(last_vacuum, last_autovacuum) AS vacuumed_at
FROM pg_stat_user_tables
WHERE schemaname = 'outbox' AND relname <> 'touched' AND n_dead_tup > 10000 AND n_dead_tup > n_live_tup
ORDER BY n_dead_tup DESC LIMIT 5";

impl Outbox {
    /// Connects when it is first looked at.
    pub fn new(name: &str, relay: Option<String>, database: &Database) -> Self {
        Self {
            name: name.to_owned(),
            relay,
            address: database.address(),
            database: database.clone().quiet(),
            examining: Semaphore::new(1),
            pool: database.clone().by_index().pool(CONNECTIONS),
            looks: Looks::new(database.clone().by_index()),
            watch: Watch::default(),
            samples: Samples::default(),
            before: Mutex::default(),
        }
    }

    /// Looks at it again and again, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        self.watch.run(stop, self).await;
    }

    async fn look_once(&self) -> sqlx::Result<Look> {
        let mut conn = self.looks.take().await?;
        let state = state::look(&mut conn, self.relay.as_deref()).await?;
        let progress = status::progress(&state);
        let (overview, long_transactions, unvacuumed) = rest(&mut conn).await?;
        self.looks.keep(conn);
        let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
        let status = Status::new(state, before.front().map_or(&[], |(_, progress)| progress));
        before.push_back((Instant::now(), progress));
        while before.len() > 1 && before[1].0.elapsed() >= RATE {
            before.pop_front();
        }
        Ok(Look { status, overview, long_transactions, unvacuumed })
    }
}

impl Target for Outbox {
    type Look = Look;

    async fn look(&self) -> Result<Look, String> {
        let look = self.look_once().await.map_err(|error| reason(&error))?;
        self.samples.add(Sample::of(&look));
        Ok(look)
    }
}

async fn rest(conn: &mut PgConnection) -> sqlx::Result<(Overview, Vec<LongTransaction>, Vec<Unvacuumed>)> {
    let overview = sqlx::query_as(OVERVIEW).fetch_one(&mut *conn).await?;
    let long = sqlx::query_as(LONG_TRANSACTIONS).bind(LONG).fetch_all(&mut *conn).await?;
    let unvacuumed = sqlx::query_as(UNVACUUMED).fetch_all(conn).await?;
    Ok((overview, long, unvacuumed))
}

/// Why a database could not be asked, for people.
pub fn reason(error: &sqlx::Error) -> String {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    match code.as_deref() {
        // undefined_table, undefined_column, undefined_function, invalid_schema_name
        Some("42P01" | "42703" | "42883" | "3F000") => {
            "its schema is missing, or older than this console".to_owned()
        }
        _ => outbox::database::reason(error),
    }
}
