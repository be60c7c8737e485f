//! `held`: lists events that wait, and applies or skips them.

mod skip;
mod text;

use std::fmt::Write;

use anyhow::{Context, bail};
use daemon::{progress::Progress, shutdown::Shutdown};
use escape::line as escaped;
use inbox::{
    Redrive, RedriveSummary, Sequencer,
    held::{self, Filter, HeldEvent, Skipped},
};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use self::{
    skip::SkipArgs,
    text::{event_text, groups_text, summary_text, waiting_text},
};
use super::{CommandArgs, STATEMENT_TIMEOUT, Verdict, WhichModel, aggregate, batch, connect, time};
use crate::{model::Model, projection::Projection};

/// Settings of `held`.
#[derive(Debug, clap::Args)]
pub struct HeldArgs {
    /// The database and the output format.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The read model.
    #[command(flatten)]
    pub which: WhichModel,
    /// The action.
    #[command(subcommand)]
    pub action: HeldAction,
}

/// Actions on events that wait.
#[derive(Debug, clap::Subcommand)]
pub enum HeldAction {
    /// List the events by cause. Exit code 3 when there are any.
    List(ListArgs),
    /// Show one event, without its body.
    Show {
        /// The event's id.
        id: Uuid,
        /// Also show its body, with the personal data in it.
        #[arg(long)]
        body: bool,
    },
    /// Apply events again, in order, with this program's handler: first the event that stops its aggregate, then the
    /// events behind it. Exit code 3 when one is refused again. Ctrl-C ends it after the current transaction; the same
    /// command then goes on.
    Redrive(RedriveArgs),
    /// Give up the event that stops its aggregate. Its version counts, its content has no effect, and the skip is
    /// recorded. Then the events behind it are applied.
    Skip(SkipArgs),
}

/// Settings of `held list`.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// List each event, in the order of creation.
    #[arg(long)]
    pub events: bool,
    /// Only events of this aggregate: TYPE/ID.
    #[arg(long, value_parser = aggregate, requires = "events")]
    pub aggregate: Option<(String, String)>,
    /// Only events with this reason.
    #[arg(long, value_parser = ["gap", "poison", "trying", "behind"], requires = "events")]
    pub reason: Option<String>,
    /// Only events with an error that contains this text.
    #[arg(long, value_name = "TEXT", requires = "events")]
    pub error: Option<String>,
    /// Only events after the one with this id.
    #[arg(long, value_name = "UUID", requires = "events")]
    pub after: Option<Uuid>,
    /// How many causes or events to list.
    #[arg(long, default_value = "50", value_parser = clap::value_parser!(i64).range(1..=10_000))]
    pub limit: i64,
}

/// Settings of `held redrive`.
#[derive(Debug, clap::Args)]
pub struct RedriveArgs {
    /// The selection.
    #[command(flatten)]
    pub selection: Selection,
    /// How many events one transaction applies at most.
    #[arg(long, default_value = "64", value_parser = batch)]
    pub batch: usize,
    /// Call the handler, roll back, and print what would happen: for each aggregate as far as one transaction goes.
    #[arg(long)]
    pub dry_run: bool,
}

/// The aggregates to redrive; all conditions must match.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Selection {
    /// This aggregate: TYPE/ID.
    #[arg(long, value_parser = aggregate)]
    pub aggregate: Option<(String, String)>,
    /// Aggregates that are stopped for this reason.
    #[arg(long, value_parser = ["poison", "trying"])]
    pub reason: Option<String>,
    /// Aggregates that are stopped by an error that contains this text.
    #[arg(long, value_name = "TEXT")]
    pub error: Option<String>,
    /// All aggregates.
    #[arg(long, conflicts_with_all = ["aggregate", "reason", "error"])]
    pub all: bool,
}

/// Lists held events, shows one, applies them again, or skips one.
pub async fn held(args: &HeldArgs) -> anyhow::Result<Verdict> {
    let (mut conn, consumer) = connect(&args.common, "held", args.which, STATEMENT_TIMEOUT).await?;
    match &args.action {
        HeldAction::List(list) if list.events => list_events(args, &mut conn, &consumer, list).await,
        HeldAction::List(list) => {
            let progress = Progress::new("reading what is held", "event");
            let groups = held::groups(&mut conn, &consumer, list.limit)
                .await
                .context("the held events cannot be read")?;
            drop(progress);
            args.common.answer(&json!({"consumer": consumer, "held": groups}), || {
                groups_text(&consumer, &groups, args.which)
            })?;
            Ok(if groups.events == 0 { Verdict::Ok } else { Verdict::Attention })
        }
        HeldAction::Show { id, body } => show(args, &mut conn, &consumer, *id, *body).await,
        HeldAction::Redrive(redrive) => {
            drop(conn);
            let stop = Shutdown::on_signals()?;
            let sequencer = sequencer(args, consumer)?;
            let answer = sequencer.redrive_until(&request(redrive), stop.requested(), progress()).await?;
            args.common.answer(&answer, || summary_text(&answer, redrive.dry_run))?;
            Ok(if answer.refused == 0 && !answer.interrupted { Verdict::Ok } else { Verdict::Attention })
        }
        HeldAction::Skip(request) => {
            let event = skip::chosen(&mut conn, &consumer, request).await?;
            drop(conn);
            skip::skip(&args.common, &sequencer(args, consumer)?, &event, request).await
        }
    }
}

/// The sequencer and handler of `run`. They notify neither the relay nor readers, which poll anyway.
fn sequencer(args: &HeldArgs, consumer: String) -> anyhow::Result<Sequencer<Projection>> {
    let database = args.common.database.options("score-projector held", STATEMENT_TIMEOUT)?.quiet();
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

/// Reports progress.
fn progress() -> impl FnMut(&RedriveSummary) {
    let progress = Progress::new("applying again", "event");
    move |all| progress.count(all.applied)
}

async fn list_events(
    args: &HeldArgs,
    conn: &mut PgConnection,
    consumer: &str,
    list: &ListArgs,
) -> anyhow::Result<Verdict> {
    let ListArgs { aggregate, reason, error, after, limit, .. } = list;
    let filter = Filter { aggregate: aggregate.clone(), reason: reason.clone(), error: error.clone() };
    let mut events = held::events(conn, consumer, &filter, *after, limit + 1)
        .await
        .context("the held events cannot be read")?;
    let more = events.len() > usize::try_from(*limit)?;
    events.truncate(usize::try_from(*limit)?);
    let next = events.last().filter(|_| more).map(|event| event.event_id);
    args.common.answer(&json!({"consumer": consumer, "events": events, "after": next}), || {
        if events.is_empty() {
            return format!("{consumer}: no held event matches");
        }
        let mut text = String::new();
        for event in &events {
            let HeldEvent { event_id, aggregate, version, type_, .. } = event;
            let type_ = escaped(type_);
            let _ =
                writeln!(text, "{event_id} {aggregate} version {version}, {type_}, {}", waiting_text(event));
        }
        if let Some(next) = next {
            let _ = writeln!(text, "and more: --after {next}");
        }
        text
    })?;
    Ok(if events.is_empty() { Verdict::Ok } else { Verdict::Attention })
}

async fn show(
    args: &HeldArgs,
    conn: &mut PgConnection,
    consumer: &str,
    id: Uuid,
    with_body: bool,
) -> anyhow::Result<Verdict> {
    if let Some(shown) =
        held::event(conn, consumer, id, with_body).await.context("the held events cannot be read")?
    {
        args.common.answer(&shown, || event_text(&shown))?;
        return Ok(Verdict::Ok);
    }
    if let Some(skipped) =
        held::skipped(conn, consumer, id).await.context("the held events cannot be read")?
    {
        args.common.answer(&skipped, || {
            let Skipped { event_id, aggregate, version, type_, skipped_by, why, .. } = &skipped;
            let error = escaped(skipped.error.as_deref().unwrap_or("the process died while it ran"));
            let (type_, skipped_by, why) = (escaped(type_), escaped(skipped_by), escaped(why));
            let at = time(skipped.skipped_at);
            format!(
                "event {event_id} of type {type_}\n  of {aggregate}, version {version}, published by {}\n  \
                 skipped {at} by {skipped_by}: {why}\n  the handler's error: {error}",
                escaped(&aggregate.source)
            )
        })?;
        return Ok(Verdict::Ok);
    }
    bail!("{consumer} holds no event {id}; score-projector held list shows what it holds")
}
