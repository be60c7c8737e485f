//! What an operator should look at while consuming goes on: missing versions, suspected forks, limits.

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    time::{Duration, Instant},
};

use serde_json::Value;
use sqlx::PgPool;

use crate::{
    rejected::REASONS,
    rejection::{NOT_KEPT, Rejection},
    series::{HELD_EVENTS, REJECTED_MESSAGES},
};

/// Why events are held.
pub(crate) const HELD: [&str; 4] = ["gap", "behind", "trying", "poison"];

/// How many findings a text names. The rest is counted.
pub(crate) const NAMED: usize = 3;
/// How many holes are logged at most, each of them once.
const LOGGED: i64 = 100;
/// Events that wait for missing versions are looked at in their order, so many at each look.
const WAITING: i64 = 1_000;
/// The highest number that is counted at each look.
pub(crate) const COUNTED: i64 = 10_000;
/// Events that wait for missing versions are counted further, up to their limit: after a look that counted `n`, the next
/// such look is this long away for each 10,000 of them, and at most so long.
const FURTHER: Duration = Duration::from_secs(5);
const FURTHER_MOST: Duration = Duration::from_mins(1);

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

/// What an operator should look at.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) holes: Option<String>,
    pub(crate) forks: Option<String>,
    pub(crate) forged: Option<String>,
    /// What is of another incarnation of a source than the newest one.
    pub(crate) incarnations: Option<String>,
    /// Which limit is reached.
    pub(crate) limits: Option<String>,
    /// The limit of events that wait for missing versions is reached.
    pub(crate) full: bool,
}

/// How many rows may be stored; 0 for no limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StorageCaps {
    /// Messages that are rejected for one reason.
    pub(crate) rejected: u32,
    /// Events that wait for missing versions.
    pub(crate) gaps: u32,
}

/// Reads the findings, and remembers which of them were logged.
pub(crate) struct Alarms<'a> {
    pub(crate) consumer: &'a str,
    pub(crate) pool: &'a PgPool,
    /// The queue that missing events are replayed to.
    pub(crate) queue: &'a str,
    /// How long a hole may be open.
    pub(crate) after: Duration,
    caps: StorageCaps,
    logged: BTreeSet<Hole>,
    /// How many gaps there were when all of them were counted, and when to count them again.
    gaps: (i64, Instant),
}

impl<'a> Alarms<'a> {
    pub(crate) fn new(
        consumer: &'a str,
        pool: &'a PgPool,
        queue: &'a str,
        after: Duration,
        caps: StorageCaps,
    ) -> Self {
        Self { consumer, pool, queue, after, caps, logged: BTreeSet::new(), gaps: (0, Instant::now()) }
    }

    pub(crate) async fn look(&mut self) -> sqlx::Result<Findings> {
        let counts = self.count().await?;
        // The reasons of the two tables have no name in common.
        let count = |of: &str| counts.iter().find(|(reason, _)| reason == of).map_or(0, |(_, count)| *count);
        Ok(Findings {
            holes: self.holes(count("gap")).await?,
            forks: self.forks(count(Rejection::Fork.as_str())).await?,
            forged: self.forged(count(Rejection::WrongUser.as_str())).await?,
            incarnations: self
                .incarnations(count(Rejection::Unrelated.as_str()), count(Rejection::Superseded.as_str()))
                .await?,
            limits: self.limits(&counts),
            full: reached(self.caps.gaps, count("gap")),
        })
    }

    /// Counts what is held and rejected, by reason. What is held of earlier incarnations waits for nothing.
    ///
    /// Each count ends at a limit, so a look costs no more than that, however much is held.
    async fn count(&mut self) -> sqlx::Result<Vec<(String, i64)>> {
        let held = HELD.map(|reason| (HELD_EVENTS, reason));
        let rejected = REASONS.map(|reason| (REJECTED_MESSAGES, reason));
        let mut counts: Vec<(String, i64)> = sqlx::query_as(
            "SELECT reason, (SELECT count(*) FROM (SELECT FROM inbox.held
                                                   WHERE consumer = $1 AND reason = r.reason
                                                     AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e
                                                                              WHERE e.consumer = $1))
                                                   LIMIT $2) AS counted)
             FROM unnest($3::text[]) AS r (reason)
             UNION ALL
             SELECT reason, (SELECT count(*) FROM (SELECT FROM inbox.rejected
                                                   WHERE consumer = $1 AND reason = r.reason LIMIT $5) AS counted)
             FROM unnest($4::text[]) AS r (reason)",
        )
        .bind(self.consumer)
        .bind(COUNTED + 1)
        .bind(held.map(|(_, reason)| reason))
        .bind(rejected.map(|(_, reason)| reason))
        .bind(COUNTED.max(self.caps.rejected.into()) + 1)
        .fetch_all(self.pool)
        .await?;
        if let Some((_, gaps)) = counts.iter_mut().find(|(reason, gaps)| reason == "gap" && *gaps > COUNTED) {
            *gaps = self.all_gaps().await?.max(*gaps);
        }
        for (gauge, reason) in held.into_iter().chain(rejected) {
            let count = counts.iter().find(|(of, _)| of == reason).map_or(0, |(_, count)| *count);
            #[expect(clippy::cast_precision_loss, reason = "as many as the limits allow")]
            metrics::gauge!(gauge, "consumer" => self.consumer.to_owned(), "reason" => reason)
                .set(count as f64);
        }
        Ok(counts)
    }

    /// Counts all gaps up to their limit, or returns what was counted a short while ago.
    async fn all_gaps(&mut self) -> sqlx::Result<i64> {
        let (counted, next) = self.gaps;
        if Instant::now() < next {
            return Ok(counted);
        }
        let gaps: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM (SELECT FROM inbox.held
                                   WHERE consumer = $1 AND reason = 'gap'
                                     AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e
                                                              WHERE e.consumer = $1))
                                   LIMIT $2) AS counted",
        )
        .bind(self.consumer)
        .bind(COUNTED.max(self.caps.gaps.into()) + 1)
        .fetch_one(self.pool)
        .await?;
        let parts = u32::try_from(gaps / COUNTED).unwrap_or(u32::MAX);
        self.gaps = (gaps, Instant::now() + FURTHER.saturating_mul(parts).min(FURTHER_MOST));
        Ok(gaps)
    }

    /// Which limits are reached, and what can be done.
    fn limits(&self, counts: &[(String, i64)]) -> Option<String> {
        let StorageCaps { rejected, gaps } = self.caps;
        let texts: Vec<String> = counts
            .iter()
            .filter_map(|(reason, count)| match reason.as_str() {
                "gap" if reached(gaps, *count) => Some(format!(
                    "the limit of events that wait for missing versions ({gaps}) is reached. Further ones are \
                     rejected. Find their publisher, have the missing versions replayed, or raise the limit"
                )),
                "gap" | "behind" | "trying" | "poison" => None,
                reason if reached(rejected, *count) => Some(format!(
                    "the limit of stored messages that were rejected as {reason} ({rejected}) is reached. Further ones \
                     are only counted. Find their publisher, then delete them from inbox.rejected"
                )),
                _ => None,
            })
            .collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }

    async fn holes(&mut self, gaps: i64) -> sqlx::Result<Option<String>> {
        let holes = if gaps == 0 { Vec::new() } else { self.open_holes().await? };
        let count = holes.first().map_or(0, |hole| hole.holes);
        #[expect(clippy::cast_precision_loss, reason = "at most a thousand")]
        metrics::gauge!("inbox_holes", "consumer" => self.consumer.to_owned()).set(count as f64);

        let open: BTreeSet<Hole> = holes.iter().map(|hole| Hole { holes: 0, ..hole.clone() }).collect();
        for hole in open.difference(&self.logged) {
            tracing::warn!(
                consumer = self.consumer,
                source = hole.source,
                aggregate = %hole.aggregate(),
                first = hole.first,
                last = hole.last,
                "versions are missing, and what comes after them waits"
            );
        }
        self.logged = open;
        let Some(first) = holes.first() else { return Ok(None) };
        let named: Vec<String> = holes.iter().take(NAMED).map(Hole::describe).collect();
        Ok(Some(format!(
            "versions are missing, and later ones wait for them: {}{}. Have the source replay the aggregate {} to the \
             queue {}, or publish a baseline of it",
            named.join("; "),
            // Where as many are found as are looked at, there may be more.
            if count >= WAITING { "; and others".to_owned() } else { more(count) },
            escape::shell_word(&format!("{}/{}", first.aggregate_type, first.aggregate_id)),
            escape::shell_word(self.queue),
        )))
    }

    /// The oldest first, by the index; then one look at each aggregate. A first version that is held waits for a baseline:
    /// its chain has to begin anew.
    async fn open_holes(&self) -> sqlx::Result<Vec<Hole>> {
        sqlx::query_as(
            "SELECT source, aggregate_type, aggregate_id, a.version + 1 AS first, held.version - 1 AS last,
                    count(*) OVER () AS holes
             FROM (SELECT source, aggregate_type, aggregate_id, min(first_at) AS since
                   FROM (SELECT source, aggregate_type, aggregate_id, first_at FROM inbox.held
                         WHERE consumer = $1 AND reason = 'gap'
                           AND first_at < now() - make_interval(secs => $2)
                           AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e WHERE e.consumer = $1))
                         ORDER BY first_at LIMIT $3) AS waiting
                   GROUP BY 1, 2, 3) AS aggregate
             JOIN inbox.aggregate a USING (source, aggregate_type, aggregate_id),
                  LATERAL (SELECT version, reason FROM inbox.held h
                           WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id)
                               = (a.consumer, a.source, a.aggregate_type, a.aggregate_id)
                             AND h.version > a.version
                           ORDER BY h.version LIMIT 1) AS held
             WHERE a.consumer = $1
               AND (held.version - 1 > a.version OR a.version = 0 AND held.version = 1 AND held.reason = 'gap')
             ORDER BY since, aggregate_id LIMIT $4",
        )
        .bind(self.consumer)
        .bind(self.after.as_secs_f64())
        .bind(WAITING)
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
             a new incarnation of the source? They are stored in inbox.rejected and not applied",
            named.join("; "),
            more(count),
        )))
    }
}

/// Whether the limit is reached.
fn reached(most: u32, count: i64) -> bool {
    most > 0 && count >= i64::from(most)
}

impl Alarms<'_> {
    /// Names the users of the last ones.
    async fn forged(&self, count: i64) -> sqlx::Result<Option<String>> {
        if count == 0 {
            return Ok(None);
        }
        let last: Vec<String> = sqlx::query_scalar(
            "SELECT detail FROM inbox.rejected WHERE consumer = $1 AND reason = 'wrong-user' AND detail <> $3
             ORDER BY last_at DESC, id DESC LIMIT $2",
        )
        .bind(self.consumer)
        .bind(i64::try_from(NAMED).unwrap_or(i64::MAX))
        .bind(NOT_KEPT)
        .fetch_all(self.pool)
        .await?;
        Ok(Some(format!(
            "{} of a followed source did not come from its user: {}. They are stored in inbox.rejected and not \
             applied. If the publisher's user was renamed, name the new user for the source, have the rejected events replayed, \
             and delete them from inbox.rejected. If not, another user forges events",
            if count == 1 { "a message".to_owned() } else { format!("{} messages", counted(count)) },
            Vec::from_iter(BTreeSet::from_iter(last)).join("; "),
        )))
    }
}

impl Hole {
    fn describe(&self) -> String {
        let (aggregate, source, Self { first, last, .. }) =
            (self.aggregate(), escape::line(&self.source), self);
        let versions = match first.cmp(last) {
            Ordering::Less => format!("versions {first} to {last}"),
            Ordering::Equal => format!("version {first}"),
            Ordering::Greater => "a baseline".to_owned(),
        };
        format!("{aggregate} of {source} lacks {versions}")
    }

    fn aggregate(&self) -> String {
        format!("{}/{}", escape::line(&self.aggregate_type), escape::line(&self.aggregate_id))
    }
}

/// A count as far as it goes.
pub(crate) fn counted(count: i64) -> String {
    if count > COUNTED { format!("more than {COUNTED}") } else { count.to_string() }
}

/// The rest of those that are not named.
pub(crate) fn more(count: i64) -> String {
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
    let text = |value: &Value| escape::line(value.as_str().unwrap_or(&value.to_string())).to_string();
    let header = |name| headers.get(name).map(text);
    Some(format!(
        "{}/{} of {} at version {}",
        header("aggregate_type")?,
        header("aggregate_id")?,
        properties.get("app_id").map(text)?,
        header("aggregate_version")?,
    ))
}
