//! `trace`: where is this event now?

use std::{fmt::Write, str::FromStr, time::Duration};

use anyhow::Context;
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;
use shown::shown;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use super::{
    CommandArgs, Verdict, connect,
    state::{SILENCE, Waiting},
    status::time,
};
use crate::{row::Made, session::MAX_DROPPED};

/// Without a time to look at, every event is looked at.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);
/// An event's id tells when it was made; the row tells when its transaction began, by another clock.
const AROUND: chrono::Duration = chrono::Duration::minutes(10);

/// Settings of `trace`.
#[derive(Debug, clap::Args)]
pub struct TraceArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// An event's id (AMQP's message id), or an aggregate: TYPE/ID.
    pub what: What,
    /// Of an aggregate, so many of its last events.
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    pub limit: i64,
    /// Look for an event's id everywhere, not only around the time that a UUIDv7 tells. Reads all that is
    /// stored.
    #[arg(long)]
    pub scan: bool,
}

/// What to look for.
#[derive(Clone, Debug)]
pub enum What {
    /// One event.
    Event(Uuid),
    /// An aggregate's events: its type and its id.
    Aggregate(String, String),
}

impl FromStr for What {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match (text.parse(), text.split_once('/')) {
            (Ok(id), _) => Ok(Self::Event(id)),
            (_, Some((type_, id))) if !type_.is_empty() && !id.is_empty() => {
                Ok(Self::Aggregate(type_.to_owned(), id.to_owned()))
            }
            _ => Err("it should be an event's id (a UUID), or an aggregate: TYPE/ID"),
        }
    }
}

/// An event that is stored.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Stored {
    position: i64,
    id: Uuid,
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    type_: String,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    created_at: Made,
}

/// How far a relay is with an event, as of the relay's last word.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Fate {
    relay: String,
    /// `waiting`, `under way`, `waits`, `parked`, `confirmed`, `dropped by hand`, `dropped by rule`; or `settled`, where
    /// it is not known how.
    state: String,
    /// Why it was set aside.
    detail: Option<String>,
    /// When it is tried again; none by hand only.
    next_attempt_at: Option<DateTime<Utc>>,
    /// What the relay said that it waits for, as of its last heartbeat.
    waiting: Json<Vec<Waiting>>,
    /// Whether a relay leads that says so.
    led: bool,
}

impl Fate {
    /// What its relay waits for, for people.
    fn reasons(&self) -> String {
        if !self.led {
            return "; no relay of this name leads now".to_owned();
        }
        let reasons: Vec<String> = self
            .waiting
            .iter()
            .map(|Waiting { part, reason, seconds }| format!("{part}: {reason} (for {seconds} s)"))
            .collect();
        if reasons.is_empty() { String::new() } else { format!("; the relay waits: {}", reasons.join("; ")) }
    }
}

/// By the BRIN index on the time, or, without a time, everything.
const BY_ID: &str = "
SELECT position, id, type, aggregate_type, aggregate_id, version, created_at FROM outbox.event
WHERE id = $1 AND ($2::timestamptz IS NULL OR created_at BETWEEN $2 AND $3)
LIMIT 1";

/// By the partitions' unique indexes, from their ends.
const BY_AGGREGATE: &str = "
SELECT position, id, type, aggregate_type, aggregate_id, version, created_at FROM outbox.event
WHERE aggregate_type = $1 AND aggregate_id = $2 ORDER BY version DESC LIMIT $3";

/// What is aside was settled as well, so that comes first. Between the low-water mark and the last
/// position read, the open ranges are what is not settled.
const FATES: &str = "
SELECT r.name AS relay, p.detail, p.next_attempt_at, r.waiting,
       coalesce(r.heartbeat_at > clock_timestamp() - $2 * interval '1 second', false) AS led,
       CASE WHEN p.state = 'waiting' THEN 'waits'
            WHEN p.position IS NOT NULL THEN 'parked'
            WHEN $1 > r.high THEN 'waiting'
            WHEN $1 > r.low_water AND r.open @> $1 THEN 'under way'
            WHEN r.dropped_by_hand @> $1 THEN 'dropped by hand'
            WHEN r.dropped_by_rule @> $1 THEN 'dropped by rule'
            WHEN $1 <= r.told_from THEN 'settled'
            WHEN $1 < lower(r.dropped_by_rule) AND (SELECT count(*) FROM unnest(r.dropped_by_rule)) >= $3
              OR $1 < lower(r.dropped_by_hand) AND (SELECT count(*) FROM unnest(r.dropped_by_hand)) >= $3 THEN 'settled'
            ELSE 'confirmed' END AS state
FROM outbox.relay r LEFT JOIN outbox.parked p ON p.relay = r.name AND p.position = $1
ORDER BY r.name";

/// Finds an event, or an aggregate's last ones, and says how far each relay is with it.
pub async fn trace(args: &TraceArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "trace", STATEMENT_TIMEOUT).await?;
    let stored = find(&mut conn, args).await.context("the outbox could not be searched")?;
    let mut events: Vec<(Stored, Vec<Fate>)> = Vec::with_capacity(stored.len());
    for event in stored {
        let fates = sqlx::query_as(FATES)
            .bind(event.position)
            .bind(SILENCE)
            .bind(MAX_DROPPED)
            .fetch_all(&mut conn)
            .await;
        events.push((event, fates.context("the relays' progress could not be read")?));
    }
    let answer: Vec<_> =
        events.iter().map(|(event, fates)| json!({"event": event, "relays": fates})).collect();
    args.common.answer(&json!({"events": answer}), || {
        if events.is_empty() {
            return not_found(args);
        }
        events.iter().map(|(event, fates)| text(event, fates)).collect()
    })?;
    Ok(if events.is_empty() { Verdict::NotWell } else { Verdict::Well })
}

async fn find(conn: &mut PgConnection, args: &TraceArgs) -> Result<Vec<Stored>, sqlx::Error> {
    match &args.what {
        What::Aggregate(type_, id) => {
            let query = sqlx::query_as(BY_AGGREGATE).bind(type_).bind(id).bind(args.limit);
            let mut events: Vec<Stored> = query.fetch_all(conn).await?;
            events.reverse();
            Ok(events)
        }
        What::Event(id) => {
            let made = if args.scan { None } else { made(*id) };
            if made.is_none() && !args.scan {
                return Ok(Vec::new());
            }
            let (from, to) = (made.map(|at| at - AROUND), made.map(|at| at + AROUND));
            sqlx::query_as(BY_ID).bind(id).bind(from).bind(to).fetch_all(conn).await
        }
    }
}

/// When a UUIDv7 was made.
fn made(id: Uuid) -> Option<DateTime<Utc>> {
    let (seconds, nanos) = id.get_timestamp().filter(|_| id.get_version_num() == 7)?.to_unix();
    DateTime::from_timestamp(seconds.try_into().ok()?, nanos)
}

fn not_found(args: &TraceArgs) -> String {
    match &args.what {
        What::Aggregate(type_, id) => format!(
            "no event of {}/{} is stored here: it belongs to another database, its transaction did \
             not commit, or its partition was retired",
            shown(type_),
            shown(id)
        ),
        What::Event(id) => {
            let scanned = "it belongs to another database, its transaction did not commit, or its partition \
                           was retired";
            match made(*id) {
                _ if args.scan => format!("event {id} is not stored here: {scanned}"),
                Some(at) => format!(
                    "event {id} is not stored here around {}, when it was made: {scanned}; --scan looks \
                     everywhere",
                    time(Some(at))
                ),
                None => format!("{id} is no UUIDv7 and tells no time to look at; --scan looks everywhere"),
            }
        }
    }
}

fn text(event: &Stored, fates: &[Fate]) -> String {
    let mut text = format!(
        "event {} of type {}\n  of {}/{}, version {}, position {}, made {}\n",
        event.id,
        shown(&event.type_),
        shown(&event.aggregate_type),
        shown(&event.aggregate_id),
        event.version,
        event.position,
        event.created_at
    );
    for fate in fates {
        let said = match &*fate.state {
            "waiting" => format!("not read yet{}", fate.reasons()),
            "under way" => format!("read, and not confirmed yet{}", fate.reasons()),
            "waits" if fate.next_attempt_at.is_none() => {
                "waits behind an earlier event of its aggregate that is not taken".to_owned()
            }
            "waits" => {
                let why = fate.detail.as_deref().unwrap_or_default();
                format!("waits, and later events of its aggregate behind it: {why}; tried again by itself")
            }
            "parked" => {
                let next = fate.next_attempt_at.map_or_else(
                    || format!("only by hand: outbox-relay parked retry --id {}", event.id),
                    |at| format!("by itself at {}, or when the oldest of its type is taken", time(Some(at))),
                );
                format!(
                    "set aside: {}; tried again {next}",
                    shown(fate.detail.as_deref().unwrap_or_default())
                )
            }
            "confirmed" => "confirmed by the broker".to_owned(),
            "dropped by hand" => {
                "given up by hand (outbox-relay parked drop); it was not published".to_owned()
            }
            "dropped by rule" => {
                "no queue took it, and a rule let it go (--unroutable '...=drop'); nobody has it".to_owned()
            }
            _ => {
                "settled, and it is not known how: the relay began after it, or it is too long ago".to_owned()
            }
        };
        let _ = writeln!(text, "  relay {}: {said}", fate.relay);
    }
    if fates.is_empty() {
        text.push_str("  no relay has run on this database yet\n");
    }
    text
}
