//! `parked`: what was set aside, why, and what is to become of it.

use std::{collections::BTreeMap, fmt::Write};

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, many, state, status::time};
use crate::{
    config::{STATEMENT_TIMEOUT, relay_name},
    unroutable::matches,
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
    /// Give them up: they are never published. Receivers that follow versions will miss them.
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
    #[arg(long, value_parser = ["unroutable", "refused"])]
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
    reason: String,
    detail: String,
    attempts: i32,
    created_at: DateTime<Utc>,
    parked_at: DateTime<Utc>,
    last_attempt_at: DateTime<Utc>,
    /// None: only by hand.
    next_attempt_at: Option<DateTime<Utc>>,
}

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
    // Without bodies; as many rows as --max-parked allows, by the primary key.
    let sql = "SELECT position, id, aggregate_type, aggregate_id, version, type, reason, detail, attempts,
                      created_at, parked_at, last_attempt_at, next_attempt_at
               FROM outbox.parked WHERE relay = $1 ORDER BY position";
    let events: Vec<Aside> = sqlx::query_as(sql)
        .bind(&args.name)
        .fetch_all(&mut conn)
        .await
        .context("what is set aside could not be read")?;
    match &args.action {
        ParkedAction::List => list(args, &events),
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
fn list(args: &ParkedArgs, events: &[Aside]) -> anyhow::Result<Verdict> {
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
    args.common.answer(&json!({"relay": args.name, "events": events.len(), "groups": answer}), || {
        if groups.is_empty() {
            return format!("{}: nothing is set aside", args.name);
        }
        let mut text = format!("{}: {} set aside\n", args.name, many(count(events), "event"));
        for ((reason, type_, _), (count, oldest)) in &groups {
            let _ = writeln!(
                text,
                "  {count} of type {type_}, {reason}, the oldest since {}: {}\n    {}",
                time(Some(oldest.parked_at)),
                oldest.detail,
                next(oldest)
            );
        }
        text
    })?;
    Ok(if events.is_empty() { Verdict::Well } else { Verdict::NotWell })
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
            "event {} of type {}, position {}\n  of {}/{}, version {}, made {}\n  set aside {} as {}: {}\n  {}",
            event.id,
            event.type_,
            event.position,
            event.aggregate_type,
            event.aggregate_id,
            event.version,
            time(Some(event.created_at)),
            time(Some(event.parked_at)),
            event.reason,
            event.detail,
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
                      OR reason = 'unroutable'
                         AND EXISTS (SELECT FROM outbox.parked s
                                     WHERE s.relay = $1 AND s.position = ANY ($2) AND s.reason = 'unroutable'
                                       AND s.type = p.type AND s.aggregate_type = p.aggregate_type))";
    let due = sqlx::query(sql)
        .bind(&args.name)
        .bind(&positions)
        .execute(conn)
        .await
        .context("nothing was changed")?
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
        sqlx::query("DELETE FROM outbox.parked WHERE relay = $1 AND position = ANY ($2)")
            .bind(&args.name)
            .bind(&positions)
            .execute(conn)
            .await
            .context("nothing was dropped")?;
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
