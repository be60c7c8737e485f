//! `parked`: what was set aside, why, and what is to become of it.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use daemon::progress::Progress;
use outbox::database::{Attempts, is_conflict};
use serde::Serialize;
use serde_json::json;
use sqlx::{Connection, PgConnection, QueryBuilder};
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, many, not_done, state, time};
use crate::{
    config::{STATEMENT_TIMEOUT, relay_name},
    row::Made,
    rules::matches,
    session::MAX_DROPPED,
    waiting,
};

/// No more events are named one by one when they are dropped.
const NAMED: usize = 20;

/// Settings of `parked`.
#[derive(Debug, clap::Args)]
pub struct ParkedArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The relay's name.
    #[arg(long, global = true, env = "RELAY_NAME", default_value = "default", value_parser = relay_name)]
    pub name: String,
    /// What to do.
    #[command(subcommand)]
    pub action: ParkedAction,
}

/// What to do with events that were set aside.
#[derive(Debug, clap::Subcommand)]
pub enum ParkedAction {
    /// List them by reason and type; exit code 3 when there are any.
    List,
    /// Show one, without its body.
    Show {
        /// The event's id.
        id: Uuid,
    },
    /// Try them again now. Events that no queue takes are tried with all others of their type.
    Retry(Selection),
    /// Give them up: they are never published, and subscribers that follow versions miss them. Of events that wait,
    /// choose the first of each aggregate; then the next one is tried.
    Drop {
        /// Which ones.
        #[command(flatten)]
        selection: Selection,
        /// Drop them. Without this, the command only says what it would drop, with exit code 3.
        #[arg(long)]
        yes: bool,
    },
}

/// Which events.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Selection {
    /// The event of this id; may be repeated.
    #[arg(long, value_name = "UUID")]
    pub id: Vec<Uuid>,
    /// Events of types that match, as in a topic binding: `order.*`.
    #[arg(long = "type", value_name = "PATTERN")]
    pub type_: Option<String>,
    /// Events with this reason.
    #[arg(long, value_parser = ["unroutable", "refused", "nacked", "silent"])]
    pub reason: Option<String>,
    /// All of them.
    #[arg(long, conflicts_with_all = ["id", "type_", "reason"])]
    pub all: bool,
}

/// An event that is set aside, or waits.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct ParkedEvent {
    /// Its position.
    pub position: i64,
    /// Its id.
    pub id: Uuid,
    /// The aggregate's type.
    pub aggregate_type: String,
    /// The aggregate's id.
    pub aggregate_id: String,
    /// The aggregate's version.
    pub version: i64,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// `parked`, or `waiting`: then later events of its aggregate wait behind it.
    pub state: String,
    /// `unroutable`, `refused`, `nacked` or `silent`.
    pub reason: String,
    /// The broker's words.
    pub detail: String,
    /// How often it was tried.
    pub attempts: i32,
    /// When it was made, as its writer says.
    pub created_at: Made,
    /// When it was set aside.
    pub parked_at: DateTime<Utc>,
    /// When it was last tried.
    pub last_attempt_at: DateTime<Utc>,
    /// None: only by hand.
    pub next_attempt_at: Option<DateTime<Utc>>,
}

/// Events of a type that wait.
#[derive(Debug, Serialize, sqlx::FromRow)]
pub struct WaitingType {
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// How many.
    pub events: i64,
    /// Since when the first of them waits.
    pub since: DateTime<Utc>,
    /// Why the first of them was not taken; none when it was not tried yet.
    pub detail: Option<String>,
    /// When one of them is tried next.
    pub next_attempt_at: Option<DateTime<Utc>>,
}

/// Events that are set aside for the same reason, with the oldest of them, which is the one that is tried.
#[derive(Debug, Serialize, sqlx::FromRow)]
pub struct Group {
    /// `unroutable`, `refused`, `nacked` or `silent`.
    pub reason: String,
    /// The event type.
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    pub type_: String,
    /// How many.
    pub events: i64,
    /// The broker's words for the oldest.
    pub detail: String,
    /// The oldest.
    pub oldest: Uuid,
    /// When that was set aside.
    pub oldest_parked_at: DateTime<Utc>,
    /// How often that was tried.
    pub attempts: i32,
    /// When that is tried again; none by hand only.
    pub next_attempt_at: Option<DateTime<Utc>>,
}

const GROUPS: &str = "
SELECT g.reason, g.type, g.events, o.detail, o.id AS oldest, o.parked_at AS oldest_parked_at, o.attempts,
       o.next_attempt_at
FROM outbox.parked_group g JOIN outbox.parked_event o ON o.relay = g.relay AND o.position = g.oldest_position
WHERE g.relay = $1 AND g.state = 'parked'
ORDER BY g.reason COLLATE \"C\", g.type COLLATE \"C\", g.detail COLLATE \"C\"";

/// What waits, by type. Reads all of it.
const WAITING: &str = "
SELECT type, sum(events)::bigint AS events, min(since) AS since, min(detail) FILTER (WHERE detail <> '') AS detail,
       min(next_attempt_at) AS next_attempt_at
FROM outbox.parked_group WHERE relay = $1 AND state = 'waiting' GROUP BY type ORDER BY type";

/// What can be chosen: what is set aside (at most as many as `--max-parked` allows), and of what waits, the first event
/// of each aggregate.
const EVENTS: &str = "
SELECT position, id, aggregate_type, aggregate_id, version, type, state, reason, detail, attempts, created_at, parked_at,
       last_attempt_at, next_attempt_at
FROM outbox.parked_event
WHERE (state = 'parked' OR next_attempt_at IS NOT NULL) AND relay = ";

/// Notes what was dropped, so that trace can tell what became of it.
const DROPPED: &str = "
WITH gone AS (SELECT unnest($2::bigint[]) AS position)
UPDATE outbox.relay SET dropped_by_hand = (
    SELECT range_agg(range) FROM (
        SELECT range FROM unnest(dropped_by_hand + (SELECT range_agg(int8range(position, position, '[]')) FROM gone)) AS o (range)
        ORDER BY range DESC LIMIT $3) newest)
WHERE name = $1 AND EXISTS (SELECT FROM gone)";

impl Selection {
    fn includes(&self, event: &ParkedEvent) -> bool {
        (self.id.is_empty() || self.id.contains(&event.id))
            && self.type_.as_ref().is_none_or(|pattern| matches(pattern, &event.type_))
            && self.reason.as_ref().is_none_or(|reason| *reason == event.reason)
    }
}

/// Looks at what is aside, or changes it.
pub async fn parked(args: &ParkedArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "parked", STATEMENT_TIMEOUT).await?;
    state::known(&mut conn, &args.name).await?;
    let said = Progress::new("reading what is set aside", "event");
    match &args.action {
        ParkedAction::List => list(args, &mut conn, said).await,
        ParkedAction::Show { id } => {
            let events = events(&mut conn, &args.name, &[*id]).await?;
            drop(said);
            show(args, &events, *id)
        }
        ParkedAction::Retry(selection) => {
            let events = selected(&mut conn, &args.name, selection).await?;
            retry(args, &mut conn, &events, said).await
        }
        ParkedAction::Drop { selection, yes } => {
            let events = selected(&mut conn, &args.name, selection).await?;
            give_up(args, &mut conn, &events, *yes, said).await
        }
    }
}

/// What of the relay called `name` matches: events that are set aside, and of what waits the first event of each
/// aggregate. At most 100,000 are looked at, the oldest first.
pub async fn selected(
    conn: &mut PgConnection,
    name: &str,
    selection: &Selection,
) -> anyhow::Result<Vec<ParkedEvent>> {
    let mut events = events(conn, name, &selection.id).await?;
    events.retain(|event| selection.includes(event));
    Ok(events)
}

/// Those with these ids, by the index `parked_id`; all without ids.
async fn events(conn: &mut PgConnection, name: &str, ids: &[Uuid]) -> anyhow::Result<Vec<ParkedEvent>> {
    let mut sql = QueryBuilder::new(EVENTS);
    sql.push_bind(name);
    if !ids.is_empty() {
        sql.push(" AND id = ANY (").push_bind(ids).push(")");
    }
    sql.push(" ORDER BY position LIMIT 100000");
    let events = sql.build_query_as().fetch_all(conn).await;
    events.context("what is set aside could not be read")
}

/// What the relay called `name` set aside, by reason and type.
pub async fn groups(conn: &mut PgConnection, name: &str) -> anyhow::Result<Vec<Group>> {
    sqlx::query_as(GROUPS).bind(name).fetch_all(conn).await.context("what is set aside could not be read")
}

/// By reason, type and detail.
async fn list(args: &ParkedArgs, conn: &mut PgConnection, said: Progress) -> anyhow::Result<Verdict> {
    let groups = groups(conn, &args.name).await?;
    let waiting = sqlx::query_as(WAITING).bind(&args.name).fetch_all(conn).await;
    let waiting: Vec<WaitingType> = waiting.context("what waits could not be read")?;
    drop(said);
    let events: i64 = groups.iter().map(|group| group.events).sum();
    let document = json!({"relay": args.name, "events": events, "groups": groups, "waiting": waiting});
    args.common.answer(&document, || {
        if groups.is_empty() && waiting.is_empty() {
            return format!("{}: nothing is set aside", args.name);
        }
        let mut text = format!("{}: {} set aside\n", args.name, many(events, "event"));
        for group in &groups {
            let Group { reason, type_, events, detail, oldest, oldest_parked_at, attempts, next_attempt_at } = group;
            let _ = writeln!(
                text,
                "  {events} of type {}, {reason}, the oldest since {}: {}\n    {}",
                escape::line(type_),
                time(Some(*oldest_parked_at)),
                escape::line(detail),
                next(*oldest, *attempts, *next_attempt_at)
            );
        }
        for of_type in &waiting {
            let _ = writeln!(
                text,
                "  {} of type {} waiting, and later events of their aggregates behind them, the oldest since {}: {}",
                of_type.events,
                of_type.type_,
                time(Some(of_type.since)),
                of_type.detail.as_deref().unwrap_or("not tried yet")
            );
        }
        text
    })?;
    Ok(if groups.is_empty() && waiting.is_empty() { Verdict::Ok } else { Verdict::Attention })
}

fn show(args: &ParkedArgs, events: &[ParkedEvent], id: Uuid) -> anyhow::Result<Verdict> {
    let Some(event) = events.iter().find(|event| event.id == id) else {
        bail!(
            "the relay {} has set no event {id} aside; outbox-relay parked list shows what it has",
            args.name
        )
    };
    args.common.answer(event, || {
        format!(
            "event {} of type {}, position {}\n  of {}/{}, version {}, made {}\n  {} {} as {}: {}\n  {}",
            event.id,
            escape::line(&event.type_),
            event.position,
            escape::line(&event.aggregate_type),
            escape::line(&event.aggregate_id),
            event.version,
            event.created_at,
            if event.state == "waiting" { "waiting since" } else { "set aside" },
            time(Some(event.parked_at)),
            event.reason,
            escape::line(&event.detail),
            next(event.id, event.attempts, event.next_attempt_at)
        )
    })?;
    Ok(Verdict::Ok)
}

/// Makes these events of the relay called `name` due now. Returns how many are due: where no queue takes them, all others
/// of their type with them.
pub async fn make_due(conn: &mut PgConnection, name: &str, events: &[ParkedEvent]) -> anyhow::Result<u64> {
    let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
    // The relay tries the oldest of what no queue takes, of each type, before the others: so all of a kind
    // are due with any of them.
    let sql = "UPDATE outbox.parked p SET next_attempt_at = now()
               WHERE relay = $1
                 AND (position = ANY ($2)
                      OR reason = 'unroutable' AND state = 'parked'
                         AND (type, aggregate_type) IN (
                             SELECT DISTINCT s.type, s.aggregate_type FROM outbox.parked s
                             WHERE s.relay = $1 AND s.position = ANY ($2) AND s.reason = 'unroutable'))";
    // Not `again`, whose closure would keep the future from being sent to another thread.
    let mut attempts = Attempts::default();
    loop {
        let due = sqlx::query(sql).bind(name).bind(&positions).execute(&mut *conn).await;
        if is_conflict(&due) && attempts.again().await {
            continue;
        }
        return Ok(due.map_err(|error| not_done(error, "nothing was changed"))?.rows_affected());
    }
}

/// Drops these events of the relay called `name`: they are never published. `trace` tells it of the newest of them.
pub async fn drop_events(conn: &mut PgConnection, name: &str, events: &[ParkedEvent]) -> anyhow::Result<()> {
    let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
    let mut attempts = Attempts::default();
    loop {
        let dropped = drop_rows(conn, name, &positions).await;
        if is_conflict(&dropped) && attempts.again().await {
            continue;
        }
        dropped.map_err(|error| not_done(error, "nothing was dropped"))?;
        break;
    }
    note(name, events, &types(events));
    Ok(())
}

async fn drop_rows(conn: &mut PgConnection, name: &str, positions: &[i64]) -> Result<(), sqlx::Error> {
    let mut tx = conn.begin().await?;
    waiting::remove_rows(&mut tx, name, positions).await?;
    sqlx::query(DROPPED).bind(name).bind(positions).bind(MAX_DROPPED).execute(&mut *tx).await?;
    tx.commit().await
}

async fn retry(
    args: &ParkedArgs,
    conn: &mut PgConnection,
    events: &[ParkedEvent],
    said: Progress,
) -> anyhow::Result<Verdict> {
    said.step("making them due", "event");
    let due = make_due(conn, &args.name, events).await?;
    drop(said);
    args.common.answer(&json!({"relay": args.name, "selected": events.len(), "due": due}), || {
        if due == 0 {
            return "nothing that is set aside matches".to_owned();
        }
        let due = many(i64::try_from(due).unwrap_or(i64::MAX), "event");
        format!("{due} will be tried within about a second, if a relay leads (outbox-relay status)")
    })?;
    Ok(Verdict::Ok)
}

async fn give_up(
    args: &ParkedArgs,
    conn: &mut PgConnection,
    events: &[ParkedEvent],
    yes: bool,
    said: Progress,
) -> anyhow::Result<Verdict> {
    if yes {
        said.step("dropping them", "event");
        drop_events(conn, &args.name, events).await?;
    }
    drop(said);
    let named: Vec<Uuid> = events.iter().take(NAMED).map(|event| event.id).collect();
    let document = json!({
        "relay": args.name, "dropped": yes, "count": events.len(), "types": types(events), "events": named,
    });
    args.common.answer(&document, || {
        let events = many(count(events), "event");
        if named.is_empty() {
            "nothing that is set aside matches".to_owned()
        } else if yes {
            format!("{events} dropped")
        } else {
            format!("{events} would be dropped, and never published; add --yes to do it")
        }
    })?;
    Ok(if yes || named.is_empty() { Verdict::Ok } else { Verdict::Attention })
}

/// How many events of each type.
fn types(events: &[ParkedEvent]) -> BTreeMap<&str, usize> {
    let mut types = BTreeMap::new();
    for event in events {
        *types.entry(&*event.type_).or_default() += 1;
    }
    types
}

/// For the audit: a few each for itself, more of them by their type and positions.
fn note(relay: &str, events: &[ParkedEvent], types: &BTreeMap<&str, usize>) {
    if events.len() <= NAMED {
        for event in events {
            tracing::warn!(relay, event = %event.id, type_ = event.type_, "dropped by hand");
        }
        return;
    }
    for (type_, count) in types {
        let mut positions = events.iter().filter(|event| event.type_ == *type_).map(|event| event.position);
        let first = positions.next();
        let last = positions.next_back().or(first);
        tracing::warn!(relay, type_, events = count, first, last, "dropped by hand");
    }
}

/// How often the event was tried, and when it is tried next.
fn next(id: Uuid, attempts: i32, next_attempt_at: Option<DateTime<Utc>>) -> String {
    let tried = format!("tried {}", many(attempts, "time"));
    match next_attempt_at {
        Some(at) => format!("{tried}; next, by itself, at {}", time(Some(at))),
        None => format!("{tried}; next only by hand: outbox-relay parked retry --id {id}"),
    }
}

fn count(events: &[ParkedEvent]) -> i64 {
    i64::try_from(events.len()).unwrap_or(i64::MAX)
}
