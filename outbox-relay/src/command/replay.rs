//! `replay`: history is published again, beside the live relay, to everybody or to one queue alone.

use std::{
    collections::HashSet,
    fmt::Write,
    io::IsTerminal,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use serde_json::json;
use service::{config::broker::BrokerArgs, shutdown::Shutdown};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, many, state};
use crate::{
    broker::{Link, Nodes},
    config::relay_name,
    pause::Pause,
    publish::{Fate, publish},
    reader::{Event, Row},
    relay::exchange,
    unroutable::matches,
};

/// Events of one page at most, and bytes of them, but for an event that is larger by itself.
const PAGE: usize = 100;
const PAGE_BYTES: usize = 16 << 20;
/// Events of the first page: the server sends all of a page, whatever is taken of it.
const FIRST_PAGE: usize = 10;
/// How many times in a row a page may fail before the replay gives up.
const ATTEMPTS: usize = 8;
/// How often the replay says where it is.
const REPORT: Duration = Duration::from_secs(1);
/// Finding the first event of a time may read an index over everything.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// What the broker is asked for beside publishing takes no longer.
const TIMEOUT: Duration = Duration::from_secs(10);

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

/// Which events; all conditions hold.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub struct Range {
    /// From this position on.
    #[arg(long, value_name = "POSITION")]
    pub from: Option<i64>,
    /// Up to this position.
    #[arg(long, value_name = "POSITION")]
    pub to: Option<i64>,
    /// Made at or after this time (RFC 3339).
    #[arg(long, value_name = "TIME")]
    pub since: Option<DateTime<Utc>>,
    /// Made before this time.
    #[arg(long, value_name = "TIME")]
    pub until: Option<DateTime<Utc>>,
    /// Of this aggregate: TYPE/ID.
    #[arg(long, value_parser = aggregate)]
    pub aggregate: Option<(String, String)>,
    /// Of types that match, as in a topic binding: `score.*`.
    #[arg(long = "type", value_name = "PATTERN")]
    pub type_: Option<String>,
    /// All that is stored.
    #[arg(long)]
    pub all: bool,
}

fn aggregate(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('/') {
        Some((type_, id)) if !type_.is_empty() && !id.is_empty() => Ok((type_.to_owned(), id.to_owned())),
        _ => Err("it should look like TYPE/ID"),
    }
}

/// A page, by the primary key; of one aggregate, by the partitions' unique indexes. Only what the relay
/// has settled: the rest it will publish itself.
const READ: &str = "
SELECT e.position, e.id, e.aggregate_type, e.aggregate_id, e.version, e.type, e.payload::text, e.headers, e.created_at
FROM outbox.event e
WHERE e.position BETWEEN $1 AND $2 AND NOT $3::int8multirange @> e.position
  AND ($4::timestamptz IS NULL OR e.created_at >= $4) AND ($5::timestamptz IS NULL OR e.created_at < $5)
  AND ($6::text IS NULL OR (e.aggregate_type, e.aggregate_id) = ($6, $7))
ORDER BY e.position LIMIT $8";

/// How far a replay is.
#[derive(Debug, Default)]
struct Progress {
    /// Published, or counted in a dry run.
    events: u64,
    unroutable: u64,
    refused: u64,
    next: i64,
}

/// Replays, and says what came of it. Ctrl-C ends it after the page that is under way.
pub async fn replay(args: &ReplayArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "replay", STATEMENT_TIMEOUT).await?;
    state::known(&mut conn, &args.name).await?;
    let source = outbox::source(&mut conn).await?.to_string();
    // The open ranges as text: the driver has no type for them.
    let (high, open): (i64, String) =
        sqlx::query_as("SELECT high, open::text FROM outbox.relay WHERE name = $1")
            .bind(&args.name)
            .fetch_one(&mut conn)
            .await
            .context("the relay's progress could not be read")?;
    let to = args.range.to.map_or(high, |to| to.min(high));
    let mut progress = Progress { next: args.range.from.unwrap_or(0), ..Progress::default() };
    let mut run = Run { args, source, open, to, id: Uuid::now_v7(), target: None, page: FIRST_PAGE };
    if !args.dry_run {
        run.target = Some(Target::open(args, run.id).await?);
        run.begin(&mut conn, progress.next).await?;
    }
    let ended = run.pages(&mut conn, &mut progress, Shutdown::on_signals()?.requested()).await;
    let left = run.end(&mut conn).await;
    let finished = ended.with_context(|| format!("stopped; go on with: --from {}", progress.next))?;
    left?;
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
            let _ = write!(text, "; {} more, which the broker or AMQP refuses", progress.refused);
        }
        if !finished {
            let _ = write!(text, "; interrupted: go on with --from {}", progress.next);
        }
        text
    })?;
    let well = finished && progress.unroutable == 0 && progress.refused == 0;
    Ok(if well { Verdict::Well } else { Verdict::NotWell })
}

/// A replay under way.
struct Run<'a> {
    args: &'a ReplayArgs,
    source: String,
    /// Positions that the live relay has not settled.
    open: String,
    to: i64,
    id: Uuid,
    /// None in a dry run.
    target: Option<Target>,
    /// Events that the next page asks for: twice what the last one took, unless its bytes were too many.
    page: usize,
}

impl Run<'_> {
    /// Registers the replay: retention keeps away from what is still to be read.
    async fn begin(&self, conn: &mut PgConnection, next: i64) -> anyhow::Result<()> {
        let target = self
            .args
            .to_queue
            .as_ref()
            .map_or_else(|| format!("exchange {}", self.args.exchange), |queue| format!("queue {queue}"));
        let user = std::env::var("USER").unwrap_or_else(|_| "somebody".to_owned());
        sqlx::query(
            "INSERT INTO outbox.replay (id, next_position, to_position, target, started_by) VALUES ($1, $2, $3, $4, $5)",
        )
        .bind(self.id)
        .bind(next)
        .bind(self.to)
        .bind(target)
        .bind(user)
        .execute(conn)
        .await
        .context("the replay could not be registered; nothing was published")?;
        Ok(())
    }

    /// Takes away what it needed.
    async fn end(&mut self, conn: &mut PgConnection) -> anyhow::Result<()> {
        if let Some(target) = self.target.take() {
            target.close().await;
            let delete = sqlx::query("DELETE FROM outbox.replay WHERE id = $1").bind(self.id).execute(conn);
            delete
                .await
                .context("the replay is over, but its row in outbox.replay could not be deleted; it keeps nothing after a minute")?;
        }
        Ok(())
    }

    /// Page after page. False when it was interrupted.
    async fn pages(
        &mut self,
        conn: &mut PgConnection,
        progress: &mut Progress,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let (began, mut reported, mut first) = (Instant::now(), Instant::now(), None);
        while !stop.is_cancelled() {
            let events = self.read(conn, progress.next).await?;
            let Some(last) = events.last().map(|event| event.position) else { return Ok(true) };
            let first = *first.get_or_insert(events[0].position);
            let chosen: Vec<Event> = events.into_iter().filter(|event| self.takes(event)).collect();
            match &mut self.target {
                None => progress.events += chosen.len() as u64,
                Some(target) => {
                    let row = (self.id, &mut *conn);
                    target.publish(&self.source, chosen, progress, row, stop).await?;
                }
            }
            progress.next = last + 1;
            if self.target.is_some() {
                sqlx::query(
                    "UPDATE outbox.replay SET next_position = $2, heartbeat_at = now() WHERE id = $1",
                )
                .bind(self.id)
                .bind(progress.next)
                .execute(&mut *conn)
                .await
                .context("the replay's progress could not be stored")?;
                // So many events should have taken so long.
                let due = Duration::from_secs_f64(count(progress.events) / f64::from(self.args.rate));
                stop.run_until_cancelled(tokio::time::sleep(due.saturating_sub(began.elapsed()))).await;
            }
            if reported.elapsed() >= REPORT && std::io::stderr().is_terminal() {
                reported = Instant::now();
                let done = (last - first, self.to - first);
                eprint!("\r{}", super::bar(done, progress.events, "event", began.elapsed()));
            }
        }
        Ok(false)
    }

    async fn read(&mut self, conn: &mut PgConnection, from: i64) -> anyhow::Result<Vec<Event>> {
        let range = &self.args.range;
        let (type_, id) = range.aggregate.clone().unzip();
        // At most ten seconds' worth: who stores no progress for a minute counts as dead.
        let page = self.page.min(usize::try_from(self.args.rate)?.saturating_mul(10));
        let mut rows = sqlx::query_as::<_, Row>(READ)
            .bind(from)
            .bind(self.to)
            .bind(&self.open)
            .bind(range.since)
            .bind(range.until)
            .bind(type_)
            .bind(id)
            .bind(i64::try_from(page)?)
            .fetch(conn);
        let (mut events, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.try_next().await.context("the events could not be read")? {
            let event = Event::from(row);
            bytes += event.size();
            events.push(event);
            if bytes >= PAGE_BYTES {
                break;
            }
        }
        self.page = if bytes < PAGE_BYTES { PAGE.min(self.page * 2) } else { events.len() };
        Ok(events)
    }

    fn takes(&self, event: &Event) -> bool {
        self.args.range.type_.as_ref().is_none_or(|pattern| matches(pattern, &event.type_))
    }
}

/// Where a replay publishes to.
struct Target {
    nodes: Nodes,
    /// The exchange that is published to: the relay's own, or one that leads to the queue alone.
    exchange: ShortString,
    queue: Option<ShortString>,
    link: Link,
}

impl Target {
    async fn open(args: &ReplayArgs, id: Uuid) -> anyhow::Result<Self> {
        let nodes = Nodes {
            nodes: args.broker.nodes()?,
            exchange: args.exchange.clone(),
            declare: false,
            name: "outbox-relay replay".to_owned(),
        };
        let queue = args.to_queue.as_deref().map(ShortString::try_new).transpose();
        let queue = queue.ok().context("--to-queue: a queue's name has at most 255 bytes")?;
        let exchange = match queue {
            Some(_) => ShortString::try_new(format!("outbox-replay.{id}")).ok().context("a UUID is short")?,
            None => args.exchange.clone(),
        };
        let link = nodes.connect(0).await?;
        let target = Self { nodes, exchange, queue, link };
        target.lead_to_queue().await?;
        Ok(target)
    }

    /// A temporary exchange that leads to the queue and nowhere else, so that routing keys stay.
    async fn lead_to_queue(&self) -> anyhow::Result<()> {
        let Some(queue) = &self.queue else { return Ok(()) };
        let channel = &self.link.channel;
        let declare = async {
            let passive = QueueDeclareOptions { passive: true, ..Default::default() };
            channel.queue_declare(queue.clone(), passive, FieldTable::default()).await?;
            let options = ExchangeDeclareOptions { auto_delete: true, ..Default::default() };
            let (exchange, kind) = (self.exchange.clone(), ExchangeKind::Fanout);
            channel.exchange_declare(exchange.clone(), kind, options, FieldTable::default()).await?;
            let (key, options) = (ShortString::default(), QueueBindOptions::default());
            channel.queue_bind(queue.clone(), exchange, key, options, FieldTable::default()).await
        };
        tokio::time::timeout(TIMEOUT, declare)
            .await
            .with_context(|| format!("the broker did not answer within {TIMEOUT:?}"))?
            .with_context(|| {
                format!(
                    "the queue {queue} cannot be led to; it has to exist, and the user of AMQP_URL may configure, \
                     write and read outbox-replay.* and write the queue"
                )
            })
    }

    /// Publishes a page, each aggregate's events in their order; what is refused for now is tried again.
    /// Meanwhile the row of the replay says that it lives.
    async fn publish(
        &mut self,
        source: &str,
        mut events: Vec<Event>,
        progress: &mut Progress,
        (id, conn): (Uuid, &mut PgConnection),
        stop: &CancellationToken,
    ) -> anyhow::Result<()> {
        for event in &mut events {
            event.headers.get_or_insert_default().insert("replayed".to_owned(), true.into());
        }
        let mut left: Vec<&Event> = events.iter().collect();
        let (mut pause, mut attempts, mut alone) = (Pause::default(), 0, false);
        while !left.is_empty() {
            let rest = beyond_window(&mut left, alone);
            let sent = left.len();
            let why = match publish(&self.link, &self.exchange, source, &left, || true).await {
                Ok(fates) => {
                    let mut again = Vec::new();
                    for (event, fate) in left.into_iter().zip(fates) {
                        match fate {
                            Fate::Confirmed => progress.events += 1,
                            Fate::Unroutable if self.queue.is_some() => bail!("the queue is gone"),
                            Fate::Unroutable => progress.unroutable += 1,
                            Fate::Refused { why, .. } => {
                                progress.refused += 1;
                                tracing::warn!(event = %event.id, why, "not replayed");
                            }
                            Fate::Nacked => again.push(event),
                        }
                    }
                    // Whoever takes at least some is slow, and not stuck.
                    if again.len() < sent {
                        attempts = 0;
                        pause.reset();
                    }
                    left = again;
                    let nacked = !left.is_empty();
                    left.extend(rest);
                    if !nacked {
                        continue;
                    }
                    "the broker takes no more for now; is a queue at its limit?".to_owned()
                }
                Err(crate::broker::BrokerError::Refused(why)) if left.len() == 1 => {
                    progress.refused += 1;
                    tracing::warn!(event = %left[0].id, why, "not replayed");
                    left = rest;
                    self.reconnect().await?;
                    continue;
                }
                Err(error) => {
                    alone |= matches!(error, crate::broker::BrokerError::Refused(_));
                    left.extend(rest);
                    error.to_string()
                }
            };
            attempts += 1;
            if attempts > ATTEMPTS || stop.is_cancelled() {
                bail!("{why}");
            }
            pause.wait(stop).await;
            sqlx::query("UPDATE outbox.replay SET heartbeat_at = now() WHERE id = $1")
                .bind(id)
                .execute(&mut *conn)
                .await
                .context("the replay could not say that it lives")?;
            if !self.link.channel.status().connected() {
                // The next attempt tells, when this one cannot.
                let _ = self.reconnect().await;
            }
        }
        Ok(())
    }

    async fn reconnect(&mut self) -> anyhow::Result<()> {
        self.link = self.nodes.connect(0).await?;
        self.lead_to_queue().await
    }

    async fn close(self) {
        if self.queue.is_some() {
            let delete =
                self.link.channel.exchange_delete(self.exchange.clone(), ExchangeDeleteOptions::default());
            let _ = tokio::time::timeout(TIMEOUT, delete).await;
        }
        self.link.close().await;
    }
}

/// Leaves in `left` what is published at once, and returns the rest: of each aggregate one event, so that
/// none overtakes another that is tried again; and of each id one, by which a returned message is known.
fn beyond_window<'a>(left: &mut Vec<&'a Event>, alone: bool) -> Vec<&'a Event> {
    let (mut aggregates, mut ids, mut rest) = (HashSet::new(), HashSet::new(), Vec::new());
    left.retain(|event: &&'a Event| {
        let event: &'a Event = event;
        let first = aggregates.insert((&event.aggregate_type, &event.aggregate_id)) && ids.insert(event.id);
        let taken = first && !(alone && aggregates.len() > 1);
        if !taken {
            rest.push(event);
        }
        taken
    });
    rest
}

#[expect(clippy::cast_precision_loss, reason = "for a rate it is exact enough")]
fn count(events: u64) -> f64 {
    events as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_has_one_event_of_each_aggregate() {
        let event = |position: i64, aggregate: &str, id: u128| Event {
            position,
            id: Uuid::from_u128(id),
            aggregate_type: "thing".to_owned(),
            aggregate_id: aggregate.to_owned(),
            version: position,
            type_: "thing.changed".to_owned(),
            payload: "{}".into(),
            headers: None,
            created_at: DateTime::UNIX_EPOCH,
        };
        let events =
            [event(1, "a", 1), event(2, "b", 2), event(3, "a", 3), event(4, "c", 2), event(5, "d", 5)];
        let split = |alone| {
            let mut left: Vec<&Event> = events.iter().collect();
            let rest = beyond_window(&mut left, alone);
            let positions = |events: Vec<&Event>| events.iter().map(|e| e.position).collect::<Vec<_>>();
            (positions(left), positions(rest))
        };
        assert_eq!(split(false), (vec![1, 2, 5], vec![3, 4]));
        assert_eq!(split(true), (vec![1], vec![2, 3, 4, 5]));
    }
}
