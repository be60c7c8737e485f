//! The way of an event: where it was made, what each relay did with it, and how far each inbox is.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use outbox_relay::command::trace::{self, StoredEvent, Target};
use sqlx::PgConnection;
use tokio::time::timeout;
use uuid::Uuid;

use crate::{
    Console,
    inbox::Inbox,
    outbox::{Outbox, reason},
};

/// How many of an aggregate's last events are shown.
pub const EVENTS: i64 = 50;
/// No database takes longer to be asked.
const TIMEOUT: Duration = Duration::from_secs(6);

/// A step of an event's way.
#[derive(Clone, Debug)]
pub struct Step {
    /// When, where that is known.
    pub at: Option<DateTime<Utc>>,
    /// The database: `outbox person`.
    pub place: String,
    /// What happened.
    pub text: String,
    /// It is not as it should be.
    pub is_trouble: bool,
}

/// An event with its steps, in the order in which they follow each other.
#[derive(Debug)]
pub struct Way {
    /// Its id.
    pub id: Uuid,
    /// The event type.
    pub type_: String,
    /// Its aggregate.
    pub aggregate: (String, String),
    /// The aggregate's version.
    pub version: i64,
    /// What happened to it.
    pub steps: Vec<Step>,
    /// The outbox that has it stored, and its position there.
    pub stored: Option<(String, i64)>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Events, each aggregate's in order.
    pub ways: Vec<Way>,
    /// How far each inbox is with the aggregate, or the aggregate of the event.
    pub inboxes: Vec<Step>,
    /// Databases that could not be asked.
    pub away: Vec<String>,
}

/// How far an inbox is with an aggregate.
#[derive(Debug, sqlx::FromRow)]
struct Applied {
    source: String,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    last_event_id: Option<Uuid>,
    updated_at: DateTime<Utc>,
}

/// An event that an inbox holds.
#[derive(Clone, Debug, sqlx::FromRow)]
struct Held {
    event_id: Uuid,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    #[sqlx(rename = "type")]
    type_: String,
    reason: String,
    error: Option<String>,
    attempts: i32,
    first_at: DateTime<Utc>,
    last_at: DateTime<Utc>,
}

/// By the index on the aggregate's id.
const APPLIED: &str = "\
SELECT source, aggregate_type, aggregate_id, version, last_event_id, updated_at FROM inbox.aggregate
WHERE consumer = $1 AND aggregate_id = $2 AND aggregate_type = $3
ORDER BY source LIMIT 20";

/// By the primary key, for each source.
const HELD: &str = "\
SELECT event_id, aggregate_type, aggregate_id, version, type, reason, error, attempts, first_at, last_at FROM inbox.held
WHERE consumer = $1 AND source = ANY ($2) AND aggregate_type = $3 AND aggregate_id = $4
ORDER BY version LIMIT 200";

/// One pass over what is held.
const HELD_BY_ID: &str = "\
SELECT event_id, aggregate_type, aggregate_id, version, type, reason, error, attempts, first_at, last_at FROM inbox.held
WHERE consumer = $1 AND event_id = $2 LIMIT 1";

/// What a relay set aside.
const PARKED: &str = "\
SELECT position, relay, parked_at, last_attempt_at FROM outbox.parked_event
WHERE relay = ANY ($1) AND position = ANY ($2)";

/// Asks every outbox, then every inbox.
pub async fn find(console: &Console, target: &Target, scan: bool) -> Found {
    let mut found = Found::default();
    let asked = join_all(console.outboxes.values().map(async |outbox| {
        let ways = timeout(TIMEOUT, in_outbox(outbox, target, scan)).await;
        (format!("outbox {}", outbox.name), flat(ways))
    }));
    for (place, ways) in asked.await {
        match ways {
            Ok(ways) => found.ways.extend(ways),
            Err(reason) => found.away.push(format!("The {place} could not be asked: {reason}.")),
        }
    }
    let aggregate = match (target, found.ways.first()) {
        (Target::Aggregate(type_, id), _) => Some((type_.clone(), id.clone())),
        (Target::Event(_), Some(way)) => Some(way.aggregate.clone()),
        (Target::Event(_), None) => None,
    };
    let asked = join_all(console.inboxes.values().map(async |inbox| {
        let seen = timeout(TIMEOUT, in_inbox(inbox, target, aggregate.as_ref())).await;
        (inbox, flat(seen))
    }));
    for (inbox, seen) in asked.await {
        let place = format!("inbox {}", inbox.name);
        match seen {
            Ok((applied, held)) => add(&mut found, &place, &applied, held),
            Err(reason) => found.away.push(format!("The {place} could not be asked: {reason}.")),
        }
    }
    found
}

fn flat<T>(asked: Result<sqlx::Result<T>, tokio::time::error::Elapsed>) -> Result<T, String> {
    match asked {
        Ok(asked) => asked.map_err(|error| escape::line(&reason(&error)).to_string()),
        Err(_) => Err(format!("it did not respond within {} s", TIMEOUT.as_secs())),
    }
}

async fn in_outbox(outbox: &Outbox, target: &Target, scan: bool) -> sqlx::Result<Vec<Way>> {
    let mut conn = outbox.pool.acquire().await?;
    let stored = trace::find(&mut conn, target, EVENTS, scan).await?;
    let with_progress = trace::with_progress(&mut conn, stored).await?;
    let positions: Vec<i64> = with_progress.iter().map(|(event, _)| event.position).collect();
    let relays: Vec<String> =
        with_progress.iter().flat_map(|(_, of_event)| of_event).map(|of| of.relay.clone()).collect();
    let parked: Vec<(i64, String, DateTime<Utc>, DateTime<Utc>)> =
        sqlx::query_as(PARKED).bind(&relays).bind(&positions).fetch_all(&mut *conn).await?;
    let place = format!("outbox {}", outbox.name);
    let way = |(event, of_relays): (StoredEvent, Vec<trace::RelayProgress>)| {
        let mut steps = vec![Step {
            at: event.created_at.to_string().parse().ok(),
            place: place.clone(),
            text: format!("made at position {}", event.position),
            is_trouble: false,
        }];
        for of in of_relays {
            let aside =
                parked.iter().find(|(position, relay, ..)| *position == event.position && *relay == of.relay);
            let state = &*of.state;
            steps.push(Step {
                at: aside.map(|(_, _, parked_at, _)| *parked_at),
                place: format!("{place}, relay {}", of.relay),
                text: match aside {
                    Some((.., last_attempt)) => {
                        format!(
                            "{} (last tried at {})",
                            of.text(event.id),
                            outbox_relay::command::time(Some(*last_attempt))
                        )
                    }
                    None => of.text(event.id),
                },
                is_trouble: !matches!(state, "confirmed" | "settled" | "under way"),
            });
        }
        Way {
            id: event.id,
            type_: event.type_,
            aggregate: (event.aggregate_type, event.aggregate_id),
            version: event.version,
            steps,
            stored: Some((outbox.name.clone(), event.position)),
        }
    };
    Ok(with_progress.into_iter().map(way).collect())
}

async fn in_inbox(
    inbox: &Inbox,
    target: &Target,
    aggregate: Option<&(String, String)>,
) -> sqlx::Result<(Vec<Applied>, Vec<Held>)> {
    let mut conn = inbox.pool.acquire().await?;
    match (target, aggregate) {
        (_, Some((type_, id))) => of_aggregate(&mut conn, inbox, type_, id).await,
        // It is in no outbox of this console. An inbox may still hold it.
        (Target::Event(id), None) => {
            let held: Option<Held> =
                sqlx::query_as(HELD_BY_ID).bind(&inbox.consumer).bind(id).fetch_optional(&mut *conn).await?;
            let Some(held) = held else { return Ok(Default::default()) };
            of_aggregate(&mut conn, inbox, &held.aggregate_type, &held.aggregate_id).await
        }
        (Target::Aggregate(..), None) => Ok(Default::default()),
    }
}

async fn of_aggregate(
    conn: &mut PgConnection,
    inbox: &Inbox,
    type_: &str,
    id: &str,
) -> sqlx::Result<(Vec<Applied>, Vec<Held>)> {
    let applied: Vec<Applied> =
        sqlx::query_as(APPLIED).bind(&inbox.consumer).bind(id).bind(type_).fetch_all(&mut *conn).await?;
    let sources: Vec<&str> = applied.iter().map(|applied| applied.source.as_str()).collect();
    let held = sqlx::query_as(HELD).bind(&inbox.consumer).bind(&sources).bind(type_).bind(id);
    let held = held.fetch_all(conn).await?;
    Ok((applied, held))
}

/// Adds the steps of an inbox to each event, and events that no outbox has but the inbox holds.
fn add(found: &mut Found, place: &str, applied: &[Applied], held: Vec<Held>) {
    for of in applied {
        let text = match of.version {
            0 => {
                format!("has applied nothing of {}/{} from {}", of.aggregate_type, of.aggregate_id, of.source)
            }
            version => format!(
                "is at version {version} of {}/{} from {}",
                of.aggregate_type, of.aggregate_id, of.source
            ),
        };
        let at = (of.version > 0).then_some(of.updated_at);
        found.inboxes.push(Step { at, place: place.to_owned(), text, is_trouble: false });
    }
    if applied.is_empty() && (!found.ways.is_empty()) {
        let text = "has received nothing of this aggregate; perhaps it does not subscribe to it".to_owned();
        found.inboxes.push(Step { at: None, place: place.to_owned(), text, is_trouble: false });
    }
    for way in &mut found.ways {
        let version = applied.iter().map(|of| of.version).max();
        let last = applied.iter().find(|of| of.last_event_id == Some(way.id));
        let step = |at, text: String, is_trouble| Step { at, place: place.to_owned(), text, is_trouble };
        if let Some(held) = held.iter().find(|held| held.event_id == way.id) {
            way.steps.push(step(Some(held.first_at), text_of(held), true));
        } else if let Some(last) = last {
            way.steps.push(step(
                Some(last.updated_at),
                "applied; it is the last one that was".to_owned(),
                false,
            ));
        } else if version.is_some_and(|version| version >= way.version) {
            way.steps.push(step(None, "applied, or covered by a later state".to_owned(), false));
        } else if !applied.is_empty() {
            way.steps.push(step(None, "not received yet".to_owned(), true));
        }
    }
    for held in held {
        if found.ways.iter().all(|way| way.id != held.event_id) {
            let step = Step {
                at: Some(held.first_at),
                place: place.to_owned(),
                text: text_of(&held),
                is_trouble: true,
            };
            found.ways.push(Way {
                id: held.event_id,
                type_: held.type_,
                aggregate: (held.aggregate_type, held.aggregate_id),
                version: held.version,
                steps: vec![step],
                stored: None,
            });
        }
    }
    found.ways.sort_by(|a, b| (&a.aggregate, a.version).cmp(&(&b.aggregate, b.version)));
}

fn text_of(held: &Held) -> String {
    let why = match &*held.reason {
        "gap" => "an earlier version has not arrived".to_owned(),
        "behind" => "an earlier version of its aggregate is refused".to_owned(),
        "trying" => format!("its handler runs; it was tried {} times", held.attempts),
        _ => format!(
            "the handler refused it {} times, at last at {}: {}",
            held.attempts,
            outbox_relay::command::time(Some(held.last_at)),
            held.error.as_deref().unwrap_or_default()
        ),
    };
    format!("held: {why}")
}
