//! `rebuild`: builds a second read model (the shadow) beside the live one, from history or baselines and from live
//! events, and replaces the live one in one transaction.
//!
//! The state of a rebuild is stored in `score.model`. A command that was killed can be run again, and finishes.

mod abort;
mod carry;
mod compare;
mod count;
mod difference;
mod drop;
mod emit;
mod progress;
mod start;
mod status;
mod swap;

use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use daemon::{
    command::{CommandArgs, Verdict},
    config::broker::BrokerArgs,
    progress::Progress,
};
use inbox::Config;
use outbox::database::{Failure, again};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Postgres, Transaction};
use tokio::time::Instant;

use crate::{broker, publish, schema};

/// Settings of `rebuild`.
#[derive(Debug, clap::Args)]
pub struct RebuildArgs {
    /// The database, as the owner of its schemas, and the output format.
    #[command(flatten)]
    pub common: CommandArgs,
    /// The step.
    #[command(subcommand)]
    pub action: RebuildAction,
}

/// The steps of a rebuild.
#[derive(Debug, clap::Subcommand)]
pub enum RebuildAction {
    /// Create an empty shadow of the read model and a queue for it. Every running score-projector then applies live
    /// events to the shadow. Prints the command that fills it from the source.
    Start {
        /// The live queue. The shadow's queue is named after it.
        #[arg(long, env = "QUEUE", default_value = "score", value_name = "NAME")]
        queue: String,
        /// The broker.
        #[command(flatten)]
        broker: BrokerArgs,
    },
    /// Print how far the shadow is, and what it misses. Exit code 3 until `swap` is possible.
    ///
    /// It compares the versions in the inbox, and not the models. An aggregate is behind when the shadow has not reached
    /// the version of the live model within a second. Where thousands are not level, the numbers are estimates.
    Status {
        /// Also compare the two models, and print what differs. It reads both of them whole, page by page.
        #[arg(long)]
        difference: bool,
    },
    /// Make the shadow the live model, publish the differences, and keep the old model.
    Swap {
        /// The broker.
        #[command(flatten)]
        broker: BrokerArgs,
        /// Do everything except the last step, and print how many events would be published.
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove the shadow, its queue and its rows in the inbox.
    Abort {
        /// The broker.
        #[command(flatten)]
        broker: BrokerArgs,
    },
    /// Remove the old model that a swap has kept, and its rows in the inbox.
    Drop,
}

/// The timeout of a statement: dropping large tables takes long.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);
/// How often a lock is tried, with growing pauses.
const LOCK_ATTEMPTS: u32 = 60;
const LOCK_PAUSE: Duration = Duration::from_millis(500);
/// The time in which the consumers of a removed shadow must end.
const CONSUMERS_END: Duration = Duration::from_secs(30);
/// Rows of the inbox that one transaction removes.
const BATCH: i64 = 10_000;

/// Runs a step.
pub async fn rebuild(args: &RebuildArgs) -> anyhow::Result<Verdict> {
    let mut conn =
        args.common.connect("score-projector rebuild", &schema::needed(), STATEMENT_TIMEOUT).await?;
    if let RebuildAction::Start { broker, .. }
    | RebuildAction::Swap { broker, .. }
    | RebuildAction::Abort { broker } = &args.action
    {
        broker.nodes(args.common.database.require_tls)?;
    }
    if let RebuildAction::Swap { .. } = &args.action {
        publish::hand_over_chains(&mut conn).await.map_err(|error| anyhow!(publish::reason(&error)))?;
    }
    let verdict = match &args.action {
        RebuildAction::Start { queue, broker } => start::start(args, &mut conn, broker, queue).await,
        RebuildAction::Status { difference } => status::status(args, &mut conn, *difference).await,
        RebuildAction::Swap { broker, dry_run } => swap::swap(args, &mut conn, broker, *dry_run).await,
        RebuildAction::Abort { broker } => abort::abort(args, &mut conn, broker).await,
        RebuildAction::Drop => drop::drop(args, &mut conn).await,
    }?;
    conn.close().await?;
    Ok(verdict)
}

/// Waits until no connection writes to the removed shadow, then deletes its queue.
async fn remove_queue(conn: &mut PgConnection, broker: &BrokerArgs, queue: &str) -> anyhow::Result<()> {
    const TRY: &str = "SELECT pg_try_advisory_lock('score.model'::regclass::oid::int, 1)";
    let deadline = Instant::now() + CONSUMERS_END;
    while !sqlx::query_scalar::<_, bool>(TRY).fetch_one(&mut *conn).await? {
        if Instant::now() > deadline {
            bail!(
                "a score-projector still consumes from the queue {queue}, so the queue was not deleted. End that \
                 process, or wait until the server ends its session. Then run this command again"
            );
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The lock goes with the connection.
    match inbox::remove(&config(broker, queue)?).await {
        Ok(()) => Ok(()),
        Err(reason) => bail!("the queue {queue} was not deleted: {reason}. Run this command again"),
    }
}

fn config(args: &BrokerArgs, queue: &str) -> anyhow::Result<Config> {
    Ok(Config::new(broker::topology(queue)?, broker::nodes(args, false)?, "score-projector rebuild"))
}

/// The tables of the inbox that have rows of a consumer, with the rest of a key, as it is and as texts, and the values of a
/// key from such texts.
const OF_CONSUMER: [(&str, &str, &str, &str); 4] = [
    (
        "held",
        "source, aggregate_type, aggregate_id, version",
        "source, aggregate_type, aggregate_id, version::text",
        "$3[1], $3[2], $3[3], $3[4]::bigint",
    ),
    ("rejected", "digest", "encode(digest, 'hex')", "decode($3[1], 'hex')"),
    (
        "aggregate",
        "source, aggregate_type, aggregate_id",
        "source, aggregate_type, aggregate_id",
        "$3[1], $3[2], $3[3]",
    ),
    ("source", "name", "name", "$3[1]"),
];

/// Removes a consumer's rows in the inbox, in batches. Each begins where the last one ended, and not at the rows that
/// were removed, which stay in the index for as long as another session may see them.
async fn remove_consumer(
    conn: &mut PgConnection,
    consumer: &str,
    progress: &Progress,
) -> anyhow::Result<u64> {
    progress.step("removing its rows in the inbox", "row");
    let mut removed: u64 = 0;
    for (table, key, texts, values) in OF_CONSUMER {
        let sql = format!(
            "WITH gone AS (
                 DELETE FROM inbox.{table} WHERE ctid = ANY (ARRAY(
                     SELECT ctid FROM inbox.{table}
                     WHERE consumer = $1 AND ($3::text[] IS NULL OR ({key}) > ({values}))
                     ORDER BY consumer, {key} LIMIT $2))
                 RETURNING {key})
             SELECT (SELECT count(*) FROM gone), ARRAY[{texts}] FROM gone ORDER BY ({key}) DESC LIMIT 1"
        );
        let mut last: Option<Vec<String>> = None;
        loop {
            let batch: Option<(i64, Vec<String>)> = again(async || {
                sqlx::query_as(AssertSqlSafe(&*sql))
                    .bind(consumer)
                    .bind(BATCH)
                    .bind(&last)
                    .fetch_optional(&mut *conn)
                    .await
            })
            .await
            .with_context(|| format!("the rows of {consumer} in the inbox were not removed"))?;
            let Some((rows, end)) = batch else { break };
            removed += rows.unsigned_abs();
            progress.count(removed);
            last = Some(end);
        }
    }
    Ok(removed)
}

/// Whether another try may succeed: a lock was not free in time, or the server preferred another transaction.
fn is_lock(error: &sqlx::Error) -> bool {
    matches!(Failure::of(error), Failure::Locked | Failure::Conflict)
}

/// Limits waits for locks in the rest of the transaction, since other sessions queue behind such a wait.
async fn limit_locks(tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
    sqlx::query("SET LOCAL lock_timeout = '300ms'").execute(&mut **tx).await.map(::std::mem::drop)
}

/// Pauses before the next attempt to get a lock.
async fn pause(attempt: u32) {
    tokio::time::sleep((Duration::from_millis(20) * attempt).min(LOCK_PAUSE)).await;
}
