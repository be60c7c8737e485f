//! Requests of operators, which another program wrote into `inbox.request`: only this process has the handler.
//!
//! [`ask`] writes one down, [`list`] tells what came of them, [`stop`] ends one. The processes of the consumer work them
//! off, one at a time, beside consuming.

use std::{collections::BTreeMap, time::Duration};

use amqp::Backoff;
use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, PgPool, types::Json};
use tokio::{sync::watch, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{Handler, Redrive, RedriveSummary, Sequencer, handler::describe, held::Filter};

/// How often a process looks for requests.
const ROUND: Duration = Duration::from_secs(3);
/// How often it writes how far it is, and looks whether it should stop.
const PULSE: Duration = Duration::from_secs(1);
/// How many events one transaction takes at most.
const BATCH: usize = 64;

/// What an operator asks for.
#[derive(Clone, Debug)]
pub struct Ask<'a> {
    /// Which held events.
    pub filter: &'a Filter,
    /// Call the handler and roll back.
    pub dry_run: bool,
    /// The operator.
    pub operator: &'a str,
    /// The reason. It is stored for good, so it must not contain personal data.
    pub why: &'a str,
}

/// A request, and what came of it.
#[derive(Clone, Debug, Serialize, sqlx::FromRow)]
pub struct Request {
    /// Its number.
    pub id: i64,
    /// The operator.
    pub operator: String,
    /// The reason.
    pub why: String,
    /// Of this aggregate alone.
    pub aggregate_type: Option<String>,
    /// Its id.
    pub aggregate_id: Option<String>,
    /// Events with this reason alone.
    pub reason: Option<String>,
    /// Events with an error that contains this alone.
    pub error: Option<String>,
    /// The handler is called, and everything it did is rolled back.
    pub dry_run: bool,
    /// When it was written down.
    pub asked_at: DateTime<Utc>,
    /// The operator asks for its end.
    pub stop: bool,
    /// When a process began with it.
    pub taken_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// How many aggregates were tried so far.
    pub aggregates: i64,
    /// How many events were applied so far.
    pub applied: i64,
    /// How many aggregates an event stops again.
    pub refused: i64,
    /// How many events of the aggregates are still held.
    pub held: i64,
    /// How many aggregates each error stops.
    pub errors: Json<BTreeMap<String, u64>>,
    /// `done`, `stopped` or `failed`.
    pub outcome: Option<String>,
    /// Why it failed.
    pub failure: Option<String>,
}

/// The next one that no process works off. A process that is silent for a minute has died.
const TAKE: &str = "
UPDATE inbox.request r SET taken_at = coalesce(r.taken_at, now()), taken_by = $2, heartbeat_at = now()
FROM (SELECT id FROM inbox.request
      WHERE consumer = $1 AND ended_at IS NULL AND (heartbeat_at IS NULL OR heartbeat_at < now() - interval '1 minute')
      ORDER BY id LIMIT 1 FOR UPDATE SKIP LOCKED) AS next
WHERE r.id = next.id
RETURNING r.id, r.operator, r.aggregate_type, r.aggregate_id, r.reason, r.error, r.dry_run";

/// Says how far it is, and learns whether it should stop.
const PROGRESS: &str = "
UPDATE inbox.request SET heartbeat_at = now(), aggregates = $2, applied = $3, refused = $4, held = $5, errors = $6
WHERE id = $1 RETURNING stop";

const END: &str = "
UPDATE inbox.request
SET ended_at = clock_timestamp(), aggregates = $2, applied = $3, refused = $4, held = $5, errors = $6, outcome = $7,
    failure = $8
WHERE id = $1 AND ended_at IS NULL";

/// Writes a request down. Returns its number.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// use inbox::{held::Filter, requests::{self, Ask}};
///
/// let poison = Filter { reason: Some("poison".to_owned()), ..Filter::default() };
/// let ask = Ask { filter: &poison, dry_run: false, operator: "ann", why: "the stock service is back" };
/// let id = requests::ask(conn, "stock", &ask).await?;
/// # Ok(())
/// # }
/// ```
pub async fn ask(conn: &mut PgConnection, consumer: &str, ask: &Ask<'_>) -> sqlx::Result<i64> {
    let (aggregate_type, aggregate_id) = ask.filter.aggregate.clone().unzip();
    sqlx::query_scalar(
        "INSERT INTO inbox.request (consumer, operator, why, aggregate_type, aggregate_id, reason, error, dry_run)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
    )
    .bind(consumer)
    .bind(ask.operator)
    .bind(ask.why)
    .bind(aggregate_type)
    .bind(aggregate_id)
    .bind(&ask.filter.reason)
    .bind(&ask.filter.error)
    .bind(ask.dry_run)
    .fetch_one(conn)
    .await
}

/// The last `limit` requests, the newest first.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// for request in inbox::requests::list(conn, "stock", 10).await? {
///     println!("{}: {:?}, {} applied", request.id, request.outcome, request.applied);
/// }
/// # Ok(())
/// # }
/// ```
pub async fn list(conn: &mut PgConnection, consumer: &str, limit: i64) -> sqlx::Result<Vec<Request>> {
    sqlx::query_as(
        "SELECT id, operator, why, aggregate_type, aggregate_id, reason, error, dry_run, asked_at, stop, taken_at,
                ended_at, aggregates, applied, refused, held, errors, outcome, failure
         FROM inbox.request WHERE consumer = $1 ORDER BY id DESC LIMIT $2",
    )
    .bind(consumer)
    .bind(limit)
    .fetch_all(conn)
    .await
}

/// Asks for the end of a request. What was applied by then is kept. False where it has ended.
///
/// ```
/// # async fn example(conn: &mut sqlx::PgConnection) -> sqlx::Result<()> {
/// inbox::requests::stop(conn, "stock", 7).await?;
/// # Ok(())
/// # }
/// ```
pub async fn stop(conn: &mut PgConnection, consumer: &str, id: i64) -> sqlx::Result<bool> {
    let sql = "UPDATE inbox.request SET stop = true WHERE consumer = $1 AND id = $2 AND ended_at IS NULL";
    Ok(sqlx::query(sql).bind(consumer).bind(id).execute(conn).await?.rows_affected() > 0)
}

#[derive(Debug, sqlx::FromRow)]
struct Taken {
    id: i64,
    operator: String,
    aggregate_type: Option<String>,
    aggregate_id: Option<String>,
    reason: Option<String>,
    error: Option<String>,
    dry_run: bool,
}

/// Works requests off, until `stop`.
pub(crate) async fn work_off<H: Handler>(sequencer: &Sequencer<H>, stop: &CancellationToken) {
    let process = format!("{}", std::process::id());
    let (mut pause, mut backoff) = (ROUND, Backoff::default());
    while stop.run_until_cancelled(sleep(pause)).await.is_some() {
        // A database that does not respond must not delay the end of the process.
        let taken = stop.run_until_cancelled(take(sequencer, &process)).await;
        let Some(taken) = taken else { return };
        match taken {
            Ok(None) => (pause, backoff) = (ROUND, Backoff::default()),
            Ok(Some(taken)) => {
                work(sequencer, &taken, stop).await;
                pause = Duration::ZERO;
            }
            Err(error) => {
                pause = backoff.step().max(ROUND);
                tracing::debug!(error = describe(&error), "no look at the requests of operators");
            }
        }
    }
}

async fn take<H>(sequencer: &Sequencer<H>, process: &str) -> sqlx::Result<Option<Taken>> {
    sqlx::query_as(TAKE).bind(&sequencer.consumer).bind(process).fetch_optional(&sequencer.pool).await
}

/// Works one off, and writes every second how far it is.
async fn work<H: Handler>(sequencer: &Sequencer<H>, taken: &Taken, stop: &CancellationToken) {
    let Taken { id, operator, dry_run, .. } = taken;
    let (consumer, dry_run) = (&sequencer.consumer, *dry_run);
    tracing::warn!(
        consumer,
        request = id,
        operator,
        dry_run,
        "held events are applied again, as an operator asked"
    );
    let filter = Filter {
        aggregate: taken.aggregate_type.clone().zip(taken.aggregate_id.clone()),
        reason: taken.reason.clone(),
        error: taken.error.clone(),
    };
    let redrive = Redrive { filter, batch: BATCH, dry_run };
    let (own_stop, so_far) = (stop.child_token(), watch::Sender::new(RedriveSummary::default()));
    let redriven = async {
        let _ended = own_stop.clone().drop_guard();
        sequencer
            .redrive_until(&redrive, &own_stop, |summary| drop(so_far.send_replace(summary.clone())))
            .await
    };
    let pulse = async {
        while own_stop.run_until_cancelled(sleep(PULSE)).await.is_some() {
            let summary = so_far.borrow().clone();
            // A pulse that fails is made up for by the next one.
            if let Ok(true) = progress(&sequencer.pool, *id, &summary).await {
                own_stop.cancel();
            }
        }
    };
    let (done, ()) = tokio::join!(Box::pin(redriven), pulse);
    let (summary, outcome, failure) = match done {
        Ok(summary) if summary.interrupted && stop.is_cancelled() => {
            // The process ends, and the request does not: another process goes on with it.
            let _away = progress(&sequencer.pool, *id, &summary).await;
            return;
        }
        Ok(summary) if summary.interrupted => (summary, "stopped", None),
        Ok(summary) => (summary, "done", None),
        Err(error) => (so_far.borrow().clone(), "failed", Some(error.to_string())),
    };
    let ended = end(&sequencer.pool, *id, &summary, outcome, failure).await;
    if let Err(error) = ended {
        // It is begun again in a minute. What was applied is not held any more.
        tracing::warn!(
            consumer,
            request = id,
            error = describe(&error),
            "the end of a request could not be written"
        );
    }
}

async fn progress(pool: &PgPool, id: i64, summary: &RedriveSummary) -> sqlx::Result<bool> {
    let query = sqlx::query_scalar(PROGRESS).bind(id);
    let query =
        query.bind(number(summary.aggregates)).bind(number(summary.applied)).bind(number(summary.refused));
    query.bind(summary.held).bind(Json(&summary.errors)).fetch_one(pool).await
}

async fn end(
    pool: &PgPool,
    id: i64,
    summary: &RedriveSummary,
    outcome: &str,
    failure: Option<String>,
) -> sqlx::Result<()> {
    let query = sqlx::query(END).bind(id);
    let query =
        query.bind(number(summary.aggregates)).bind(number(summary.applied)).bind(number(summary.refused));
    let query = query.bind(summary.held).bind(Json(&summary.errors)).bind(outcome).bind(failure);
    query.execute(pool).await.map(drop)
}

fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
