//! `backfill`: the state of captured aggregates is published as baselines, in batches, beside their writers: to everybody
//! by the outbox, or to one queue alone.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail};
use chrono::Utc;
use daemon::{config::broker::BrokerArgs, progress::Progress, shutdown::Shutdown};
use lapin::types::ShortString;
use outbox::database::Failure;
use serde_json::{Map, Value, json};
use sqlx::{Connection, PgConnection, postgres::PgDatabaseError};
use tokio::{sync::mpsc, time::sleep};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    CommandArgs, Verdict, connect, many,
    replay::{
        Outcome, Range, ReplayArgs,
        history::{Page, Read},
        publisher::Publisher,
    },
};
use crate::{event::Event, message::Origin, relay::exchange};

/// A batch is a transaction, and its writers wait for it.
const BATCH: i64 = 100;
/// Keys that are compared at a time.
const PAGE: i64 = 1_000;
/// Counting reads a whole index.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(5);
/// A batch that meets writers in another order of locks is repeated so many times.
const ATTEMPTS: u32 = 5;
/// Batches that are read ahead of the broker.
const AHEAD: usize = 2;

/// Settings of `backfill`.
#[derive(Debug, clap::Args)]
pub struct BackfillArgs {
    /// The database, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The broker; needed with `--to-queue` alone.
    #[command(flatten)]
    pub broker: BrokerArgs,
    /// The captured aggregate type: `order`.
    pub aggregate_type: String,
    /// Only aggregates whose row fulfils this condition; `o` is the row: `o.created_at > '2026-01-01'`. This role needs
    /// SELECT on the table then.
    #[arg(long = "where", value_name = "SQL")]
    pub condition: Option<String>,
    /// Only aggregates that differ from their last event, as `doctor --deep` finds them; also the deletions of those whose
    /// row is gone.
    #[arg(long, conflicts_with_all = ["condition", "to_queue"])]
    pub differing: bool,
    /// Only those after this one, in the order of the key: where an interrupted backfill stopped.
    #[arg(long, value_name = "ID", conflicts_with = "differing")]
    pub after: Option<String>,
    /// Publish to this queue alone, past the outbox. Nobody else sees anything of it.
    #[arg(long, value_name = "NAME")]
    pub to_queue: Option<String>,
    /// The exchange that the relay publishes to.
    #[arg(long, env = "EXCHANGE", default_value = "event_dispatcher", value_parser = exchange)]
    pub exchange: ShortString,
    /// Add the attributes of CloudEvents to each message, as the relay does with this setting.
    #[arg(long, env = "CLOUDEVENTS")]
    pub cloudevents: bool,
    /// Aggregates per second at most.
    #[arg(long, default_value = "1000", value_parser = clap::value_parser!(u32).range(1..))]
    pub rate: u32,
    /// Only count.
    #[arg(long)]
    pub dry_run: bool,
}

/// What a backfill has done.
#[derive(Debug, Default)]
struct Done {
    /// Aggregates that were looked at.
    aggregates: u64,
    /// Events that were published.
    events: u64,
    /// Messages that the broker refused for themselves.
    refused: u64,
    /// The last aggregate that is done.
    last: Option<String>,
}

/// Publishes baselines. Ctrl-C ends it after the batch that is under way, and it says where to go on.
pub async fn backfill(args: &BackfillArgs) -> anyhow::Result<Verdict> {
    let mut conn = connect(&args.common, "backfill", STATEMENT_TIMEOUT).await?;
    let type_ = &args.aggregate_type;
    let known = "SELECT EXISTS (SELECT FROM outbox.captured WHERE aggregate_type = $1)";
    if !sqlx::query_scalar::<_, bool>(known).bind(type_).fetch_one(&mut conn).await? {
        bail!("the type {type_} is not captured; SELECT * FROM outbox.captured says what is");
    }
    let shutdown = Shutdown::on_signals()?;
    let stop = shutdown.requested();
    let mut done = Done { last: args.after.clone(), ..Done::default() };
    let said = Progress::new(format!("counting {type_}"), "aggregate");
    let all = if args.differing { None } else { Some(count(&mut conn, args).await?) };
    let finished = if args.dry_run {
        match all {
            Some(all) => done.aggregates = all,
            None => differing(&mut conn, args, &mut done, &said, stop).await?,
        }
        true
    } else {
        said.step(format!("publishing {type_}"), "aggregate");
        let worked = match (all, &args.to_queue) {
            (None, _) => differing(&mut conn, args, &mut done, &said, stop).await,
            (Some(all), None) => to_everybody(&mut conn, args, all, &mut done, &said, stop).await,
            (Some(all), Some(queue)) => to_queue(conn, args, queue, all, &mut done, &said, stop).await,
        };
        worked.with_context(|| {
            format!("stopped with {} published; {}", many(done.events, "event"), done.go_on())
        })?;
        !stop.is_cancelled()
    };
    drop(said);
    let answer = json!({
        "finished": finished, "dry_run": args.dry_run, "aggregates": done.aggregates, "events": done.events,
        "refused": done.refused, "last": done.last,
    });
    args.common.answer(&answer, || done.text(args.dry_run, finished))?;
    Ok(if finished && done.refused == 0 { Verdict::Ok } else { Verdict::Attention })
}

impl Done {
    fn go_on(&self) -> String {
        self.last.as_ref().map_or_else(
            || "run it again to go on".to_owned(),
            |last| format!("go on with --after '{}'", last.replace('\'', r"'\''")),
        )
    }

    fn text(&self, dry_run: bool, finished: bool) -> String {
        if dry_run {
            return format!("{} would be published", many(self.aggregates, "aggregate"));
        }
        let mut text = format!("{} published", many(self.events, "event"));
        if self.refused > 0 {
            let _ = write!(text, "; {} more, which cannot be published (the log says why)", self.refused);
        }
        if !finished {
            let _ = write!(text, "; interrupted: {}", self.go_on());
        }
        text
    }
}

/// The server's words with its advice: what the operator asked, or what the outbox says of the tables.
fn words(error: &sqlx::Error) -> anyhow::Error {
    let Some(said) = error.as_database_error() else {
        return anyhow!(outbox::database::reason(error));
    };
    let hint = said.try_downcast_ref::<PgDatabaseError>().and_then(PgDatabaseError::hint);
    hint.map_or_else(|| anyhow!("{}", said.message()), |hint| anyhow!("{}. {hint}", said.message()))
}

/// How many aggregates there are to tell.
async fn count(conn: &mut PgConnection, args: &BackfillArgs) -> anyhow::Result<u64> {
    let count: i64 = sqlx::query_scalar("SELECT count(*) FROM outbox.captured_keys($1, $2, $3, NULL)")
        .bind(&args.aggregate_type)
        .bind(&args.condition)
        .bind(&args.after)
        .fetch_one(conn)
        .await
        .map_err(|error| words(&error).context("the aggregates could not be counted"))?;
    Ok(count.unsigned_abs())
}

/// The next keys after the last one.
async fn keys(
    conn: &mut PgConnection,
    args: &BackfillArgs,
    after: Option<&str>,
) -> anyhow::Result<Vec<String>> {
    sqlx::query_scalar("SELECT k FROM outbox.captured_keys($1, $2, $3, $4) AS k")
        .bind(&args.aggregate_type)
        .bind(&args.condition)
        .bind(after)
        .bind(BATCH.min(i64::from(args.rate)))
        .fetch_all(conn)
        .await
        .map_err(|error| words(&error).context("the aggregates could not be read"))
}

/// Publishes the states of some aggregates, each under its chain's lock.
async fn publish(conn: &mut PgConnection, type_: &str, ids: &[String]) -> anyhow::Result<u64> {
    let mut attempt = 1;
    loop {
        let published = sqlx::query_scalar("SELECT outbox.publish_states($1, $2)").bind(type_).bind(ids);
        match published.fetch_one(&mut *conn).await {
            Ok(events) => return Ok(i64::unsigned_abs(events)),
            Err(error) if attempt < ATTEMPTS && Failure::of(&error) == Failure::Conflict => attempt += 1,
            Err(error) => return Err(words(&error).context("a batch could not be published")),
        }
    }
}

/// Waits until so many may have been published since the beginning.
async fn keep_pace(began: Instant, events: u64, rate: u32, stop: &CancellationToken) {
    #[expect(clippy::cast_precision_loss, reason = "it is exact to 2^52 events")]
    let due = Duration::from_secs_f64(events as f64 / f64::from(rate));
    stop.run_until_cancelled(sleep(due.saturating_sub(began.elapsed()))).await;
}

async fn to_everybody(
    conn: &mut PgConnection,
    args: &BackfillArgs,
    all: u64,
    done: &mut Done,
    said: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let began = Instant::now();
    while !stop.is_cancelled() {
        let ids = keys(conn, args, done.last.as_deref()).await?;
        let Some(last) = ids.last() else { break };
        done.events += publish(conn, &args.aggregate_type, &ids).await?;
        done.last = Some(last.clone());
        done.aggregates += ids.len() as u64;
        said.along((done.aggregates, all), done.aggregates);
        keep_pace(began, done.events, args.rate, stop).await;
    }
    Ok(())
}

async fn differing(
    conn: &mut PgConnection,
    args: &BackfillArgs,
    done: &mut Done,
    said: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut pages = Pages::differing(&args.aggregate_type);
    while !stop.is_cancelled()
        && let Some(page) = pages.next(conn).await?
    {
        let ids: Vec<String> = page.differs.into_iter().map(|(id, _)| id).collect();
        done.aggregates += ids.len() as u64;
        said.count(done.aggregates);
        if args.dry_run {
            continue;
        }
        for batch in ids.chunks(usize::try_from(BATCH)?) {
            done.events += publish(conn, &args.aggregate_type, batch).await?;
            keep_pace(began, done.events, args.rate, stop).await;
        }
    }
    Ok(())
}

/// Publishes past the outbox. Each batch reads bodies and versions of one moment. A live event that comes before or after
/// has another version, so the subscriber's copy is right whatever arrives first.
async fn to_queue(
    mut conn: PgConnection,
    args: &BackfillArgs,
    queue: &str,
    all: u64,
    done: &mut Done,
    said: &Progress,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let origin = Origin::from(&outbox::source(&mut conn).await?).with_cloudevents(args.cloudevents);
    let range =
        Range { from: None, to: None, since: None, until: None, aggregate: None, type_: None, all: true };
    let replay = ReplayArgs {
        common: args.common.clone(),
        broker: args.broker.clone(),
        name: String::new(),
        exchange: args.exchange.clone(),
        cloudevents: args.cloudevents,
        range,
        to_queue: Some(queue.to_owned()),
        to_everybody: false,
        yes: true,
        rate: args.rate,
        dry_run: false,
    };
    let mut publisher = Publisher::open(&replay, origin, Uuid::now_v7()).await?;
    let (send, read) = mpsc::channel(AHEAD);
    let mut states = States::new(args);
    let reading = async {
        if send.send(Ok(Read::Expected(all))).await.is_err() {
            return Ok(());
        }
        while let Some(page) = states.next(&mut conn, args).await? {
            if send.send(Ok(Read::Page(page))).await.is_err() {
                break;
            }
        }
        drop(send);
        anyhow::Ok(())
    };
    let mut outcome = Outcome::default();
    let (was_read, was_told) = tokio::join!(reading, publisher.publish(read, &mut outcome, None, said, stop));
    publisher.close().await;
    done.events = outcome.events;
    done.aggregates = outcome.events;
    done.refused = outcome.refused;
    // Positions here are those of this backfill: 1, 2, 3.
    if let Some(last) = states.last_below(outcome.next) {
        done.last = Some(last);
    }
    was_read?;
    was_told?;
    Ok(())
}

/// Reads the states of aggregates as events of a position each, from 1 on.
struct States {
    position: i64,
    after: Option<String>,
    /// The last key of each batch that is not known to be published, with its last position.
    ends: Vec<(i64, String)>,
}

impl States {
    fn new(args: &BackfillArgs) -> Self {
        Self { position: 0, after: args.after.clone(), ends: Vec::new() }
    }

    async fn next(&mut self, conn: &mut PgConnection, args: &BackfillArgs) -> anyhow::Result<Option<Page>> {
        let ids = keys(conn, args, self.after.as_deref()).await?;
        let Some(last) = ids.last() else { return Ok(None) };
        let type_ = &args.aggregate_type;
        // An aggregate without an event has no version yet that a subscriber could go on from.
        sqlx::query("SELECT outbox.begin_states($1, $2)").bind(type_).bind(&ids).execute(&mut *conn).await?;
        let mut tx = conn.begin_with("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
        let states: Vec<(String, i64, Uuid, String)> =
            sqlx::query_as("SELECT * FROM outbox.captured_states($1, $2)")
                .bind(type_)
                .bind(&ids)
                .fetch_all(&mut *tx)
                .await
                .map_err(|error| words(&error).context("the states of a batch could not be read"))?;
        tx.commit().await?;
        let mut headers = Map::new();
        headers.insert("baseline".to_owned(), Value::Bool(true));
        let mut events = Vec::with_capacity(states.len());
        for (aggregate_id, version, id, body) in states {
            self.position += 1;
            events.push(Event {
                position: self.position,
                // The subscriber's next event names it as the one before. An unknown one is named by nobody.
                id: if id.is_nil() { Uuid::now_v7() } else { id },
                aggregate_type: type_.clone(),
                aggregate_id,
                version,
                type_: format!("{type_}.baseline"),
                payload: body.into(),
                headers: Some(headers.clone()),
                // A baseline follows whatever was before.
                previous_id: None,
                created_at: Utc::now(),
            });
        }
        self.after = Some(last.clone());
        self.ends.push((self.position, last.clone()));
        Ok(Some(Page { up_to: self.position, events, unreadable: Vec::new() }))
    }

    /// The last key of the batches that lie below a position.
    fn last_below(&self, next: i64) -> Option<String> {
        self.ends.iter().take_while(|(end, _)| *end < next).last().map(|(_, key)| key.clone())
    }
}

/// The captured aggregates of a type that differ from their last event, page after page: first by the rows of the table, then
/// by the chains that live, for those whose row is gone.
#[derive(Debug)]
pub(super) struct Pages {
    type_: String,
    after: Option<String>,
    by_chain: bool,
}

/// What was found in a page.
#[derive(Debug)]
pub(super) struct Differing {
    /// So many were compared.
    pub(super) looked: i64,
    /// Which differ, and how.
    pub(super) differs: Vec<(String, String)>,
}

impl Pages {
    pub(super) fn differing(type_: &str) -> Self {
        Self { type_: type_.to_owned(), after: None, by_chain: false }
    }

    pub(super) async fn next(&mut self, conn: &mut PgConnection) -> sqlx::Result<Option<Differing>> {
        loop {
            let ask = if self.by_chain {
                "SELECT aggregate_id FROM outbox.aggregate
                 WHERE aggregate_type = $1 AND aggregate_id > coalesce($2, '') AND state <> 'ended'
                 ORDER BY aggregate_id LIMIT $3"
            } else {
                "SELECT k FROM outbox.captured_keys($1, NULL, $2, $3) AS k"
            };
            let ids: Vec<String> = sqlx::query_scalar(ask)
                .bind(&self.type_)
                .bind(&self.after)
                .bind(PAGE)
                .fetch_all(&mut *conn)
                .await?;
            let Some(last) = ids.last() else {
                if self.by_chain {
                    return Ok(None);
                }
                (self.by_chain, self.after) = (true, None);
                continue;
            };
            self.after = Some(last.clone());
            // A second look: what a writer is just committing differs for a moment.
            let differs = difference(conn, &self.type_, &ids).await?;
            let again: Vec<String> = differs.into_iter().map(|(id, _)| id).collect();
            let mut differs = difference(conn, &self.type_, &again).await?;
            differs.retain(|(_, how)| (how == "deleted") == self.by_chain);
            let looked = if self.by_chain { 0 } else { i64::try_from(ids.len()).unwrap_or(i64::MAX) };
            return Ok(Some(Differing { looked, differs }));
        }
    }
}

async fn difference(
    conn: &mut PgConnection,
    type_: &str,
    ids: &[String],
) -> sqlx::Result<Vec<(String, String)>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    sqlx::query_as("SELECT aggregate_id, differs FROM outbox.captured_difference($1, $2) ORDER BY 1")
        .bind(type_)
        .bind(ids)
        .fetch_all(conn)
        .await
}
