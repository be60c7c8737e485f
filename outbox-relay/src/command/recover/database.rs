//! What `recover` asks the outbox, and what it changes there.

use std::time::Duration;

use anyhow::{Context, anyhow};
use chrono::{DateTime, Utc};
use daemon::progress::Progress;
use outbox::{
    Source,
    database::{Failure, again},
};
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep};

use crate::command::{left_behind::EarlierChain, many, not_done};

/// So many aggregates are ended at a time: the writers wait meanwhile.
const BATCH: usize = 200;
/// For how long the writers may be waited for, and wait, before it is tried again.
const LOCK_TIMEOUT: &str = "SET LOCAL lock_timeout = '500ms'";
/// How often that is tried: transactions that append may be long.
const ATTEMPTS: usize = 60;
/// How often the relays' progress is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// The outbox as a whole.
#[derive(Debug)]
pub(super) struct Overview {
    pub(super) source: Source,
    pub(super) since: DateTime<Utc>,
    pub(super) last_position: i64,
    pub(super) used_position: i64,
    pub(super) elsewhere: bool,
}

impl Overview {
    pub(super) async fn read(conn: &mut PgConnection) -> anyhow::Result<Self> {
        let source = outbox::source(conn).await?;
        let (since, last_position, used_position, elsewhere) = sqlx::query_as(
            "SELECT incarnation_since, last_position, used_position, coalesce(is_elsewhere, false) FROM outbox.overview",
        )
        .fetch_one(conn)
        .await
        .map_err(owner_only)?;
        Ok(Self { source, since, last_position, used_position, elsewhere })
    }
}

/// The place where the database is now is the known one.
pub(super) async fn stay(conn: &mut PgConnection) -> anyhow::Result<()> {
    let stay = again(async || {
        sqlx::query("UPDATE outbox.source SET server = outbox.server()").execute(&mut *conn).await
    });
    stay.await.map(|_| ()).map_err(owner_only)
}

/// How many aggregates from before the incarnation have no event of it.
pub(super) async fn without_baseline(conn: &mut PgConnection) -> anyhow::Result<i64> {
    let _said = Progress::new("looking for aggregates without a baseline", "aggregate");
    sqlx::query_scalar("SELECT outbox.without_baseline()").fetch_one(conn).await.map_err(owner_only)
}

/// Waits until every relay name has settled everything up to `mark`, and nothing of the incarnation is set aside or
/// waits. Returns what is not so after `wait`.
pub(super) async fn settled(
    conn: &mut PgConnection,
    mark: i64,
    wait: Duration,
) -> anyhow::Result<Option<String>> {
    let end = Instant::now() + wait;
    let _said =
        Progress::new(format!("waiting until everything is published, for at most {wait:?}"), "event");
    loop {
        let (behind, aside): (Option<String>, i64) = sqlx::query_as(
            "SELECT (SELECT string_agg(format('the relay name %s has settled everything up to %s of %s', r.name, r.low_water, $1),
                                       '; ' ORDER BY r.name)
                     FROM outbox.relay r WHERE r.low_water < $1),
                    (SELECT count(*) FROM (SELECT FROM outbox.parked_event p
                                           WHERE p.position > (SELECT s.from_position FROM outbox.source s)
                                           LIMIT 10001) AS counted)",
        )
        .bind(mark)
        .fetch_one(&mut *conn)
        .await
        .context("the relays could not be looked at; nothing was changed")?;
        let why = match (behind, aside) {
            (None, 0) => return Ok(None),
            (Some(behind), _) => behind,
            (None, aside) => format!(
                "{} of this incarnation are set aside or wait (outbox-relay parked list), so subscribers lack them",
                many(aside, "event")
            ),
        };
        if Instant::now() >= end {
            return Ok(Some(why));
        }
        sleep(LOOK).await;
    }
}

/// Ends aggregates, in batches; those that somebody has written an event of meanwhile are left alone. Returns how many.
pub(super) async fn end_lost(conn: &mut PgConnection, lost: &[EarlierChain]) -> anyhow::Result<i64> {
    let mut ended = 0;
    let (said, all) = (Progress::new("ending what was lost", "aggregate"), lost.len() as u64);
    for batch in lost.chunks(BATCH) {
        ended += between_writers(async || end_some(conn, batch).await).await.with_context(|| {
            format!("{} ended so far; run this again for the rest", many(ended, "aggregate"))
        })?;
        said.at(ended.unsigned_abs(), all);
    }
    Ok(ended)
}

/// Tries to keep the writers out for a moment, again and again: those that are open may be long, and the others go on
/// meanwhile.
async fn between_writers<T>(mut change: impl AsyncFnMut() -> sqlx::Result<T>) -> anyhow::Result<T> {
    let mut attempt = 1;
    loop {
        match change().await {
            Err(error) if Failure::of(&error) == Failure::Locked && attempt < ATTEMPTS => {
                attempt += 1;
                sleep(LOOK).await;
            }
            done => return done.map_err(owner_only),
        }
    }
}

/// What was done about a sequence that was behind.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct Mended {
    pub(super) stood_at: i64,
    pub(super) stands_at: i64,
    pub(super) moved: i64,
}

/// Sets the sequence right, and has published what was written meanwhile, from the position `since` on.
pub(super) async fn mend_sequence(conn: &mut PgConnection, since: i64) -> anyhow::Result<Mended> {
    let _said = Progress::new("moving what was written meanwhile, between the writers", "event");
    between_writers(async || {
        let mut tx = conn.begin().await?;
        sqlx::raw_sql(LOCK_TIMEOUT).execute(&mut *tx).await?;
        let mend = sqlx::query_as("SELECT stood_at, stands_at, moved FROM outbox.mend_sequence($1)");
        let mended: Mended = mend.bind(since).fetch_one(&mut *tx).await?;
        tx.commit().await?;
        Ok(mended)
    })
    .await
}

/// Events that were written while the sequence was behind.
#[derive(Debug, sqlx::FromRow)]
pub(super) struct Reissued {
    /// Those that are the last ones of their aggregates.
    pub(super) latest: i64,
    /// The first position of one.
    pub(super) first: Option<i64>,
    /// The others.
    pub(super) others: i64,
}

/// Counts them, from the position `since` on.
pub(super) async fn reissued(conn: &mut PgConnection, since: i64) -> anyhow::Result<Reissued> {
    let _said = Progress::new("looking for what was written meanwhile", "event");
    let sql = "SELECT count(*) FILTER (WHERE is_latest) AS latest,
                      min(at_position) FILTER (WHERE is_latest) AS first,
                      count(*) FILTER (WHERE NOT is_latest) AS others
               FROM outbox.reissued_event($1)";
    let counted = sqlx::query_as(sql).bind(since).fetch_one(conn).await;
    counted.context("what was written meanwhile could not be counted; nothing was changed")
}

async fn end_some(conn: &mut PgConnection, batch: &[EarlierChain]) -> sqlx::Result<i64> {
    let (mut types, mut ids, mut versions) = (Vec::new(), Vec::new(), Vec::new());
    for aggregate in batch {
        types.push(&*aggregate.aggregate_type);
        ids.push(&*aggregate.aggregate_id);
        versions.push(aggregate.version);
    }
    let mut tx = conn.begin().await?;
    sqlx::raw_sql(LOCK_TIMEOUT).execute(&mut *tx).await?;
    let ended = sqlx::query_scalar("SELECT outbox.end_lost($1, $2, $3)");
    let ended: i64 = ended.bind(types).bind(ids).bind(versions).fetch_one(&mut *tx).await?;
    tx.commit().await?;
    Ok(ended)
}

fn owner_only(error: sqlx::Error) -> anyhow::Error {
    match Failure::of(&error) {
        Failure::Forbidden => {
            anyhow!(
                "this role may not do that; nothing was changed; connect as the owner of the schema outbox"
            )
        }
        _ => not_done(error, "nothing was changed"),
    }
}
