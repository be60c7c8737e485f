//! `rejected`: lists messages that cannot be applied, and drops them.

use std::fmt::Write;

use anyhow::{Context, bail};
use inbox::rejected::{self, Filter, Group, Groups, Rejected};
use serde_json::json;
use sqlx::PgConnection;

use super::{CommandArgs, STATEMENT_TIMEOUT, Verdict, WhichModel, connect, many, time};

/// Settings of `rejected`.
#[derive(Debug, clap::Args)]
pub struct RejectedArgs {
    /// The database and the output format.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The read model.
    #[command(flatten)]
    pub which: WhichModel,
    /// The action.
    #[command(subcommand)]
    pub action: RejectedAction,
}

/// Actions on rejected messages.
#[derive(Debug, clap::Subcommand)]
pub enum RejectedAction {
    /// List the messages by reason. Exit code 3 when there are any.
    List,
    /// Show one message, without its body.
    Show {
        /// The message's number.
        id: i64,
        /// Also show its body, with the personal data in it.
        #[arg(long)]
        body: bool,
    },
    /// Delete messages.
    Drop {
        /// The selection.
        #[command(flatten)]
        selection: Selection,
        /// Delete them. Without this flag only their number is printed, with exit code 3.
        #[arg(long)]
        yes: bool,
    },
}

/// The messages to delete; all conditions must match.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Selection {
    /// The message with this number. May be repeated.
    #[arg(long, value_name = "NUMBER")]
    pub id: Vec<i64>,
    /// Messages with this reason.
    #[arg(long, value_parser = rejected::REASONS)]
    pub reason: Option<String>,
    /// All messages.
    #[arg(long, conflicts_with_all = ["id", "reason"])]
    pub all: bool,
}

/// Lists rejected messages, shows one, or deletes them.
pub async fn rejected(args: &RejectedArgs) -> anyhow::Result<Verdict> {
    let (mut conn, consumer) = connect(&args.common, "rejected", args.which, STATEMENT_TIMEOUT).await?;
    match &args.action {
        RejectedAction::List => {
            let groups = rejected::groups(&mut conn, &consumer)
                .await
                .context("the rejected messages cannot be read")?;
            args.common.answer(&json!({"consumer": consumer, "rejected": groups}), || {
                groups_text(&consumer, &groups)
            })?;
            Ok(if groups.messages == 0 { Verdict::Ok } else { Verdict::Attention })
        }
        RejectedAction::Show { id, body } => {
            let message = rejected::message(&mut conn, &consumer, *id, *body)
                .await
                .context("the rejected messages cannot be read")?;
            let Some(message) = message else {
                bail!(
                    "{consumer} has rejected no message {id}; score-projector rejected list shows what it has"
                )
            };
            args.common.answer(&message, || message_text(&message))?;
            Ok(Verdict::Ok)
        }
        RejectedAction::Drop { selection, yes } => {
            let filter = Filter { ids: selection.id.clone(), reason: selection.reason.clone() };
            drop(args, &mut conn, &consumer, &filter, *yes).await
        }
    }
}

fn groups_text(consumer: &str, rejected: &Groups) -> String {
    if rejected.messages == 0 {
        return format!("{consumer}: no message was rejected");
    }
    let mut text = format!("{consumer}: {} rejected\n", many(rejected.messages, "message"));
    for Group { reason, detail, messages, deliveries, last_at, newest, .. } in &rejected.groups {
        let came = many(*deliveries, "time");
        let _ = writeln!(
            text,
            "  {messages} {reason}, came {came}, last at {}: {}",
            time(*last_at),
            escape::line(detail)
        );
        let _ = writeln!(text, "    score-projector rejected show {newest}");
    }
    text
}

fn message_text(message: &Rejected) -> String {
    let Rejected { id, reason, times, .. } = message;
    let (detail, routing_key) = (escape::line(&message.detail), escape::line(&message.routing_key));
    let properties = message.properties.to_string();
    let properties = escape::line(&properties);
    let mut text = format!(
        "message {id}, {reason}: {detail}\n  routing key {routing_key}\n  came {}, first at {}, last at {}\n  {properties}\n",
        many(*times, "time"),
        time(message.first_at),
        time(message.last_at),
    );
    let _ = match (&message.body, message.erased_at) {
        (_, Some(at)) => writeln!(text, "  erased at {}: its aggregate has ended", time(at)),
        (Some(body), _) => writeln!(text, "{}", body.replace('\n', "\n  ")),
        (None, _) => {
            writeln!(
                text,
                "  its body has {}; --body shows {}",
                many(message.bytes, "byte"),
                stored_part(message)
            )
        }
    };
    text
}

fn stored_part(message: &Rejected) -> String {
    if i64::from(message.kept_bytes) == message.bytes {
        return "it".to_owned();
    }
    format!("the first {}, which are kept", many(message.kept_bytes, "byte"))
}

async fn drop(
    args: &RejectedArgs,
    conn: &mut PgConnection,
    consumer: &str,
    filter: &Filter,
    yes: bool,
) -> anyhow::Result<Verdict> {
    let count = if yes {
        let dropped = rejected::drop(conn, consumer, filter).await.context("not all of them were dropped")?;
        tracing::warn!(consumer, dropped, "rejected messages dropped by hand");
        i64::try_from(dropped)?
    } else {
        rejected::count(conn, consumer, filter).await.context("the rejected messages cannot be read")?
    };
    args.common.answer(&json!({"consumer": consumer, "dropped": yes, "messages": count}), || {
        let messages = many(count, "message");
        match (count, yes) {
            (0, _) => "no rejected message matches".to_owned(),
            (_, true) => format!("{messages} dropped"),
            (_, false) => format!("{messages} would be dropped; add --yes to do it"),
        }
    })?;
    Ok(if yes || count == 0 { Verdict::Ok } else { Verdict::Attention })
}
