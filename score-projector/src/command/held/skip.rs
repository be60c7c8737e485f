//! `held skip`: gives up one event.

use anyhow::{Context, bail};
use escape::line as escaped;
use inbox::{
    Sequencer, Skip,
    held::{self, HeldEvent},
};
use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use super::text::aggregate_text;
use crate::{
    command::{CommandArgs, Verdict, aggregate, batch, operator},
    projection::Projection,
};

/// Settings of `held skip`.
#[derive(Debug, clap::Args)]
pub struct SkipArgs {
    /// The event's id.
    #[arg(long, value_name = "UUID", required_unless_present = "aggregate")]
    pub event: Option<Uuid>,
    /// The event's aggregate, instead of its id: TYPE/ID.
    #[arg(long, value_parser = aggregate, requires = "version", conflicts_with = "event")]
    pub aggregate: Option<(String, String)>,
    /// The event's version of that aggregate.
    #[arg(long, requires = "aggregate")]
    pub version: Option<i64>,
    /// The operator who skips it. USER at this host, unless given.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub by: Option<String>,
    /// The reason. Both are recorded for good, so they must not contain personal data.
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub why: String,
    /// How many events one transaction applies at most.
    #[arg(long, default_value = "64", value_parser = batch)]
    pub batch: usize,
    /// Skip it. Without this flag the skip is tried and rolled back, and the result is printed, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

/// Finds the event to skip.
pub(super) async fn chosen(
    conn: &mut PgConnection,
    consumer: &str,
    args: &SkipArgs,
) -> anyhow::Result<HeldEvent> {
    let found = match (args.event, &args.aggregate, args.version) {
        (Some(id), ..) => held::event(conn, consumer, id, false).await?.map(|shown| shown.event),
        (None, Some((type_, id)), Some(version)) => {
            let mut found = held::at(conn, consumer, type_, id, version).await?;
            if found.len() > 1 {
                let (type_, id) = (escaped(type_), escaped(id));
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

pub(super) async fn skip(
    common: &CommandArgs,
    sequencer: &Sequencer<Projection>,
    event: &HeldEvent,
    skip: &SkipArgs,
) -> anyhow::Result<Verdict> {
    let by = skip.by.clone().unwrap_or_else(operator);
    let request = Skip { event, by: &by, why: &skip.why, batch: skip.batch, dry_run: !skip.yes };
    let after = sequencer.skip(&request).await.context("nothing was skipped")?;
    let answer = json!({"skipped": skip.yes, "event": event, "by": by, "why": skip.why, "after": after});
    common.answer(&answer, || {
        let HeldEvent { event_id, aggregate, version, type_, .. } = event;
        let type_ = escaped(type_);
        let event = format!("event {event_id} of type {type_}, version {version} of {aggregate}");
        let after = aggregate_text(&after);
        if skip.yes {
            format!("{event}, is skipped; by {by}: {}\n  {after}", skip.why)
        } else {
            format!("{event}, would be skipped: its version counts, and it does nothing\n  {after}\nadd --yes to do it")
        }
    })?;
    Ok(if skip.yes && after.refused.is_none() { Verdict::Ok } else { Verdict::Attention })
}
