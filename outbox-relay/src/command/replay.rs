//! `replay`: history is published again, beside the live relay, to one queue alone or to everybody.

pub(super) mod history;
mod one_queue;
mod pace;
mod pool;
pub(super) mod publisher;
mod registration;

use std::{fmt::Write, time::Duration};

use anyhow::{Context, bail};
use daemon::{
    config::{SettingError, broker::BrokerArgs},
    progress::Progress,
    shutdown::Shutdown,
};
use lapin::types::ShortString;
use serde_json::json;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{
    CommandArgs, Verdict,
    confirm::{self, can_ask},
    connect, many, state,
};
use crate::{config::relay_name, event::Event, message::Origin, relay::exchange};

use history::History;
pub use history::Range;
use publisher::Publisher;
use registration::Registration;

/// How many events in a row the broker may refuse for themselves before the replay ends.
const REFUSED: u64 = 100;
/// What was made in a long time is looked for in many blocks.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// Pages that are read ahead.
const AHEAD: usize = 2;

/// Settings of `replay`.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub struct ReplayArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The broker.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// Whose progress tells what was published already: no more than that is replayed.
    #[arg(long, env = "RELAY_NAME", default_value = "default", value_parser = relay_name)]
    pub name: String,
    /// The exchange that the relay publishes to.
    #[arg(long, env = "EXCHANGE", default_value = "event_dispatcher", value_parser = exchange)]
    pub exchange: ShortString,
    /// Add the attributes of CloudEvents to each message, as the relay does with this setting.
    #[arg(long, env = "CLOUDEVENTS")]
    pub cloudevents: bool,
    /// Which events.
    #[command(flatten)]
    pub range: Range,
    /// Publish to this queue alone, with the routing keys as they were, and to nobody else.
    #[arg(long, value_name = "NAME", conflicts_with = "to_everybody")]
    pub to_queue: Option<String>,
    /// Publish to every queue that is bound to the exchange. A subscriber with side effects, such as mails or payments,
    /// repeats them unless it ignores what is `replayed`.
    #[arg(long)]
    pub to_everybody: bool,
    /// Events per second at most.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// Only count.
    #[arg(long)]
    pub dry_run: bool,
    /// Publish without a question. Without this the events are counted first; on a terminal the command asks, and
    /// elsewhere it says what it would publish, with exit code 3.
    #[arg(long)]
    pub yes: bool,
}

impl ReplayArgs {
    /// To whom, for people.
    fn target(&self) -> Result<String, SettingError> {
        match &self.to_queue {
            Some(queue) => Ok(format!("the queue {queue} alone")),
            None if self.to_everybody => {
                Ok(format!("every queue that is bound to the exchange {}", self.exchange))
            }
            None => Err(SettingError::new(
                "replay",
                "say to whom: --to-queue NAME publishes to that queue alone; --to-everybody publishes to every queue \
                 that is bound to the exchange, also to those of subscribers that send mails or move money. \
                 --dry-run only counts",
            )),
        }
    }
}

/// Replays, and says what came of it. Ctrl-C ends it once it is known what became of the events under way.
pub async fn replay(args: &ReplayArgs) -> anyhow::Result<Verdict> {
    let target = if args.dry_run { String::new() } else { args.target()? };
    let mut conn = connect(&args.common, "replay", STATEMENT_TIMEOUT).await?;
    state::known(&mut conn, &args.name).await?;
    let history = History::of(&mut conn, &args.name, &args.range).await?;
    let mut outcome = Outcome { next: history.from, to: history.to, ..Outcome::default() };
    let shutdown = Shutdown::on_signals()?;
    let stop = shutdown.requested();
    let (mut finished, mut confirmed) = (true, args.yes);
    if args.dry_run || !args.yes {
        let said = Progress::new("counting", "event");
        let mut history = history.clone();
        let counted = stop.run_until_cancelled(history.count(&mut conn, &said, &mut outcome.events)).await;
        outcome.next = history.from;
        finished = counted.transpose().context("the events could not be counted")?.is_some();
    }
    if finished && !args.dry_run && !args.yes && can_ask() {
        let question = format!("Publish {} again to {target}?", many(outcome.events, "event"));
        confirmed = confirm::confirmed(&question, stop).await.context("the answer could not be read")?;
    }
    if !args.dry_run && confirmed {
        outcome = Outcome { next: history.from, to: history.to, ..Outcome::default() };
        let origin = Origin::from(&outbox::source(&mut conn).await?).with_cloudevents(args.cloudevents);
        let id = Uuid::now_v7();
        let reading = connect(&args.common, "replay", STATEMENT_TIMEOUT).await?;
        let mut publisher = Publisher::open(args, origin, id).await?;
        let registered = args
            .to_queue
            .as_ref()
            .map_or_else(|| format!("exchange {}", args.exchange), |queue| format!("queue {queue}"));
        let positions = (history.from, history.to);
        let mut registration = Registration::begin(&mut conn, id, positions, registered).await?;
        let said = Progress::new("replaying", "event");
        let (send, read) = mpsc::channel(AHEAD);
        let reader = tokio::spawn(history.send(reading, send));
        let ended = publisher.publish(read, &mut outcome, Some(&mut registration), &said, stop).await;
        // Its statement ends with its connection.
        reader.abort();
        drop(said);
        publisher.close().await;
        let unregistered = registration.end().await;
        finished = ended.with_context(|| {
            format!("stopped with {} published; {}", many(outcome.events, "event"), outcome.go_on())
        })?;
        unregistered?;
    }
    let answer = json!({
        "finished": finished, "dry_run": args.dry_run, "confirmed": confirmed, "events": outcome.events,
        "unroutable": outcome.unroutable, "refused": outcome.refused, "next": outcome.next, "to": outcome.to,
    });
    args.common.answer(&answer, || match (args.dry_run, confirmed) {
        (false, true) => outcome.text(finished),
        (false, false) if finished => {
            format!("{} would be replayed to {target}; add --yes to do it", many(outcome.events, "event"))
        }
        _ => outcome.counted(finished),
    })?;
    let done = args.dry_run || confirmed;
    let well = finished && done && outcome.unroutable == 0 && outcome.refused == 0;
    Ok(if well { Verdict::Ok } else { Verdict::Attention })
}

/// What came of a replay so far.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// Published, or counted in a dry run.
    pub(super) events: u64,
    unroutable: u64,
    pub(super) refused: u64,
    /// Where to go on.
    pub(super) next: i64,
    /// The last position that is wanted.
    to: i64,
    /// How many of those that were published are published again then.
    again: usize,
    /// How many events in a row the broker refused, and from which position on.
    refused_in_a_row: Option<(u64, i64)>,
}

impl Outcome {
    /// The broker refused an event for itself. An error when it has taken nothing for long: then it is not the events.
    fn refused(&mut self, event: &Event, why: &str) -> anyhow::Result<()> {
        // Lanes publish side by side, so a later one may be refused first.
        let (count, first) = self.refused_in_a_row.unwrap_or((0, event.position));
        let first = first.min(event.position);
        self.refused_in_a_row = Some((count + 1, first));
        if count + 1 < REFUSED {
            return Ok(());
        }
        bail!(
            "the broker refused {REFUSED} events in a row, from position {first} on, the last of type {}: {why}; remove \
             the cause, or leave these events out with --type",
            event.type_
        )
    }

    /// What was counted, for people.
    fn counted(&self, finished: bool) -> String {
        let counted = if finished { "would be replayed" } else { "counted, then interrupted" };
        format!("{} {counted}", many(self.events, "event"))
    }

    /// What was published, for people.
    fn text(&self, finished: bool) -> String {
        let mut text = format!("{} replayed", many(self.events, "event"));
        if self.unroutable > 0 {
            let _ = write!(text, "; {} more, which no queue takes", self.unroutable);
        }
        if self.refused > 0 {
            let _ = write!(text, "; {} more, which cannot be published (the log says why)", self.refused);
        }
        if !finished {
            let _ = write!(text, "; interrupted: {}", self.go_on());
        }
        text
    }

    /// Where to go on, and what comes twice.
    fn go_on(&self) -> String {
        let next = self.next;
        match self.again {
            0 => format!("go on with --from {next}"),
            1 => format!("go on with --from {next} (1 of them is published again then)"),
            again => format!("go on with --from {next} ({again} of them are published again then)"),
        }
    }
}
