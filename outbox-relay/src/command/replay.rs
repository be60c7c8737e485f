//! `replay`: history is published again, beside the live relay, to everybody or to one queue alone.

use std::{
    collections::HashSet,
    fmt::Write,
    io::IsTerminal,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use chrono::{DateTime, Utc};
use daemon::{config::broker::BrokerArgs, shutdown::Shutdown};
use futures_util::TryStreamExt;
use lapin::{
    ExchangeKind,
    options::{ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions},
    types::{FieldTable, ShortString},
};
use serde_json::json;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{CommandArgs, Verdict, connect, many, state};
use crate::{
    broker::{BrokerError, Link, Nodes},
    budget::Budget,
    config::relay_name,
    event::Event,
    pause::Pause,
    publish::{Fate, Guards, Published, Sender, StandsStill, publish},
    relay::exchange,
    row::{self, Row},
    rules::matches,
};

/// Events of one page at most, and bytes of them, but for an event that is larger by itself.
const PAGE: usize = 100;
const PAGE_BYTES: usize = 16 << 20;
/// Events of the first page: the server sends all of a page, whatever is taken of it.
const FIRST_PAGE: usize = 10;
/// How many times in a row retries may be in vain before the replay ends.
const ATTEMPTS: usize = 8;
/// How many events in a row the broker may refuse for themselves before the replay ends.
const REFUSED: u64 = 100;
/// While the replay waits, its row says this often that it lives.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// It waits no shorter for the retry budget.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);
/// How often the replay says where it is.
const REPORT: Duration = Duration::from_secs(1);
/// Finding the first event of a time may read an index over everything.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// What the broker is asked for beside publishing takes no longer.
const TIMEOUT: Duration = Duration::from_secs(10);
/// When the broker answers nothing for so long, it does not answer for what it was sent.
const SILENCE: Duration = Duration::from_secs(10);

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
    /// Made at or after this time: RFC 3339, a date (2026-11-27, in UTC), `today`, `yesterday`, or a duration
    /// (24h) for so long ago.
    #[arg(long, value_parser = super::when::time, value_name = "TIME")]
    pub since: Option<DateTime<Utc>>,
    /// Made before this time.
    #[arg(long, value_parser = super::when::time, value_name = "TIME")]
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
FROM outbox.readable e
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
    let finished = ended.with_context(|| {
        let published = many(i64::try_from(progress.events).unwrap_or(i64::MAX), "event");
        format!("stopped with {published} published; {}", progress.go_on())
    })?;
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
            let _ = write!(text, "; {} more, which cannot be published (the log says why)", progress.refused);
        }
        if !finished {
            let _ = write!(text, "; interrupted: {}", progress.go_on());
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
            let rows = self.read(conn, progress.next).await?;
            let Some(last) = rows.last().map(Row::position) else { return Ok(true) };
            let first = *first.get_or_insert(rows[0].position());
            let (events, unreadable) = row::split(rows);
            for row in unreadable {
                progress.refused += 1;
                tracing::warn!(position = row.position, why = row.reason, "not replayed");
            }
            let chosen: Vec<Event> = events.into_iter().filter(|event| self.takes(event)).collect();
            match &mut self.target {
                None => progress.events += chosen.len() as u64,
                Some(target) => {
                    let mut alive = Alive { id: self.id, conn: &mut *conn, said: Instant::now() };
                    if !target.publish(&self.source, chosen, progress, &mut alive, stop).await? {
                        return Ok(false);
                    }
                }
            }
            let Some(next) = last.checked_add(1) else { return Ok(true) };
            progress.next = next;
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

    async fn read(&mut self, conn: &mut PgConnection, from: i64) -> anyhow::Result<Vec<Row>> {
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
        let (mut page, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.try_next().await.context("the events could not be read")? {
            bytes += row.size();
            page.push(row);
            if bytes >= PAGE_BYTES {
                break;
            }
        }
        self.page = if bytes < PAGE_BYTES { PAGE.min(self.page * 2) } else { page.len() };
        Ok(page)
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
    /// What may be tried again: the relay's own rule.
    budget: Budget,
}

impl Target {
    async fn open(args: &ReplayArgs, id: Uuid) -> anyhow::Result<Self> {
        let nodes = Nodes {
            nodes: args.broker.nodes(args.common.database.require_tls)?,
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
        let target = Self { nodes, exchange, queue, link, budget: Budget::new(Instant::now()) };
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
                    "the queue {queue} does not exist, or this user may not bind to it; the user of AMQP_URL needs \
                     configure, write and read on outbox-replay.*, and write on the queue"
                )
            })
    }

    /// Publishes a page, each aggregate's events in their order. What is not taken is tried again within the retry
    /// budget, until the broker takes nothing of it for long. False when it was interrupted.
    async fn publish(
        &mut self,
        source: &str,
        mut events: Vec<Event>,
        progress: &mut Progress,
        alive: &mut Alive<'_>,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        for event in &mut events {
            event.headers.get_or_insert_default().insert("replayed".to_owned(), true.into());
        }
        let mut page = Page::new(&events);
        let published = self.publish_page(source, &mut page, progress, alive, stop).await;
        if let Some(first) = page.first_left() {
            // What was refused in a row may be taken once the cause is gone.
            let first = progress.refused_in_a_row.map_or(first, |(_, refused)| refused.min(first));
            progress.next = first;
            progress.again = page.published.iter().filter(|position| **position >= first).count();
        }
        published
    }

    async fn publish_page(
        &mut self,
        source: &str,
        page: &mut Page<'_>,
        progress: &mut Progress,
        alive: &mut Alive<'_>,
        stop: &CancellationToken,
    ) -> anyhow::Result<bool> {
        let (mut pause, mut rounds) = (Pause::default(), 0);
        while !page.left.is_empty() {
            if stop.is_cancelled() {
                return Ok(false);
            }
            if !self.link.channel.status().connected() {
                // The next attempt tells, when this one cannot.
                let _ = self.reconnect().await;
            }
            let window = page.window(&mut self.budget, Instant::now());
            if window.is_empty() {
                let until = self.budget.next().saturating_duration_since(Instant::now());
                alive.wait(until.max(SHORTEST_WAIT), stop).await?;
                continue;
            }
            let round = self.round(source, &window, page, progress).await?;
            if round.taken {
                rounds = 0;
                pause.reset();
            }
            let Some(why) = round.why else { continue };
            if round.tried && !round.taken {
                rounds += 1;
            }
            if rounds > ATTEMPTS {
                bail!("{why}");
            }
            if !round.taken {
                alive.wait(pause.step(), stop).await?;
            }
        }
        Ok(true)
    }

    /// Publishes one window, and takes out of the page what is settled.
    async fn round(
        &mut self,
        source: &str,
        window: &[&Event],
        page: &mut Page<'_>,
        progress: &mut Progress,
    ) -> anyhow::Result<Round> {
        let guards = Guards {
            allowed: &|| true,
            heard: &|| {},
            stands_still: StandsStill::GiveUp(&|still| still >= SILENCE),
        };
        let sender = Sender { link: &self.link, exchange: &self.exchange, source };
        let Published { fates, ended } = publish(sender, &self.link.channel, window, &guards).await;
        // The only one that it can be.
        let culprit = match &ended {
            Some(BrokerError::Refused(why)) if fates.iter().filter(|fate| fate.is_none()).count() == 1 => {
                Some(why.clone())
            }
            _ => None,
        };
        let mut round = Round { tried: false, taken: false, why: None };
        for (event, fate) in window.iter().zip(fates) {
            let fate = fate.or_else(|| culprit.clone().map(|why| Fate::Refused { why, certain: false }));
            let tried = page.tried.contains(&event.position);
            round.tried |= tried;
            match fate {
                Some(Fate::Unroutable) if self.queue.is_some() => bail!("the queue is gone"),
                Some(fate @ (Fate::Confirmed | Fate::Unroutable)) => {
                    round.taken |= tried;
                    if tried {
                        self.budget.succeeded(event.size());
                    }
                    progress.refused_in_a_row = None;
                    if fate == Fate::Confirmed {
                        progress.events += 1;
                        page.published.push(event.position);
                    } else {
                        progress.unroutable += 1;
                    }
                    page.settle(event);
                }
                Some(Fate::Refused { why, certain }) => {
                    // What was not sent has cost the broker nothing, and says nothing of others.
                    if !certain {
                        self.budget.failed();
                        progress.refused(event, &why)?;
                    }
                    tracing::warn!(event = %event.id, why, "not replayed");
                    progress.refused += 1;
                    page.settle(event);
                }
                Some(Fate::Nacked) => {
                    page.again(event, &mut self.budget);
                    round.why = Some(format!(
                        "the broker refuses event {} of type {} for now; is a queue at its limit?",
                        event.id, event.type_
                    ));
                }
                Some(Fate::Silent) => {
                    page.again(event, &mut self.budget);
                    round.why = Some(format!(
                        "the broker does not answer for event {} of type {}; has a queue lost the majority of its \
                         nodes?",
                        event.id, event.type_
                    ));
                }
                None => page.again(event, &mut self.budget),
            }
        }
        match ended {
            None => {}
            Some(BrokerError::Refused(why)) => {
                // Which event it is, is found out one by one.
                if culprit.is_none() {
                    page.alone = true;
                    round.why = Some(format!("the broker refused: {why}"));
                }
                self.reopen().await;
            }
            Some(error @ BrokerError::Silent(_)) => {
                round.why.get_or_insert_with(|| error.to_string());
                self.reopen().await;
            }
            Some(error) => {
                // One of several events may have ended it again.
                page.alone |= round.tried;
                round.why = Some(self.link.reason(error).await.to_string());
            }
        }
        Ok(round)
    }

    /// Another channel, on the same connection if that is still there. If there is none, the next round connects.
    async fn reopen(&mut self) {
        if self.link.condition().is_err() || self.link.reopen().await.is_err() {
            let _ = self.reconnect().await;
        }
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

/// What a window came to.
struct Round {
    /// It had an event that was tried before.
    tried: bool,
    /// One of those was taken.
    taken: bool,
    /// Why something of it has to be tried again.
    why: Option<String>,
}

/// A page that is being published.
struct Page<'a> {
    /// What is not settled, in order of position.
    left: Vec<&'a Event>,
    /// Positions of what was tried before: from then on it is a retry.
    tried: HashSet<i64>,
    /// Positions of what the broker has.
    published: Vec<i64>,
    /// The broker refused one of several events: from then on each goes out by itself.
    alone: bool,
}

impl<'a> Page<'a> {
    fn new(events: &'a [Event]) -> Self {
        Self { left: events.iter().collect(), tried: HashSet::new(), published: Vec::new(), alone: false }
    }

    /// What is published at once: of each aggregate its first event, so that none overtakes another that is tried
    /// again; of each id one, by which a returned message is known; and no more retries than the budget allows.
    fn window(&self, budget: &mut Budget, now: Instant) -> Vec<&'a Event> {
        let (mut aggregates, mut ids, mut window) = (HashSet::new(), HashSet::new(), Vec::new());
        for event in &self.left {
            let first =
                aggregates.insert((&event.aggregate_type, &event.aggregate_id)) && ids.insert(event.id);
            if first && (!self.tried.contains(&event.position) || budget.take(event.size(), now)) {
                window.push(*event);
                if self.alone {
                    break;
                }
            }
        }
        window
    }

    /// It was not taken, or it is not known.
    fn again(&mut self, event: &Event, budget: &mut Budget) {
        if !self.tried.insert(event.position) {
            budget.failed();
        }
    }

    fn settle(&mut self, event: &Event) {
        self.left.retain(|left| left.position != event.position);
    }

    fn first_left(&self) -> Option<i64> {
        self.left.first().map(|event| event.position)
    }
}

/// The replay's row, which says that it lives: retention keeps away from what it has still to read.
struct Alive<'a> {
    id: Uuid,
    conn: &'a mut PgConnection,
    /// When it was said last.
    said: Instant,
}

impl Alive<'_> {
    /// Waits, or ends early when `stop` says so, and says meanwhile that the replay lives.
    async fn wait(&mut self, pause: Duration, stop: &CancellationToken) -> anyhow::Result<()> {
        let mut left = pause;
        loop {
            let part = left.min(HEARTBEAT);
            stop.run_until_cancelled(tokio::time::sleep(part)).await;
            // Waits for the retry budget are much shorter.
            if self.said.elapsed() >= HEARTBEAT / 10 {
                self.said = Instant::now();
                sqlx::query("UPDATE outbox.replay SET heartbeat_at = now() WHERE id = $1")
                    .bind(self.id)
                    .execute(&mut *self.conn)
                    .await
                    .context("the replay could not say that it lives")?;
            }
            left -= part;
            if left.is_zero() || stop.is_cancelled() {
                return Ok(());
            }
        }
    }
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
        let now = Instant::now();
        let split = |alone, tried: &[i64], budget: &mut Budget| {
            let mut page = Page::new(&events);
            page.alone = alone;
            page.tried.extend(tried);
            page.window(budget, now).iter().map(|event| event.position).collect::<Vec<_>>()
        };
        assert_eq!(split(false, &[], &mut Budget::new(now)), [1, 2, 5]);
        assert_eq!(split(true, &[], &mut Budget::new(now)), [1]);
        // Without a budget for its retry, an event keeps back those behind it, and no others.
        let mut spent = Budget::new(now);
        while spent.take(0, now) {}
        assert_eq!(split(false, &[1], &mut spent), [2, 5]);
        assert_eq!(split(true, &[1], &mut spent), [2]);
    }
}
