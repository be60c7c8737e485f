//! `held`: which events wait, why, and what is to become of them.

use std::{
    fmt::Write,
    io::IsTerminal,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use inbox::{
    Redrive, Redriven, Redrives, Sequencer, Skip,
    held::{self, Filter, Group, Groups, HeldEvent, Shown, Skipped},
};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{CommandArgs, STATEMENT_TIMEOUT, Verdict, Which, aggregate, connect, many, operator, time};
use crate::{model::Model, projection::Projection};

/// How often a long redrive says how far it is.
const REPORT: Duration = Duration::from_secs(1);

/// Settings of `held`.
#[derive(Debug, clap::Args)]
pub struct HeldArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// Which read model.
    #[command(flatten)]
    pub which: Which,
    /// What to do.
    #[command(subcommand)]
    pub action: HeldAction,
}

/// What to do with events that wait.
#[derive(Debug, clap::Subcommand)]
pub enum HeldAction {
    /// List them by what they wait for; exit code 3 when there are any.
    List(ListArgs),
    /// Show one, without its body.
    Show {
        /// The event's id.
        id: Uuid,
        /// With its body, and whatever personal data is in it.
        #[arg(long)]
        body: bool,
    },
    /// Apply them again, in order, with this program's handler: the event that stops its aggregate first, then
    /// what waits behind it. Exit code 3 when one is refused again.
    Redrive(RedriveArgs),
    /// Give up the event that stops its aggregate: its version counts and it does nothing, which is recorded.
    /// Then what waits behind it is applied.
    Skip(SkipArgs),
}

/// Settings of `held list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// List event by event, in the order of their making.
    #[arg(long)]
    pub events: bool,
    /// Events of this aggregate: TYPE/ID.
    #[arg(long, value_parser = aggregate, requires = "events")]
    pub aggregate: Option<(String, String)>,
    /// Events with this reason.
    #[arg(long, value_parser = ["gap", "poison", "trying", "behind"], requires = "events")]
    pub reason: Option<String>,
    /// Events with an error that contains this.
    #[arg(long, value_name = "TEXT", requires = "events")]
    pub error: Option<String>,
    /// Events after the one with this id.
    #[arg(long, value_name = "UUID", requires = "events")]
    pub after: Option<Uuid>,
    /// How many causes, or events.
    #[arg(long, default_value = "50", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    pub limit: i64,
}

/// Settings of `held redrive`.
#[derive(Debug, clap::Args)]
pub struct RedriveArgs {
    /// Which ones.
    #[command(flatten)]
    pub selection: Selection,
    /// How many events one transaction applies at most.
    #[arg(long, default_value = "64", value_parser = batch)]
    pub batch: usize,
    /// Call the handler, roll back, and say what would become of each; of one aggregate no further than one
    /// transaction goes.
    #[arg(long)]
    pub dry_run: bool,
}

/// Which aggregates; all conditions hold.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Selection {
    /// This one: TYPE/ID.
    #[arg(long, value_parser = aggregate)]
    pub aggregate: Option<(String, String)>,
    /// Those that are stopped for this reason.
    #[arg(long, value_parser = ["poison", "trying"])]
    pub reason: Option<String>,
    /// Those that are stopped by an error that contains this.
    #[arg(long, value_name = "TEXT")]
    pub error: Option<String>,
    /// All of them.
    #[arg(long, conflicts_with_all = ["aggregate", "reason", "error"])]
    pub all: bool,
}

/// Settings of `held skip`.
#[derive(Debug, clap::Args)]
pub struct SkipArgs {
    /// The event's id.
    #[arg(long, value_name = "UUID", required_unless_present = "aggregate")]
    pub event: Option<Uuid>,
    /// Or its aggregate: TYPE/ID.
    #[arg(long, value_parser = aggregate, requires = "version", conflicts_with = "event")]
    pub aggregate: Option<(String, String)>,
    /// And its version of that.
    #[arg(long, requires = "aggregate")]
    pub version: Option<i64>,
    /// Who says so; USER at this host, unless told.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub by: Option<String>,
    /// And why. Both are recorded for good: no personal data.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub why: String,
    /// How many events one transaction applies at most.
    #[arg(long, default_value = "64", value_parser = batch)]
    pub batch: usize,
    /// Do it; without this it is tried and rolled back, and said what would be done, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

fn batch(text: &str) -> Result<usize, &'static str> {
    text.parse().ok().filter(|batch| (1..=10_000).contains(batch)).ok_or("it should be from 1 to 10000")
}

/// Looks at what is held, or brings it on.
pub async fn held(args: &HeldArgs) -> anyhow::Result<Verdict> {
    let (mut conn, consumer) = connect(&args.common, "held", args.which, STATEMENT_TIMEOUT).await?;
    match &args.action {
        HeldAction::List(list) if list.events => list_events(args, &mut conn, &consumer, list).await,
        HeldAction::List(list) => {
            let groups = held::groups(&mut conn, &consumer, list.limit).await.context("it cannot be read")?;
            args.common.answer(&json!({"consumer": consumer, "held": groups}), || {
                causes(&consumer, &groups, args.which)
            })?;
            Ok(if groups.events == 0 { Verdict::Ok } else { Verdict::Attention })
        }
        HeldAction::Show { id, body } => show(args, &mut conn, &consumer, *id, *body).await,
        HeldAction::Redrive(redrive) => {
            drop(conn);
            let answer = sequencer(args, consumer)?.redrive(&request(redrive), progress()).await?;
            args.common.answer(&answer, || redriven(&answer, redrive.dry_run))?;
            Ok(if answer.refused == 0 { Verdict::Ok } else { Verdict::Attention })
        }
        HeldAction::Skip(skip) => {
            let event = chosen(&mut conn, &consumer, skip).await?;
            drop(conn);
            self::skip(args, &sequencer(args, consumer)?, &event, skip).await
        }
    }
}

/// What applies events in `run` does it here, too. Nobody is woken: the relay and the readers look by themselves.
fn sequencer(args: &HeldArgs, consumer: String) -> anyhow::Result<Sequencer<Projection>> {
    let database = args.common.database.options("score-projector held", STATEMENT_TIMEOUT)?;
    let role = args.which.role();
    let pool = role.options(database).pool(2);
    let model = Model::new(role, consumer, None);
    Ok(Sequencer::new(model.consumer().to_owned(), pool, Projection::new(model)))
}

fn request(args: &RedriveArgs) -> Redrive {
    let Selection { aggregate, reason, error, .. } = &args.selection;
    let filter = Filter { aggregate: aggregate.clone(), reason: reason.clone(), error: error.clone() };
    Redrive { filter, batch: args.batch, dry_run: args.dry_run }
}

/// How far it is, once a second, for whoever watches.
fn progress() -> impl FnMut(&Redrives) {
    let mut reported = Instant::now();
    move |all| {
        if reported.elapsed() >= REPORT && std::io::stderr().is_terminal() {
            reported = Instant::now();
            eprint!(
                "\r{} aggregates, {} events applied, {} refused",
                all.aggregates, all.applied, all.refused
            );
        }
    }
}

fn causes(consumer: &str, held: &Groups, which: Which) -> String {
    if held.events == 0 {
        return format!("{consumer}: nothing is held");
    }
    let mut text = format!("{consumer}: {} held\n", many(held.events, "event"));
    for group in &held.groups {
        let Group { reason, events, aggregates, first_at, oldest, version, .. } = group;
        let of =
            format!("{events} of {}, {reason} since {}", many(*aggregates, "aggregate"), time(*first_at));
        let _ = match &group.error {
            Some(error) => {
                writeln!(text, "  {of}, tried {}: {}", many(group.attempts, "time"), escape::line(error))
            }
            None if reason == "gap" => writeln!(text, "  {of}: an earlier version has not arrived"),
            None => writeln!(text, "  {of}, tried {}", many(group.attempts, "time")),
        };
        let todo = if reason == "gap" {
            format!(
                "outbox-relay replay --aggregate {} --to-queue QUEUE, at the source {}",
                oldest.quoted(),
                escape::line(&oldest.source)
            )
        } else {
            let shadow = if which.shadow { " --shadow" } else { "" };
            format!("score-projector held redrive --aggregate {}{shadow}", oldest.quoted())
        };
        let _ = writeln!(text, "    {oldest} waits for version {version}: {todo}");
    }
    if held.more > 0 {
        let _ = writeln!(text, "  and {} more; --limit shows them", many(held.more, "cause"));
    }
    text
}

async fn list_events(
    args: &HeldArgs,
    conn: &mut PgConnection,
    consumer: &str,
    list: &ListArgs,
) -> anyhow::Result<Verdict> {
    let ListArgs { aggregate, reason, error, after, limit, .. } = list;
    let filter = Filter { aggregate: aggregate.clone(), reason: reason.clone(), error: error.clone() };
    let mut events =
        held::events(conn, consumer, &filter, *after, limit + 1).await.context("it cannot be read")?;
    let more = events.len() > usize::try_from(*limit)?;
    events.truncate(usize::try_from(*limit)?);
    let next = events.last().filter(|_| more).map(|event| event.event_id);
    args.common.answer(&json!({"consumer": consumer, "events": events, "after": next}), || {
        if events.is_empty() {
            return format!("{consumer}: nothing that is held matches");
        }
        let mut text = String::new();
        for event in &events {
            let HeldEvent { event_id, aggregate, version, type_, .. } = event;
            let type_ = escape::line(type_);
            let _ = writeln!(text, "{event_id} {aggregate} version {version}, {type_}, {}", waits(event));
        }
        if let Some(next) = next {
            let _ = writeln!(text, "and more: --after {next}");
        }
        text
    })?;
    Ok(if events.is_empty() { Verdict::Ok } else { Verdict::Attention })
}

/// Why an event waits, since when, and what came of trying it.
fn waits(event: &HeldEvent) -> String {
    let since = format!("{} since {}", event.reason, time(event.first_at));
    match (&event.error, event.attempts) {
        (None, 0) => since,
        (None, attempts) => format!("{since}, tried {}", many(attempts, "time")),
        (Some(error), attempts) => {
            let (tried, last, error) = (many(attempts, "time"), time(event.last_at), escape::line(error));
            format!("{since}, tried {tried}, last at {last}: {error}")
        }
    }
}

async fn show(
    args: &HeldArgs,
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    with_body: bool,
) -> anyhow::Result<Verdict> {
    if let Some(shown) = held::event(conn, consumer, id, with_body).await.context("it cannot be read")? {
        args.common.answer(&shown, || one(&shown))?;
        return Ok(Verdict::Ok);
    }
    if let Some(skipped) = held::skipped(conn, consumer, id).await.context("it cannot be read")? {
        args.common.answer(&skipped, || {
            let Skipped { event_id, aggregate, version, type_, skipped_by, why, .. } = &skipped;
            let error = escape::line(skipped.error.as_deref().unwrap_or("it did not come back"));
            let (type_, skipped_by, why) = (escape::line(type_), escape::line(skipped_by), escape::line(why));
            let at = time(skipped.skipped_at);
            format!(
                "event {event_id} of type {type_}\n  of {aggregate}, version {version}, published by {}\n  \
                 skipped {at} by {skipped_by}: {why}\n  what the handler had said: {error}",
                escape::line(&aggregate.source)
            )
        })?;
        return Ok(Verdict::Ok);
    }
    bail!("{consumer} holds no event {id}; score-projector held list shows what it holds")
}

fn one(shown: &Shown) -> String {
    let Shown { event, applied, behind, body, .. } = shown;
    let mut text = format!(
        "event {} of type {}\n  of {}, version {}, published by {}; applied is version {applied}\n  {}\n  \
         {} behind it\n",
        event.event_id,
        escape::line(&event.type_),
        event.aggregate,
        event.version,
        escape::line(&event.aggregate.source),
        waits(event),
        many(*behind, "event"),
    );
    let _ = match body {
        Some(body) => writeln!(text, "{}", body.replace('\n', "\n  ")),
        None => writeln!(text, "  its body has {}; --body shows it", many(event.bytes, "byte")),
    };
    text
}

fn redriven(all: &Redrives, dry_run: bool) -> String {
    if all.aggregates == 0 {
        return "nothing that is held matches".to_owned();
    }
    let (applied, are) = if dry_run { ("would be applied", "would be") } else { ("applied", "are") };
    let aggregates = i64::try_from(all.aggregates).unwrap_or(i64::MAX);
    let events = i64::try_from(all.applied).unwrap_or(i64::MAX);
    let mut text = format!("{}: {} {applied}", many(aggregates, "aggregate"), many(events, "event"));
    let _ = match all.held {
        0 => writeln!(text, ", nothing of them {} held any more", if dry_run { "would be" } else { "is" }),
        held => writeln!(text, ", {held} of them {are} held still"),
    };
    for (error, count) in &all.errors {
        let aggregates = many(i64::try_from(*count).unwrap_or(i64::MAX), "aggregate");
        let _ = writeln!(text, "  {aggregates} stopped again: {}", escape::line(error));
    }
    for one in &all.each {
        let _ = writeln!(text, "  {}", became(one));
    }
    if u64::try_from(all.each.len()).is_ok_and(|listed| listed < all.aggregates) {
        let _ = writeln!(text, "  and others");
    }
    text
}

fn became(one: &Redriven) -> String {
    let Redriven { aggregate, from, to, held, .. } = one;
    let moved = if from == to {
        format!("{aggregate} stays at version {to}")
    } else {
        format!("{aggregate} from version {from} to {to}")
    };
    match (&one.refused, held) {
        (Some(refused), _) => format!("{moved}, stopped by event {}; {held} held", refused.event_id),
        (None, 0) => moved,
        (None, held) => format!("{moved}, and waits for version {}; {held} held", to + 1),
    }
}

/// The event that is to be skipped.
async fn chosen(conn: &mut PgConnection, consumer: &str, args: &SkipArgs) -> anyhow::Result<HeldEvent> {
    let found = match (args.event, &args.aggregate, args.version) {
        (Some(id), ..) => held::event(conn, consumer, id, false).await?.map(|shown| shown.event),
        (None, Some((type_, id)), Some(version)) => {
            let mut found = held::at(conn, consumer, type_, id, version).await?;
            if found.len() > 1 {
                let (type_, id) = (escape::line(type_), escape::line(id));
                bail!("several sources have a version {version} of {type_}/{id}: name it by --event");
            }
            found.pop()
        }
        _ => None,
    };
    found.with_context(|| {
        format!("{consumer} holds no such event; score-projector held list shows what it holds")
    })
}

async fn skip(
    args: &HeldArgs,
    sequencer: &Sequencer<Projection>,
    event: &HeldEvent,
    skip: &SkipArgs,
) -> anyhow::Result<Verdict> {
    let by = skip.by.clone().unwrap_or_else(operator);
    let request = Skip { event, by: &by, why: &skip.why, batch: skip.batch, dry_run: !skip.yes };
    let after = sequencer.skip(&request).await.context("nothing was skipped")?;
    let answer = json!({"skipped": skip.yes, "event": event, "by": by, "why": skip.why, "after": after});
    args.common.answer(&answer, || {
        let HeldEvent { event_id, aggregate, version, type_, .. } = event;
        let type_ = escape::line(type_);
        let event = format!("event {event_id} of type {type_}, version {version} of {aggregate}");
        let after = became(&after);
        if skip.yes {
            format!("{event}, is skipped; by {by}: {}\n  {after}", skip.why)
        } else {
            format!("{event}, would be skipped: its version counts, and it does nothing\n  {after}\nsay --yes to do it")
        }
    })?;
    Ok(if skip.yes && after.refused.is_none() { Verdict::Ok } else { Verdict::Attention })
}
