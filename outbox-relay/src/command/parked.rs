//! `parked`: what was set aside, why, and what is to become of it.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use outbox::database::again;
use serde::Serialize;
use serde_json::json;
use shown::shown;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, many, not_done, state, status::time};
use crate::{
    config::{STATEMENT_TIMEOUT, relay_name},
    row::Made,
    rules::matches,
    session::MAX_DROPPED,
    waiting,
};

/// Settings of `parked`.
#[derive(Debug, clap::Args)]
pub struct ParkedArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Which relay.
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
    /// Have the relay try them now. Events that no queue takes are tried with all others of their type.
    Retry(Selection),
    /// Give them up: they are never published. Receivers that follow versions will miss them. Of events that wait, the
    /// first of each aggregate can be chosen; then the next one is tried.
    Drop {
        /// Which ones.
        #[command(flatten)]
        selection: Selection,
        /// Do it; without this it is only said what would be dropped, with exit code 3.
        #[arg(long)]
        yes: bool,
    },
}

/// Which events.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Selection {
    /// The event of this id; may be repeated.
    #[arg(long, value_name = "UUID")]
    pub id: Vec<Uuid>,
    /// Events of types that match, as in a topic binding: `score.*`.
    #[arg(long = "type", value_name = "PATTERN")]
    pub type_: Option<String>,
    /// Events with this reason.
    #[arg(long, value_parser = ["unroutable", "refused", "nacked", "silent"])]
    pub reason: Option<String>,
    /// All of them.
    #[arg(long, conflicts_with_all = ["id", "type_", "reason"])]
    pub all: bool,
}

/// An event that is aside.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
struct Aside {
    position: i64,
    id: Uuid,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    type_: String,
    /// `parked`, or `waiting`: then later events of its aggregate wait behind it.
    state: String,
    reason: String,
    detail: String,
    attempts: i32,
    created_at: Made,
    parked_at: DateTime<Utc>,
    last_attempt_at: DateTime<Utc>,
    /// None: only by hand.
    next_attempt_at: Option<DateTime<Utc>>,
}

/// Events of a type that wait.
#[derive(Debug, Serialize, sqlx::FromRow)]
struct Waiting {
    #[sqlx(rename = "type")]
    #[serde(rename = "type")]
    type_: String,
    events: i64,
    since: DateTime<Utc>,
    /// Why the first of them was not taken; none when it was not tried yet.
    detail: Option<String>,
    next_attempt_at: Option<DateTime<Utc>>,
}

/// What waits, by type.
const WAITING: &str = "
SELECT type, count(*) AS events, min(parked_at) AS since, min(detail) FILTER (WHERE detail <> '') AS detail,
       min(next_attempt_at) AS next_attempt_at
FROM outbox.parked WHERE relay = $1 AND state = 'waiting' GROUP BY type ORDER BY type";

impl Selection {
    fn takes(&self, event: &Aside) -> bool {
        (self.id.is_empty() || self.id.contains(&event.id))
            && self.type_.as_ref().is_none_or(|pattern| matches(pattern, &event.type_))
            && self.reason.as_ref().is_none_or(|reason| *reason == event.reason)
    }
}

/// Looks at what is aside, or changes it.
pub async fn parked(args: &ParkedArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "parked", STATEMENT_TIMEOUT).await?;
    state::known(&mut conn, &args.name).await?;
    // Without bodies; as many rows as --max-parked allows, and of what waits, the first of each aggregate.
    let sql =
        "SELECT position, id, aggregate_type, aggregate_id, version, type, state, reason, detail, attempts,
                      created_at, parked_at, last_attempt_at, next_attempt_at
               FROM outbox.parked
               WHERE relay = $1 AND (state = 'parked' OR next_attempt_at IS NOT NULL)
               ORDER BY position LIMIT 100000";
    let mut events: Vec<Aside> = sqlx::query_as(sql)
        .bind(&args.name)
        .fetch_all(&mut conn)
        .await
        .context("what is set aside could not be read")?;
    match &args.action {
        ParkedAction::List => {
            let waiting = sqlx::query_as(WAITING).bind(&args.name).fetch_all(&mut conn).await;
            events.retain(|event| event.state == "parked");
            list(args, &events, &waiting.context("what waits could not be read")?)
        }
        ParkedAction::Show { id } => show(args, &events, *id),
        ParkedAction::Retry(selection) => retry(args, &mut conn, &select(events, selection)).await,
        ParkedAction::Drop { selection, yes } => {
            drop(args, &mut conn, &select(events, selection), *yes).await
        }
    }
}

fn select(mut events: Vec<Aside>, selection: &Selection) -> Vec<Aside> {
    events.retain(|event| selection.takes(event));
    events
}

/// By reason, type and what was said, with the oldest of each, which is the one that is tried.
fn list(args: &ParkedArgs, events: &[Aside], waiting: &[Waiting]) -> anyhow::Result<Verdict> {
    let mut groups: BTreeMap<(&str, &str, &str), (usize, &Aside)> = BTreeMap::new();
    for event in events {
        // What was refused says the event's own id.
        let detail = if event.reason == "refused" { "" } else { &*event.detail };
        groups.entry((&event.reason, &event.type_, detail)).or_insert((0, event)).0 += 1;
    }
    let answer: Vec<_> = groups
        .iter()
        .map(|((reason, type_, _), (count, oldest))| {
            json!({"reason": reason, "type": type_, "events": count, "detail": oldest.detail,
                   "oldest": oldest.id, "oldest_parked_at": oldest.parked_at,
                   "attempts": oldest.attempts, "next_attempt_at": oldest.next_attempt_at})
        })
        .collect();
    let told = json!({"relay": args.name, "events": events.len(), "groups": answer, "waiting": waiting});
    args.common.answer(&told, || {
        if groups.is_empty() && waiting.is_empty() {
            return format!("{}: nothing is set aside", args.name);
        }
        let mut text = format!("{}: {} set aside\n", args.name, many(count(events), "event"));
        for ((reason, type_, _), (count, oldest)) in &groups {
            let _ = writeln!(
                text,
                "  {count} of type {}, {reason}, the oldest since {}: {}\n    {}",
                shown(type_),
                time(Some(oldest.parked_at)),
                shown(&oldest.detail),
                next(oldest)
            );
        }
        for kind in waiting {
            let _ = writeln!(
                text,
                "  {} of type {} waiting, and later events of their aggregates behind them, the oldest since {}: {}",
                kind.events,
                kind.type_,
                time(Some(kind.since)),
                kind.detail.as_deref().unwrap_or("not tried yet")
            );
        }
        text
    })?;
    Ok(if events.is_empty() && waiting.is_empty() { Verdict::Well } else { Verdict::NotWell })
}

fn show(args: &ParkedArgs, events: &[Aside], id: Uuid) -> anyhow::Result<Verdict> {
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
            shown(&event.type_),
            event.position,
            shown(&event.aggregate_type),
            shown(&event.aggregate_id),
            event.version,
            event.created_at,
            if event.state == "waiting" { "waiting since" } else { "set aside" },
            time(Some(event.parked_at)),
            event.reason,
            shown(&event.detail),
            next(event)
        )
    })?;
    Ok(Verdict::Well)
}

async fn retry(args: &ParkedArgs, conn: &mut PgConnection, events: &[Aside]) -> anyhow::Result<Verdict> {
    let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
    // The relay tries the oldest of what no queue takes, of each type, before the others: so all of a kind
    // are due with any of them.
    let sql = "UPDATE outbox.parked p SET next_attempt_at = now()
               WHERE relay = $1
                 AND (position = ANY ($2)
                      OR reason = 'unroutable' AND state = 'parked'
                         AND EXISTS (SELECT FROM outbox.parked s
                                     WHERE s.relay = $1 AND s.position = ANY ($2) AND s.reason = 'unroutable'
                                       AND s.type = p.type AND s.aggregate_type = p.aggregate_type))";
    let due = again(async || sqlx::query(sql).bind(&args.name).bind(&positions).execute(&mut *conn).await)
        .await
        .map_err(|error| not_done(error, "nothing was changed"))?
        .rows_affected();
    args.common.answer(&json!({"relay": args.name, "selected": events.len(), "due": due}), || {
        if due == 0 {
            return "nothing that is set aside matches".to_owned();
        }
        let due = many(i64::try_from(due).unwrap_or(i64::MAX), "event");
        format!("{due} will be tried within about a second, if a relay leads (outbox-relay status)")
    })?;
    Ok(Verdict::Well)
}

async fn drop(
    args: &ParkedArgs,
    conn: &mut PgConnection,
    events: &[Aside],
    yes: bool,
) -> anyhow::Result<Verdict> {
    let positions: Vec<i64> = events.iter().map(|event| event.position).collect();
    if yes {
        // Dropped, and noted, so that trace can tell what became of them.
        let sql = "WITH gone AS (SELECT unnest($2::bigint[]) AS position)
                   UPDATE outbox.relay SET dropped_by_hand = (
                       SELECT range_agg(range) FROM (
                           SELECT range FROM unnest(dropped_by_hand + (SELECT range_agg(int8range(position, position, '[]'))
                                                                       FROM gone)) AS o (range)
                           ORDER BY range DESC LIMIT $3) newest)
                   WHERE name = $1 AND EXISTS (SELECT FROM gone)";
        let dropped = again(async || {
            let mut tx = conn.begin().await?;
            waiting::remove_rows(&mut tx, &args.name, &positions).await?;
            sqlx::query(sql).bind(&args.name).bind(&positions).bind(MAX_DROPPED).execute(&mut *tx).await?;
            tx.commit().await
        });
        dropped.await.map_err(|error| not_done(error, "nothing was dropped"))?;
        for event in events {
            tracing::warn!(relay = args.name, event = %event.id, type_ = event.type_, "dropped by hand");
        }
    }
    let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
    args.common.answer(&json!({"relay": args.name, "dropped": yes, "events": ids}), || {
        let events = many(count(events), "event");
        if ids.is_empty() {
            "nothing that is set aside matches".to_owned()
        } else if yes {
            format!("{events} dropped")
        } else {
            format!("{events} would be dropped and never published; say --yes to do it")
        }
    })?;
    Ok(if yes || ids.is_empty() { Verdict::Well } else { Verdict::NotWell })
}

/// What happens next.
fn next(event: &Aside) -> String {
    let tried = format!("tried {}", many(event.attempts, "time"));
    match event.next_attempt_at {
        Some(at) => format!("{tried}; next, by itself, at {}", time(Some(at))),
        None => format!("{tried}; next only by hand: outbox-relay parked retry --id {}", event.id),
    }
}

fn count(events: &[Aside]) -> i64 {
    i64::try_from(events.len()).unwrap_or(i64::MAX)
}
