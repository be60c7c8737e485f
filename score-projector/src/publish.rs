//! Publishes the score service's events: the outbox counts their versions. The end of a score erases the content of its
//! earlier events.

use std::{collections::BTreeSet, time::Duration};

use outbox::{AppendError, Ended, Event, database::describe};
use sqlx::{Connection, PgConnection, PgPool, Postgres, Transaction};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::batch::entry::ScoreEvent;

/// Once in the life of a database, with millions of scores.
const HAND_OVER_TIMEOUT: &str = "SET LOCAL statement_timeout = '10min'";
/// Between attempts to hand the versions over, the first and the longest pause.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

type Tx<'a, 'tx> = &'a mut Transaction<'tx, Postgres>;

/// Lets the outbox count the versions of scores, on from those that this service counted itself in earlier releases. The
/// first call does it, and later ones change nothing.
pub(crate) async fn hand_over_chains(conn: &mut PgConnection) -> Result<(), AppendError> {
    let mut tx = conn.begin().await?;
    sqlx::query(HAND_OVER_TIMEOUT).execute(&mut *tx).await?;
    sqlx::query("SELECT score.hand_over_chains()").execute(&mut *tx).await?;
    Ok(tx.commit().await?)
}

/// As [`hand_over_chains`], until it succeeds; tells `waiting` why it did not. `stop` ends the wait early, with `false`.
pub(crate) async fn chains_handed_over(
    pool: &PgPool,
    stop: &CancellationToken,
    mut waiting: impl FnMut(String),
) -> bool {
    let mut pauses = daemon::backoff(PAUSE.0, PAUSE.1);
    let attempt = async || hand_over_chains(&mut *pool.acquire().await?).await;
    loop {
        match stop.run_until_cancelled(attempt()).await {
            None => return false,
            Some(Ok(())) => return true,
            Some(Err(error)) => {
                waiting(format!("the outbox does not count the versions of scores yet: {}", reason(&error)));
            }
        }
        let pause = pauses.next().unwrap_or(PAUSE.1);
        if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return false;
        }
    }
}

/// The outbox's own words, or what an error of the database means.
pub(crate) fn reason(error: &AppendError) -> String {
    match error {
        AppendError::Database(error) | AppendError::Conflict(error) => describe(error),
        error => error.to_string(),
    }
}

/// Reads of which of `persons` an event was ever published.
pub(crate) async fn published(tx: Tx<'_, '_>, persons: &BTreeSet<Uuid>) -> sqlx::Result<BTreeSet<Uuid>> {
    if persons.is_empty() {
        return Ok(BTreeSet::new());
    }
    let published: Vec<Uuid> = sqlx::query_scalar(
        "SELECT aggregate_id::uuid FROM outbox.aggregate
         WHERE aggregate_type = $1 AND aggregate_id = ANY ($2) AND version > 0",
    )
    .bind(events::AGGREGATE_SCORE)
    .bind(persons.iter().map(Uuid::to_string).collect::<Vec<_>>())
    .fetch_all(&mut **tx)
    .await?;
    Ok(published.into_iter().collect())
}

/// Publishes events in their order. That locks their aggregates. When a score ends, its earlier events are erased under the
/// same lock, in a later statement.
pub(crate) async fn append(tx: Tx<'_, '_>, scores: Vec<ScoreEvent>) -> Result<(), AppendError> {
    let events: Vec<Event> = scores
        .iter()
        .map(|score| {
            let person = score.person.to_string();
            Event::new(score.type_, events::AGGREGATE_SCORE, person, &score.payload)
                .headers(score.headers.clone().unwrap_or_default())
        })
        .collect();
    let published = outbox::publish_all(tx, &events).await?;
    let ends = scores.iter().zip(published).filter(|(score, _)| score.type_ == events::SCORE_DELETED);
    let ended: Vec<Ended> = ends
        .map(|(score, published)| Ended {
            aggregate_type: events::AGGREGATE_SCORE.into(),
            aggregate_id: score.person.to_string(),
            version: published.version,
        })
        .collect();
    outbox::erase(tx, &ended).await?;
    Ok(())
}
