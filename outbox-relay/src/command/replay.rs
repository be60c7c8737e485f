//! `replay`: history is published again, beside the live relay, to everybody or to one queue alone.

mod history;
mod one_queue;
mod page;
mod publisher;
mod registration;

use std::{
    fmt::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use daemon::{config::broker::BrokerArgs, progress::Progress as Said, shutdown::Shutdown};
use lapin::types::ShortString;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, many, state};
use crate::{config::relay_name, event::Event, message::Origin, relay::exchange};

pub use history::Range;
use history::{History, Read};
use publisher::Publisher;
use registration::Registration;

/// How many events in a row the broker may refuse for themselves before the replay ends.
const REFUSED: u64 = 100;
/// Finding the first event of a time may read an index over everything.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);

/// Settings of `replay`.
#[derive(Debug, clap::Args)]
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
    /// Which events.
    #[command(flatten)]
    pub range: Range,
    /// Publish to this queue alone, with the routing keys as they were, and to nobody else.
    #[arg(long, value_name = "NAME")]
    pub to_queue: Option<String>,
    /// Events per second at most.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// Only count.
    #[arg(long)]
    pub dry_run: bool,
}

/// Replays, and says what came of it. Ctrl-C ends it after the page that is under way.
pub async fn replay(args: &ReplayArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "replay", STATEMENT_TIMEOUT).await?;
    state::known(&mut conn, &args.name).await?;
    let origin = Origin::from(&outbox::source(&mut conn).await?);
    let (id, from) = (Uuid::now_v7(), args.range.from.unwrap_or(0));
    // At most ten seconds' worth of events at once: a replay that stores no progress for a minute counts as dead.
    let most = usize::try_from(args.rate)?.saturating_mul(10);
    let history = History::of(&mut conn, &args.name, &args.range, most).await?;
    let to = history.to;
    let mut progress = Progress { next: from, ..Progress::default() };
    let mut registration = Registration::none(&mut conn);
    let mut publisher = None;
    if !args.dry_run {
        publisher = Some(Publisher::open(args, origin, id).await?);
        let target = args
            .to_queue
            .as_ref()
            .map_or_else(|| format!("exchange {}", args.exchange), |queue| format!("queue {queue}"));
        registration.begin(id, (from, to), target).await?;
    }
    let shutdown = Shutdown::on_signals()?;
    let (live, stop) = (publisher.as_mut(), shutdown.requested());
    let ended = pages(history, live, &mut registration, args.rate, &mut progress, stop).await;
    if let Some(publisher) = publisher {
        publisher.close().await;
    }
    let unregistered = registration.end().await;
    let finished = ended.with_context(|| {
        let count = many(i64::try_from(progress.events).unwrap_or(i64::MAX), "event");
        format!("stopped with {count} published; {}", progress.go_on())
    })?;
    unregistered?;
    let answer = json!({
        "finished": finished, "dry_run": args.dry_run, "events": progress.events,
        "unroutable": progress.unroutable, "refused": progress.refused, "next": progress.next, "to": to,
    });
    args.common.answer(&answer, || {
        let count = many(i64::try_from(progress.events).unwrap_or(i64::MAX), "event");
        let mut text =
            if args.dry_run { format!("{count} would be replayed") } else { format!("{count} replayed") };
        if progress.unroutable > 0 {
            let _ = write!(text, "; {} more, which no queue takes", progress.unroutable);
        }
        if progress.refused > 0 {
            let _ = write!(text, "; {} more, which cannot be published (the log says why)", progress.refused);
        }
        if !finished {
            let _ = write!(text, "; interrupted: {}", progress.go_on());
        }
        text
    })?;
    let well = finished && progress.unroutable == 0 && progress.refused == 0;
    Ok(if well { Verdict::Ok } else { Verdict::Attention })
}

/// Page after page, at most `rate` events in a second; without a publisher they are only counted. False when it was
/// interrupted.
async fn pages(
    mut history: History<'_>,
    mut publisher: Option<&mut Publisher>,
    registration: &mut Registration<'_>,
    rate: u32,
    progress: &mut Progress,
    stop: &CancellationToken,
) -> anyhow::Result<bool> {
    let (began, mut first) = (Instant::now(), None);
    let said = Said::new(if publisher.is_some() { "replaying" } else { "counting" }, "event");
    while !stop.is_cancelled() {
        let read = history.read(registration.conn, progress.next).await?;
        let Some(Read { positions: (from, last), events, unreadable }) = read else { return Ok(true) };
        let first = *first.get_or_insert(from);
        for row in unreadable {
            progress.refused += 1;
            tracing::warn!(position = row.position, why = row.reason, "not replayed");
        }
        match &mut publisher {
            None => progress.events += events.len() as u64,
            Some(publisher) => {
                if !publisher.publish(events, progress, registration, stop).await? {
                    return Ok(false);
                }
            }
        }
        let Some(next) = last.checked_add(1) else { return Ok(true) };
        progress.next = next;
        if publisher.is_some() {
            registration.save(next).await?;
            // So many events should have taken so long.
            let due = Duration::from_secs_f64(count(progress.events) / f64::from(rate));
            stop.run_until_cancelled(tokio::time::sleep(due.saturating_sub(began.elapsed()))).await;
        }
        let way = |to: i64| u64::try_from(to - first).unwrap_or(0);
        said.along((way(last), way(history.to)), progress.events);
    }
    Ok(false)
}

#[expect(clippy::cast_precision_loss, reason = "for a rate it is exact enough")]
fn count(events: u64) -> f64 {
    events as f64
}

/// How far a replay is.
#[derive(Debug, Default)]
struct Progress {
    /// Published, or counted in a dry run.
    events: u64,
    unroutable: u64,
    refused: u64,
    /// Where to go on.
    next: i64,
    /// How many of those that were published are published again then.
    again: usize,
    /// How many events in a row the broker refused, and from which position on.
    refused_in_a_row: Option<(u64, i64)>,
}

impl Progress {
    /// The broker refused an event for itself. An error when it has taken nothing for long: then it is not the events.
    fn refused(&mut self, event: &Event, why: &str) -> anyhow::Result<()> {
        let (count, first) = self.refused_in_a_row.unwrap_or((0, event.position));
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
