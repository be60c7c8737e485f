//! `trace`: where is this event now?

mod routes;

use std::{collections::HashMap, fmt::Write, str::FromStr, time::Duration};

use anyhow::Context;
use chrono::{DateTime, Utc};
use daemon::{
    config::broker::{BrokerArgs, ManagementArgs},
    progress::Progress,
};
use lapin::types::ShortString;
use serde::Serialize;
use serde_json::json;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, state::Waiting, time};
use crate::{relay::exchange, row::Made, subscribers};
use routes::Routes;

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
    #[arg(value_name = "EVENT-ID|TYPE/ID")]
    pub target: Target,
    /// How many of an aggregate's last events to show.
    #[arg(long, default_value = "20", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    pub limit: i64,
    /// Search all stored events for the id, not only those around the time in a UUIDv7. Reads the whole outbox.
    #[arg(long)]
    pub scan: bool,
    /// The broker, whose virtual host the management API is asked about.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// RabbitMQ's management API: with it, the answer says which queues take the event.
    #[command(flatten)]
    pub management: ManagementArgs,
    /// The exchange that the relay publishes to.
    #[arg(long, env = "EXCHANGE", default_value = "event_dispatcher", value_parser = exchange)]
    pub exchange: ShortString,
}

/// One event, or an aggregate's events.
#[derive(Clone, Debug)]
pub enum Target {
    /// One event.
    Event(Uuid),
    /// An aggregate's events: its type and its id.
    Aggregate(String, String),
}

impl FromStr for Target {
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
pub struct StoredEvent {
    /// Its position.
    pub position: i64,
    /// Its id.
    pub id: Uuid,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// The aggregate's type.
    pub aggregate_type: String,
    /// The aggregate's id.
    pub aggregate_id: String,
    /// The aggregate's version.
    pub version: i64,
    /// When it was made, as its writer says.
    pub created_at: Made,
}

/// How far a relay is with an event, as of the relay's last word.
#[derive(Debug, Serialize, sqlx::FromRow)]
pub struct RelayProgress {
    /// The event's position.
    #[serde(skip)]
    pub position: i64,
    /// The relay name.
    pub relay: String,
    /// `waiting`, `under way`, `waits`, `parked`, `confirmed`, `dropped by hand`, `dropped by rule`; or `settled`,
    /// where it is not known how.
    pub state: String,
    /// Why it was set aside.
    pub detail: Option<String>,
    /// When it is tried again; none by hand only.
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// What the relay said that it waits for, as of its last heartbeat.
    #[sqlx(skip)]
    pub waiting: Vec<Waiting>,
    /// Whether a relay leads that says so.
    #[sqlx(skip)]
    #[serde(rename = "led")]
    pub leads: bool,
}

impl RelayProgress {
    /// What became of the event `id`, for people.
    pub fn text(&self, id: Uuid) -> String {
        match &*self.state {
            "waiting" => format!("not read yet{}", self.reasons()),
            "under way" => format!("read, and not confirmed yet{}", self.reasons()),
            "waits" if self.next_attempt_at.is_none() => {
                "waits behind an earlier event of its aggregate that is not taken".to_owned()
            }
            "waits" => {
                let why = self.detail.as_deref().unwrap_or_default();
                format!("waits, and later events of its aggregate behind it: {why}; tried again by itself")
            }
            "parked" => {
                let next = self.next_attempt_at.map_or_else(
                    || format!("only by hand: outbox-relay parked retry --id {id}"),
                    |at| format!("by itself at {}, or when the oldest of its type is taken", time(Some(at))),
                );
                format!(
                    "set aside: {}; tried again {next}",
                    escape::line(self.detail.as_deref().unwrap_or_default())
                )
            }
            "confirmed" => "confirmed by the broker".to_owned(),
            "dropped by hand" => {
                "given up by hand (outbox-relay parked drop); it was not published".to_owned()
            }
            "dropped by rule" => {
                "no queue took it, and a rule let it go (--unroutable '...=drop'); no subscriber has it"
                    .to_owned()
            }
            _ => {
                "settled, and it is not known how: the relay began after it, or it is too long ago".to_owned()
            }
        }
    }

    /// What its relay waits for, for people.
    fn reasons(&self) -> String {
        if !self.leads {
            return "; no relay of this name leads now".to_owned();
        }
        let reasons: Vec<String> = self.waiting.iter().map(Waiting::text).collect();
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

/// How far each relay is with each of these events. One position after the other, each in its own partition: with
/// `= ANY`, the server looks for every position in every partition that has one of them.
const PROGRESS: &str = "
SELECT of_event.* FROM unnest($1::bigint[]) AS wanted (position)
CROSS JOIN LATERAL (SELECT p.position, p.relay, p.state, p.detail, p.next_attempt_at
                    FROM outbox.event_progress p WHERE p.position = wanted.position OFFSET 0) AS of_event
ORDER BY of_event.relay";

/// What each relay waits for. Asked once, and not for each event: `leads` is a look at the server's lock table.
const RELAYS: &str = "SELECT name, waiting, leads FROM outbox.relay_status";

/// Finds an event, or an aggregate's last ones, and says how far each relay is with it.
pub async fn trace(args: &TraceArgs) -> anyhow::Result<Verdict> {
    let management =
        subscribers::management(&args.management, &args.broker, args.common.database.require_tls)?;
    let mut conn = connect(&args.common, "trace", STATEMENT_TIMEOUT).await?;
    let said = Progress::new("searching the outbox", "event");
    let stored = find(&mut conn, &args.target, args.limit, args.scan).await;
    let stored = stored.context("the outbox could not be searched")?;
    said.step("looking at the relays' progress", "event");
    let events = with_progress(&mut conn, stored).await.context("the relays' progress could not be read")?;
    let routes = match management {
        Some((management, vhost)) if !events.is_empty() => {
            said.step("asking the broker for its bindings", "event");
            Routes::ask(&management, &vhost, &args.exchange).await
        }
        _ => Routes::NotAsked,
    };
    drop(said);
    let document: Vec<_> = events
        .iter()
        .map(|(event, progress)| json!({"event": event, "relays": progress, "routes_now": routes.of(event)}))
        .collect();
    args.common.answer(&json!({"events": document}), || {
        if events.is_empty() {
            return not_found(args);
        }
        events.iter().map(|(event, progress)| text(event, progress) + &routes.text(event)).collect()
    })?;
    Ok(if events.is_empty() { Verdict::Attention } else { Verdict::Ok })
}

/// The stored event, or the last `limit` events of the aggregate, the oldest first. `scan` also finds an id whose time is
/// not that of its row, by reading the whole outbox.
pub async fn find(
    conn: &mut PgConnection,
    target: &Target,
    limit: i64,
    scan: bool,
) -> Result<Vec<StoredEvent>, sqlx::Error> {
    match target {
        Target::Aggregate(type_, id) => {
            let query = sqlx::query_as(BY_AGGREGATE).bind(type_).bind(id).bind(limit);
            let mut events: Vec<StoredEvent> = query.fetch_all(conn).await?;
            events.reverse();
            Ok(events)
        }
        Target::Event(id) => {
            let around = if scan { None } else { created_around(*id) };
            if around.is_none() && !scan {
                return Ok(Vec::new());
            }
            let (from, to) = (around.map(|at| at - AROUND), around.map(|at| at + AROUND));
            sqlx::query_as(BY_ID).bind(id).bind(from).bind(to).fetch_all(conn).await
        }
    }
}

/// Each event with the progress of each relay.
pub async fn with_progress(
    conn: &mut PgConnection,
    stored: Vec<StoredEvent>,
) -> Result<Vec<(StoredEvent, Vec<RelayProgress>)>, sqlx::Error> {
    let mut progress = progress(conn, &stored).await?;
    let with = |event: StoredEvent| {
        let of_event = progress.remove(&event.position).unwrap_or_default();
        (event, of_event)
    };
    Ok(stored.into_iter().map(with).collect())
}

/// By the events' positions.
async fn progress(
    conn: &mut PgConnection,
    events: &[StoredEvent],
) -> Result<HashMap<i64, Vec<RelayProgress>>, sqlx::Error> {
    let relays: Vec<(String, Json<Vec<Waiting>>, bool)> =
        sqlx::query_as(RELAYS).fetch_all(&mut *conn).await?;
    let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
    let rows: Vec<RelayProgress> = sqlx::query_as(PROGRESS).bind(positions).fetch_all(conn).await?;
    let mut progress: HashMap<i64, Vec<RelayProgress>> = HashMap::new();
    for mut row in rows {
        if let Some((_, waiting, leads)) = relays.iter().find(|(name, ..)| *name == row.relay) {
            (row.waiting, row.leads) = (waiting.0.clone(), *leads);
        }
        progress.entry(row.position).or_default().push(row);
    }
    Ok(progress)
}

/// When a UUIDv7 was made.
fn created_around(id: Uuid) -> Option<DateTime<Utc>> {
    let (seconds, nanos) = id.get_timestamp().filter(|_| id.get_version_num() == 7)?.to_unix();
    DateTime::from_timestamp(seconds.try_into().ok()?, nanos)
}

fn not_found(args: &TraceArgs) -> String {
    match &args.target {
        Target::Aggregate(type_, id) => format!(
            "no event of {}/{} is stored here: it belongs to another database, its transaction did \
             not commit, or its partition was retired",
            escape::line(type_),
            escape::line(id)
        ),
        Target::Event(id) => {
            let scanned = "it belongs to another database, its transaction did not commit, or its partition \
                           was retired";
            match created_around(*id) {
                _ if args.scan => format!("event {id} is not stored here: {scanned}"),
                Some(at) => format!(
                    "event {id} is not stored here around {}, when it was made: {scanned}; --scan searches everything",
                    time(Some(at))
                ),
                None => format!(
                    "{id} is not a UUIDv7, so it has no time to search around; --scan searches everything"
                ),
            }
        }
    }
}

fn text(event: &StoredEvent, relays: &[RelayProgress]) -> String {
    let mut text = format!(
        "event {} of type {}\n  of {}/{}, version {}, position {}, made {}\n",
        event.id,
        escape::line(&event.type_),
        escape::line(&event.aggregate_type),
        escape::line(&event.aggregate_id),
        event.version,
        event.position,
        event.created_at
    );
    for progress in relays {
        let said = progress.text(event.id);
        let _ = writeln!(text, "  relay {}: {said}", progress.relay);
    }
    if relays.is_empty() {
        text.push_str("  no relay has run on this database yet\n");
    }
    text
}
