//! Erasures of long histories. `outbox.erase` erases what fits into the transaction that ends an aggregate and notes
//! the rest in `outbox.erasure`; readers get the erased form of it at once. What is noted is rewritten here, step by
//! step, beside publishing and on a connection of its own.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use amqp::Backoff;
use daemon::{
    config::database::{Database, Failure},
    health::Part,
};
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::{
    failpoint,
    series::{Series, number},
    task_connection::TaskConnection,
};

/// How often a relay looks whether there is something to erase.
const ROUND: Duration = Duration::from_secs(10);
/// The server ends a step that takes longer; the next one takes fewer events.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);
/// No answer takes longer, or the connection counts as lost.
const ANSWER: Duration = Duration::from_secs(15);
/// Between two steps there is a pause as long as the step took, and at least this.
const REST: Duration = Duration::from_millis(5);
/// A step that took longer is followed by a smaller one.
const LONG: Duration = Duration::from_secs(1);
/// An erasure that is not complete after so long deserves a look.
const LATE: Duration = Duration::from_mins(15);

/// What is still to be erased.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, sqlx::FromRow)]
pub struct Pending {
    /// Aggregates.
    pub aggregates: i64,
    /// Seconds since the oldest of them ended.
    pub seconds: i64,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct Step {
    /// The kind of aggregate that had its turn.
    pub aggregate_type: String,
    /// Which one.
    pub aggregate_id: String,
    /// How many events were rewritten.
    pub erased: i64,
    /// Nothing of it is left.
    pub finished: bool,
}

/// How many events a step takes: fewer after one that took too long, more again after short ones.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    now: i64,
    most: i64,
}

impl Size {
    /// At most so many.
    pub fn new(most: i64) -> Self {
        Self { now: most, most }
    }

    fn took(&mut self, took: Duration) {
        self.now = if took > LONG { self.now / 2 } else { self.now * 2 }.clamp(1, self.most);
    }

    /// A step was ended by our own limit. False when it cannot be any smaller.
    fn smaller(&mut self) -> bool {
        let can = self.now > 1;
        self.now = (self.now / 4).max(1);
        can
    }
}

/// Works off erasures until `stop`. What goes wrong here stops no event: it is shown, and tried again.
pub(crate) async fn work_off(
    database: Database,
    most: i64,
    series: Arc<OnceLock<Series>>,
    health: Part,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut pause = Backoff::new(ROUND, ROUND * 6);
    let mut connection = TaskConnection::new(for_steps(database));
    while !stop.is_cancelled() {
        match round(&mut connection, Size::new(most), &series, &health, &stop).await {
            Ok(()) => pause.reset(),
            // The relay says so itself when the database is away.
            Err(error) => {
                if let Some(db) = error.as_database_error() {
                    health.attention(format!(
                        "What was stored of ended aggregates cannot be erased: database error {}. Readers already get \
                         the erased form. outbox-relay erasures shows what is left; it is tried again.",
                        db.code().unwrap_or_default()
                    ));
                } else {
                    tracing::debug!(%error, "erasures were not looked at");
                }
            }
        }
        pause.wait(&stop).await;
    }
    connection.close().await;
    Ok(())
}

/// One look, and as many steps as there are.
async fn round(
    connection: &mut TaskConnection,
    size: Size,
    series: &OnceLock<Series>,
    health: &Part,
    stop: &CancellationToken,
) -> sqlx::Result<()> {
    // A server that does not answer must not keep the process from ending.
    let Some(connected) = stop.run_until_cancelled(Box::pin(bounded(connection.take()))).await else {
        return Ok(());
    };
    let mut conn = connected?;
    // Then the server rolls back what it was at.
    let Some(done) = stop.run_until_cancelled(Box::pin(steps(&mut conn, size, series, health, stop))).await
    else {
        return Ok(());
    };
    connection.keep(conn, &done);
    done
}

async fn steps(
    conn: &mut PgConnection,
    mut size: Size,
    series: &OnceLock<Series>,
    health: &Part,
    stop: &CancellationToken,
) -> sqlx::Result<()> {
    no_samples(conn).await?;
    loop {
        let pending = bounded(pending(conn)).await?;
        show(pending, series, health);
        if pending.aggregates == 0 || stop.is_cancelled() {
            return Ok(());
        }
        let began = Instant::now();
        // None: other relays are at all that is left.
        let Some(taken) = bounded(step(conn, &mut size)).await? else { return Ok(()) };
        if let Some(series) = series.get() {
            series.erased_events.increment(taken.erased.unsigned_abs());
        }
        if taken.finished {
            let Step { aggregate_type, aggregate_id, .. } = &taken;
            tracing::info!(aggregate_type, aggregate_id, "nothing is left of an aggregate that was erased");
        }
        stop.run_until_cancelled(tokio::time::sleep(began.elapsed().max(REST))).await;
    }
}

fn show(pending: Pending, series: &OnceLock<Series>, health: &Part) {
    if let Some(series) = series.get() {
        series.pending_erasures.set(number(pending.aggregates));
    }
    if Duration::from_secs(pending.seconds.unsigned_abs()) < LATE {
        health.ready();
    } else {
        health.attention(format!(
            "{} ended aggregates are still being erased, the oldest since {} min. Readers already get the erased form. \
             outbox-relay erasures shows how far each is.",
            pending.aggregates,
            pending.seconds / 60
        ));
    }
}

/// How to connect for steps, whose limits are their own.
fn for_steps(database: Database) -> Database {
    let timeout = STEP_TIMEOUT.as_millis().to_string();
    database.named("outbox-relay erasures").quiet().with("statement_timeout", timeout)
}

/// Takes one step, or a smaller one when the first took too long. None when there is nothing to do.
pub(crate) async fn step(conn: &mut PgConnection, size: &mut Size) -> sqlx::Result<Option<Step>> {
    let mut attempts = outbox::database::Attempts::default();
    loop {
        let began = Instant::now();
        let mut tx = conn.begin().await?;
        let step = sqlx::query_as("SELECT * FROM outbox.erase_step($1)").bind(size.now);
        match step.fetch_optional(&mut *tx).await {
            Ok(step) => {
                failpoint::hit("erase");
                tx.commit().await?;
                size.took(began.elapsed());
                return Ok(step);
            }
            Err(error) if Failure::of(&error) == Failure::Cancelled => {
                tx.rollback().await?;
                if !size.smaller() {
                    return Err(error);
                }
                tracing::info!(
                    events = size.now,
                    "a step of an erasure took too long; the next one is smaller"
                );
            }
            // Another transaction was preferred.
            Err(error) if Failure::of(&error) == Failure::Conflict => {
                tx.rollback().await?;
                if !attempts.again().await {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

/// Counts what is left.
pub(crate) async fn pending(conn: &mut PgConnection) -> sqlx::Result<Pending> {
    sqlx::query_as(
        "SELECT pending_erasures AS aggregates,
                coalesce(extract(epoch FROM statement_timestamp() - oldest_erasure_at)::bigint, 0) AS seconds
         FROM outbox.overview",
    )
    .fetch_one(conn)
    .await
}

/// Sees to it that the server keeps no samples of new partitions. A lock that is taken is tried again next time.
async fn no_samples(conn: &mut PgConnection) -> sqlx::Result<()> {
    match bounded(sqlx::query("SELECT outbox.keep_no_samples()").execute(conn)).await {
        Err(error) if Failure::of(&error) != Failure::Locked => Err(error),
        _ => Ok(()),
    }
}

async fn bounded<T>(answer: impl Future<Output = sqlx::Result<T>>) -> sqlx::Result<T> {
    tokio::time::timeout(ANSWER, answer).await.unwrap_or_else(|_| {
        Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "the database did not answer").into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_shrink_when_they_take_too_long_and_grow_again() {
        let mut size = Size::new(1_000);
        let mut seen = Vec::new();
        for took in [2, 2, 0, 0, 0, 0] {
            size.took(Duration::from_secs(took));
            seen.push(size.now);
        }
        assert_eq!(seen, [500, 250, 500, 1_000, 1_000, 1_000]);
        let shrunk: Vec<(bool, i64)> = (0..7).map(|_| (size.smaller(), size.now)).collect();
        assert_eq!(
            shrunk,
            [(true, 250), (true, 62), (true, 15), (true, 3), (true, 1), (false, 1), (false, 1)]
        );
    }
}
