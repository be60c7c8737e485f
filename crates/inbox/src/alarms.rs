//! What somebody should look at while work goes on: holes that nobody fills, and suspected forks.

use std::{collections::BTreeSet, time::Duration};

use serde_json::Value;
use sqlx::PgPool;

use crate::save::Rejection;

/// How many are named; the rest is counted.
const NAMED: usize = 3;
/// How many holes are logged at most, each once.
const LOGGED: i64 = 100;
/// How far is counted.
const COUNTED: i64 = 10_000;

/// Versions that an aggregate waits for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, sqlx::FromRow)]
struct Hole {
    source: String,
    aggregate_type: String,
    aggregate_id: String,
    /// The first that is missing, and the last.
    first: i64,
    last: i64,
    /// How many holes there are in all.
    holes: i64,
}

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) holes: Option<String>,
    pub(crate) forks: Option<String>,
}

/// Looks, and remembers what was logged.
pub(crate) struct Alarms<'a> {
    pub(crate) consumer: &'a str,
    pub(crate) pool: &'a PgPool,
    /// The queue that missing events are replayed to.
    pub(crate) queue: &'a str,
    /// How long a hole may be open.
    pub(crate) after: Duration,
    logged: BTreeSet<Hole>,
}

impl<'a> Alarms<'a> {
    pub(crate) fn new(consumer: &'a str, pool: &'a PgPool, queue: &'a str, after: Duration) -> Self {
        Self { consumer, pool, queue, after, logged: BTreeSet::new() }
    }

    pub(crate) async fn look(&mut self) -> sqlx::Result<Found> {
        let (gaps, forks) = self.count().await?;
        Ok(Found { holes: self.holes(gaps).await?, forks: self.forks(forks).await? })
    }

    /// Counts what is held and rejected, by reason. Says how many wait for a gap, and how many forks there are.
    async fn count(&self) -> sqlx::Result<(i64, i64)> {
        let (malformed, fork) = (Rejection::Malformed.as_str(), Rejection::Fork.as_str());
        let held = ["gap", "behind", "trying", "poison"].map(|reason| ("inbox_held_events", reason));
        let rejected = [malformed, fork].map(|reason| ("inbox_rejected_messages", reason));
        let counts: Vec<(String, i64)> = sqlx::query_as(
            "SELECT reason, (SELECT count(*) FROM (SELECT FROM inbox.held
                                                   WHERE consumer = $1 AND reason = r.reason LIMIT $2) AS counted)
             FROM unnest($3::text[]) AS r (reason)
             UNION ALL
             SELECT reason, (SELECT count(*) FROM (SELECT FROM inbox.rejected
                                                   WHERE consumer = $1 AND reason = r.reason LIMIT $2) AS counted)
             FROM unnest($4::text[]) AS r (reason)",
        )
        .bind(self.consumer)
        .bind(COUNTED + 1)
        .bind(held.map(|(_, reason)| reason))
        .bind(rejected.map(|(_, reason)| reason))
        .fetch_all(self.pool)
        .await?;
        // The reasons of the two have no name in common.
        let count = |of: &str| counts.iter().find(|(reason, _)| reason == of).map_or(0, |(_, count)| *count);
        for (gauge, reason) in held.into_iter().chain(rejected) {
            #[expect(clippy::cast_precision_loss, reason = "at most ten thousand")]
            metrics::gauge!(gauge, "consumer" => self.consumer.to_owned(), "reason" => reason)
                .set(count(reason) as f64);
        }
        Ok((count("gap"), count(fork)))
    }

    async fn holes(&mut self, gaps: i64) -> sqlx::Result<Option<String>> {
        let holes = if gaps == 0 { Vec::new() } else { self.open_holes().await? };
        let count = holes.first().map_or(0, |hole| hole.holes);
        #[expect(clippy::cast_precision_loss, reason = "at most ten thousand")]
        metrics::gauge!("inbox_holes", "consumer" => self.consumer.to_owned()).set(count as f64);

        let open: BTreeSet<Hole> = holes.iter().map(|hole| Hole { holes: 0, ..hole.clone() }).collect();
        for hole in open.difference(&self.logged) {
            tracing::warn!(
                consumer = self.consumer,
                source = hole.source,
                aggregate = format_args!("{}/{}", hole.aggregate_type, hole.aggregate_id),
                first = hole.first,
                last = hole.last,
                "versions are missing, and what comes after them waits"
            );
        }
        self.logged = open;
        let Some(first) = holes.first() else { return Ok(None) };
        let named: Vec<String> = holes.iter().take(NAMED).map(Hole::describe).collect();
        Ok(Some(format!(
            "versions are missing, and later ones wait for them: {}{}. `outbox-relay replay --aggregate {}/{} \
             --to-queue {}` brings them, or a baseline",
            named.join("; "),
            more(count),
            first.aggregate_type,
            first.aggregate_id,
            self.queue,
        )))
    }

    /// The oldest first, by the index; then one look at each aggregate.
    async fn open_holes(&self) -> sqlx::Result<Vec<Hole>> {
        sqlx::query_as(
            "SELECT source, aggregate_type, aggregate_id, a.version + 1 AS first, held.version - 1 AS last,
                    count(*) OVER () AS holes
             FROM (SELECT source, aggregate_type, aggregate_id, min(first_at) AS since
                   FROM (SELECT source, aggregate_type, aggregate_id, first_at FROM inbox.held
                         WHERE consumer = $1 AND reason = 'gap'
                           AND first_at < now() - make_interval(secs => $2)
                         ORDER BY first_at LIMIT $3) AS waiting
                   GROUP BY 1, 2, 3) AS aggregate
             JOIN inbox.aggregate a USING (source, aggregate_type, aggregate_id),
                  LATERAL (SELECT version FROM inbox.held h
                           WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id)
                               = (a.consumer, a.source, a.aggregate_type, a.aggregate_id)
                             AND h.version > a.version
                           ORDER BY h.version LIMIT 1) AS held
             WHERE a.consumer = $1 AND held.version > a.version + 1
             ORDER BY since, aggregate_id LIMIT $4",
        )
        .bind(self.consumer)
        .bind(self.after.as_secs_f64())
        .bind(COUNTED)
        .bind(LOGGED)
        .fetch_all(self.pool)
        .await
    }

    async fn forks(&self, count: i64) -> sqlx::Result<Option<String>> {
        if count == 0 {
            return Ok(None);
        }
        // As text: a \u0000 somewhere in it could not be looked into.
        let properties: Vec<String> = sqlx::query_scalar(
            "SELECT properties::text FROM inbox.rejected WHERE consumer = $1 AND reason = 'fork'
             ORDER BY last_at DESC, id DESC LIMIT $2",
        )
        .bind(self.consumer)
        .bind(i64::try_from(NAMED).unwrap_or(i64::MAX))
        .fetch_all(self.pool)
        .await?;
        let named: Vec<String> = properties.iter().filter_map(|text| name(text)).collect();
        Ok(Some(format!(
            "events contradict what was applied: {}{}. Was a backup restored, or a failover made, without \
             `outbox-relay new-incarnation`? They are kept and not applied: `rejected list` shows them",
            named.join("; "),
            more(count),
        )))
    }
}

impl Hole {
    fn describe(&self) -> String {
        let Self { source, aggregate_type, aggregate_id, first, last, .. } = self;
        let versions =
            if first == last { format!("version {first}") } else { format!("versions {first} to {last}") };
        format!("{aggregate_type}/{aggregate_id} of {source} lacks {versions}")
    }
}

/// The rest of those that are not named.
fn more(count: i64) -> String {
    let more = count - i64::try_from(NAMED).unwrap_or(0);
    match more {
        ..=0 => String::new(),
        _ if count > COUNTED => format!("; and more than {more} others"),
        _ => format!("; and {more} others"),
    }
}

/// Which aggregate and version a rejected event is of.
fn name(properties: &str) -> Option<String> {
    let properties: Value = serde_json::from_str(properties).ok()?;
    let headers = properties.get("headers")?;
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let header = |name| headers.get(name).map(text);
    Some(format!(
        "{}/{} of {} at version {}",
        header("aggregate_type")?,
        header("aggregate_id")?,
        properties.get("app_id").map(text)?,
        header("aggregate_version")?,
    ))
}
