//! How far an inbox is behind an outbox that it follows: in events and in time, without counting either.
//!
//! Events arrive about in the order of their positions. So the newest event that has arrived is searched for, from the
//! end: first at distances that double, then between two of them. Each round is one statement by index to each database.

use std::sync::Arc;

use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use crate::{
    inbox::Inbox,
    looks::Looks,
    outbox::{Outbox, reason},
    watch::{Target, Watch},
};

/// Counts end here.
const MOST: i64 = 10_000;
/// So many events are looked at in a round.
const SAMPLES: i64 = 32;
/// A search takes no more rounds: each divides what is left by 33.
const ROUNDS: u32 = 16;

/// The types of aggregates of which the consumer has received something: one step in the primary key for each.
const TYPES: &str = "\
WITH RECURSIVE known AS (
    (SELECT aggregate_type FROM inbox.aggregate WHERE consumer = $1 AND source = $2 ORDER BY aggregate_type LIMIT 1)
    UNION ALL
    SELECT (SELECT a.aggregate_type FROM inbox.aggregate a
            WHERE a.consumer = $1 AND a.source = $2 AND a.aggregate_type > k.aggregate_type
            ORDER BY a.aggregate_type LIMIT 1)
    FROM known k WHERE k.aggregate_type IS NOT NULL)
SELECT aggregate_type FROM known WHERE aggregate_type IS NOT NULL LIMIT 100";

/// At each position, or the next one below it, the event of one of these types. A thousand rows at most are read for it.
const SAMPLED: &str = "\
SELECT DISTINCT ON (e.position) e.position, e.aggregate_type, e.aggregate_id, e.version
FROM unnest($1::bigint[]) AS at (position)
CROSS JOIN LATERAL (
    SELECT s.* FROM (
        SELECT o.position, o.aggregate_type, o.aggregate_id, o.version FROM outbox.event o
        WHERE o.position <= at.position ORDER BY o.position DESC LIMIT 1000) AS s
    WHERE s.aggregate_type = ANY ($2) ORDER BY s.position DESC LIMIT 1) AS e
ORDER BY e.position DESC";

/// Whether each of these events was applied or is held, in their order.
const ARRIVED: &str = "\
SELECT coalesce(a.version >= w.version OR EXISTS (
           SELECT FROM inbox.held h
           WHERE (h.consumer, h.source, h.aggregate_type, h.aggregate_id, h.version) = ($1, $2, w.type, w.id, w.version)), false)
FROM unnest($3::text[], $4::text[], $5::bigint[]) WITH ORDINALITY AS w (type, id, version, n)
LEFT JOIN inbox.aggregate a ON (a.consumer, a.source, a.aggregate_type, a.aggregate_id) = ($1, $2, w.type, w.id)
ORDER BY w.n";

/// What lies above a position, and the age of the first of it.
const BEHIND: &str = "\
SELECT count(*), (extract(epoch FROM statement_timestamp() - (array_agg(created_at ORDER BY position))[1]))::float8
FROM (SELECT position, created_at FROM outbox.event
      WHERE position > $1 AND aggregate_type = ANY ($2) AND isfinite(created_at) ORDER BY position LIMIT $3) AS behind";

/// How far an inbox is behind.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lag {
    /// It does not follow the outbox, or has received nothing of it.
    None,
    /// So many events behind; at most one more than are counted. The oldest of them is so many seconds old.
    Behind(i64, f64),
}

impl Lag {
    /// For people.
    pub fn text(self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Behind(0, _) => Some("nothing is missing".to_owned()),
            Self::Behind(events, seconds) => {
                let age = outbox_relay::command::span(seconds);
                Some(match events {
                    1 => format!("1 event behind, {age}"),
                    events if events > MOST => format!("more than {MOST} events behind, {age}"),
                    events => format!("{events} events behind, {age}"),
                })
            }
        }
    }
}

/// An inbox and an outbox that it may follow.
#[derive(Debug)]
pub struct Follows {
    /// The outbox.
    pub outbox: Arc<Outbox>,
    /// The inbox.
    pub inbox: Arc<Inbox>,
    /// What was found last.
    pub watch: Watch<Lag>,
    looks: (Looks, Looks),
}

#[derive(Debug, sqlx::FromRow)]
struct Sampled {
    position: i64,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
}

impl Follows {
    /// This pair.
    pub fn new(outbox: &Arc<Outbox>, inbox: &Arc<Inbox>) -> Self {
        let looks = (Looks::new(outbox.database.clone()), Looks::new(inbox.database.clone()));
        Self { outbox: Arc::clone(outbox), inbox: Arc::clone(inbox), watch: Watch::default(), looks }
    }

    /// Looks again and again, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        self.watch.run(stop, self).await;
    }

    /// The source as the inbox spells it, if it follows it.
    fn source(&self) -> Option<String> {
        let (outbox, inbox) = (self.outbox.watch.last(), self.inbox.watch.last());
        let overview = &outbox.good.as_ref()?.look.overview;
        let source = overview.source.as_ref()?;
        inbox.good.as_ref()?.look.sources.contains_key(source).then(|| match overview.incarnation {
            Some(incarnation) if incarnation > 1 => format!("{source}~{incarnation}"),
            _ => source.clone(),
        })
    }
}

impl Target for Follows {
    type Look = Lag;

    async fn look(&self) -> Result<Lag, String> {
        let Some(source) = self.source() else { return Ok(Lag::None) };
        let mut outbox = self.looks.0.take().await.map_err(|error| reason(&error))?;
        let mut inbox = self.looks.1.take().await.map_err(|error| reason(&error))?;
        let lag = lag(&mut outbox, &mut inbox, &self.inbox.consumer, &source)
            .await
            .map_err(|error| reason(&error))?;
        self.looks.0.keep(outbox);
        self.looks.1.keep(inbox);
        Ok(lag)
    }
}

async fn lag(
    outbox: &mut PgConnection,
    inbox: &mut PgConnection,
    consumer: &str,
    source: &str,
) -> sqlx::Result<Lag> {
    let types: Vec<String> =
        sqlx::query_scalar(TYPES).bind(consumer).bind(source).fetch_all(&mut *inbox).await?;
    let last: Option<i64> =
        sqlx::query_scalar("SELECT position FROM outbox.event ORDER BY position DESC LIMIT 1")
            .fetch_optional(&mut *outbox)
            .await?;
    let Some(last) = last.filter(|_| !types.is_empty()) else { return Ok(Lag::None) };
    // From the end, at distances that double.
    let mut at: Vec<i64> =
        (0..62).map(|power| last - ((1_i64 << power) - 1)).take_while(|position| *position > 0).collect();
    at.push(1);
    let (mut arrived, mut missing) = (None, i64::MAX);
    for _ in 0..ROUNDS {
        let sampled: Vec<Sampled> =
            sqlx::query_as(SAMPLED).bind(&at).bind(&types).fetch_all(&mut *outbox).await?;
        let is_there = are_there(inbox, consumer, source, &sampled).await?;
        // The newest that is there, and the one after it.
        let mut found = None;
        for (event, is_there) in sampled.iter().zip(is_there) {
            if is_there {
                found = Some(event.position);
                break;
            }
            missing = missing.min(event.position);
        }
        arrived = found.or(arrived);
        let Some(newest) = arrived else { return Ok(Lag::None) };
        let between = missing.min(last + 1) - newest - 1;
        if between <= 0 {
            break;
        }
        let step = (between / (SAMPLES + 1)).max(1);
        at = (1..=SAMPLES.min(between)).map(|n| newest + n * step).collect();
        if between <= SAMPLES {
            // Every position is looked at: the next round is the last.
            at = (newest + 1..=newest + between).collect();
            if sampled.len() <= 1 && found.is_none() {
                break;
            }
        }
    }
    let Some(newest) = arrived else { return Ok(Lag::None) };
    let (events, age): (i64, Option<f64>) =
        sqlx::query_as(BEHIND).bind(newest).bind(&types).bind(MOST + 1).fetch_one(outbox).await?;
    Ok(Lag::Behind(events, age.unwrap_or_default().max(0.0)))
}

async fn are_there(
    inbox: &mut PgConnection,
    consumer: &str,
    source: &str,
    events: &[Sampled],
) -> sqlx::Result<Vec<bool>> {
    let types: Vec<&str> = events.iter().map(|event| event.aggregate_type.as_str()).collect();
    let ids: Vec<&str> = events.iter().map(|event| event.aggregate_id.as_str()).collect();
    let versions: Vec<i64> = events.iter().map(|event| event.version).collect();
    let query = sqlx::query_scalar(ARRIVED).bind(consumer).bind(source);
    query.bind(types).bind(ids).bind(versions).fetch_all(inbox).await
}
