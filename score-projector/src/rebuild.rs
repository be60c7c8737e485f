//! `rebuild`: a second read model is built beside the live one, from history or baselines and from live
//! events together, and takes its place in one transaction.
//!
//! What is under way stands in `score.model`, so each command can be given again after it was killed,
//! and finishes what it finds.

mod abort;
mod carry;
mod difference;
mod drop;
mod emit;
mod progress;
mod start;
mod status;
mod swap;

use std::time::Duration;

use anyhow::{Context, bail};
use daemon::config::{
    broker::BrokerArgs,
    command::{CommandArgs, Verdict},
};
use inbox::Config;
use outbox::database::{Failure, again};
use sqlx::{Connection, PgConnection, Postgres, Transaction};
use tokio::time::Instant;

use crate::{broker, schema};

/// Settings of `rebuild`.
#[derive(Debug, clap::Args)]
pub struct RebuildArgs {
    /// The database, as the owner of its schemas, and the form of the answer.
    #[command(flatten)]
    pub common: CommandArgs,
    /// What to do.
    #[command(subcommand)]
    pub action: RebuildAction,
}

/// The steps of a rebuild.
#[derive(Debug, clap::Subcommand)]
pub enum RebuildAction {
    /// Begin: an empty shadow of the read model, which every running score-projector then fills from a
    /// queue of its own. Says what to run at the source.
    Start {
        /// The live queue; the shadow's is named after it.
        #[arg(long, env = "QUEUE", default_value = "score", value_name = "NAME")]
        queue: String,
        /// The broker.
        #[command(flatten)]
        broker: BrokerArgs,
    },
    /// How far the shadow is, what it still misses, and what would differ; exit code 3 until it may be
    /// swapped.
    Status,
    /// Let the shadow take the live model's place, publish what differs, and keep the old one.
    Swap {
        /// The broker.
        #[command(flatten)]
        broker: BrokerArgs,
        /// Do everything but the last step, and say what would be published.
        #[arg(long)]
        dry_run: bool,
    },
    /// Remove the shadow, its queue and its place in the inbox.
    Abort {
        /// The broker.
        #[command(flatten)]
        broker: BrokerArgs,
    },
    /// Remove the old model that a swap has left, and its place in the inbox.
    Drop,
}

/// Comparing two models reads both as a whole.
const STATEMENT_TIMEOUT: Duration = Duration::from_mins(10);
/// How often a lock is tried that is not given in time, with pauses that grow.
const LOCK_ATTEMPTS: u32 = 60;
const LOCK_PAUSE: Duration = Duration::from_millis(500);
/// How long the consumers of a shadow may take to end, once there is no shadow.
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
    let verdict = match &args.action {
        RebuildAction::Start { queue, broker } => start::start(args, &mut conn, broker, queue).await,
        RebuildAction::Status => status::status(args, &mut conn).await,
        RebuildAction::Swap { broker, dry_run } => swap::swap(args, &mut conn, broker, *dry_run).await,
        RebuildAction::Abort { broker } => abort::abort(args, &mut conn, broker).await,
        RebuildAction::Drop => drop::drop(args, &mut conn).await,
    }?;
    conn.close().await?;
    Ok(verdict)
}

/// Waits until nobody writes to the shadow that is no more, and then deletes its queue.
async fn remove_queue(conn: &mut PgConnection, broker: &BrokerArgs, queue: &str) -> anyhow::Result<()> {
    const TRY: &str = "SELECT pg_try_advisory_lock('score.model'::regclass::oid::int, 1)";
    let deadline = Instant::now() + CONSUMERS_END;
    while !sqlx::query_scalar::<_, bool>(TRY).fetch_one(&mut *conn).await? {
        if Instant::now() > deadline {
            bail!(
                "a score-projector still consumes from {queue}, which cannot be deleted before it ends; \
                 is one stopped or cut off? Then give this command again"
            );
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The lock goes with the connection.
    match inbox::remove(&config(broker, queue)?).await {
        Ok(()) => Ok(()),
        Err(reason) => bail!("the queue {queue} was not deleted, so give this command again: {reason}"),
    }
}

fn config(args: &BrokerArgs, queue: &str) -> anyhow::Result<Config> {
    Ok(Config::new(broker::topology(queue)?, broker::nodes(args, false)?, "score-projector rebuild"))
}

/// Removes a consumer's place in the inbox, in batches.
async fn remove_consumer(conn: &mut PgConnection, consumer: &str) -> anyhow::Result<u64> {
    let mut removed = 0;
    for sql in [
        "DELETE FROM inbox.held WHERE ctid = ANY (ARRAY(SELECT ctid FROM inbox.held WHERE consumer = $1 LIMIT $2))",
        "DELETE FROM inbox.rejected
         WHERE ctid = ANY (ARRAY(SELECT ctid FROM inbox.rejected WHERE consumer = $1 LIMIT $2))",
        "DELETE FROM inbox.aggregate
         WHERE ctid = ANY (ARRAY(SELECT ctid FROM inbox.aggregate WHERE consumer = $1 LIMIT $2))",
    ] {
        loop {
            let rows = again(async || sqlx::query(sql).bind(consumer).bind(BATCH).execute(&mut *conn).await)
                .await
                .with_context(|| format!("the place of {consumer} in the inbox was not removed"))?
                .rows_affected();
            removed += rows;
            if rows == 0 {
                break;
            }
        }
    }
    Ok(removed)
}

/// Whether a lock was not given in time, or another transaction was preferred: another try may succeed.
fn is_lock(error: &sqlx::Error) -> bool {
    matches!(Failure::of(error), Failure::Locked | Failure::Conflict)
}

/// For the rest of the transaction: what waits for a lock holds others up, so it waits shortly.
async fn limit_locks(tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<()> {
    sqlx::query("SET LOCAL lock_timeout = '300ms'").execute(&mut **tx).await.map(::std::mem::drop)
}

/// The pause before another attempt to get a lock.
async fn pause(attempt: u32) {
    tokio::time::sleep((Duration::from_millis(20) * attempt).min(LOCK_PAUSE)).await;
}
