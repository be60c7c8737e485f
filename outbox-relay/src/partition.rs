//! Partitions of the outbox: made ahead, and emptied when they are older than what is kept.

use std::time::Duration;

use amqp::Backoff;
use daemon::{
    config::database::{Database, Failure},
    health::Part,
};
use outbox::database::{Attempts, is_conflict};
use serde::Serialize;
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use crate::task_connection::TaskConnection;

/// How often somebody looks whether there is a partition to be made or emptied.
const ROUND: Duration = Duration::from_secs(10);
/// A round takes no longer. Looking for baselines reads an index over a whole partition.
const TIMEOUT: Duration = Duration::from_mins(5);
/// In seconds, 3,000 years: the server's calendar begins in the year -4713.
const LONGEST_KEPT: f64 = 1e11;

/// How the outbox is partitioned, and for how long events are kept.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct PartitionArgs {
    /// Positions of each new partition of the outbox.
    #[arg(long, env = "PARTITION_SIZE", default_value = "1000000", value_parser = clap::value_parser!(i64).range(1_000..=1_000_000_000))]
    pub partition_size: i64,
    /// Partitions that are made before they are needed.
    #[arg(long, env = "PARTITIONS_AHEAD", default_value = "2", value_parser = clap::value_parser!(i64).range(1..=100))]
    pub partitions_ahead: i64,
    /// Empty partitions that have been full for longer than this, by the server's clock: settled by every relay name, not set aside,
    /// not being replayed, and with a newer baseline of each aggregate. Without it everything is kept.
    #[arg(long, env = "KEEP", value_parser = daemon::config::duration, value_name = "DURATION")]
    pub keep: Option<Duration>,
    /// With --keep: empty them also when an aggregate has no newer baseline, so that its history cannot be
    /// replayed any more.
    #[arg(long, env = "WITHOUT_BASELINE")]
    pub without_baseline: bool,
}

/// A partition, and what is to become of it.
#[derive(Debug, Serialize)]
pub struct Partition {
    /// Its name.
    pub name: String,
    /// The first position after it; none for the net.
    pub upper: Option<i64>,
    /// Why its events are kept; none when they may be, or were, retired.
    pub kept: Option<String>,
}

/// Keeps partitions ahead of the writers, and retires what need not be kept, until `stop`. What goes
/// wrong here stops no event: it is shown, and tried again.
pub(crate) async fn maintain(
    database: Database,
    args: PartitionArgs,
    health: Part,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut pause = Backoff::new(ROUND, ROUND * 6);
    let mut last_logged = None;
    let timeout = TIMEOUT.as_millis().to_string();
    let database = database.named("outbox-relay partitions").quiet().with("statement_timeout", timeout);
    let mut connection = TaskConnection::new(database);
    loop {
        let round = tokio::time::timeout(TIMEOUT, round(&mut connection, args));
        match stop.run_until_cancelled(round).await {
            None => break,
            Some(Err(_)) => {
                health.attention(format!("looking after partitions took longer than {TIMEOUT:?}"));
            }
            Some(Ok(Ok(Round { fallen: true, .. }))) => {
                pause.reset();
                health.attention(
                    "events have fallen into outbox.event_default, because no partition was there for them \
                     in time; nothing is lost, and they are published; look at PARTITION_SIZE and \
                     PARTITIONS_AHEAD, and retire them with outbox-relay prune",
                );
            }
            Some(Ok(Ok(round))) => {
                pause.reset();
                health.ready();
                if last_logged != round.kept_because {
                    if let Some(reason) = &round.kept_because {
                        tracing::info!(reason, "nothing more can be retired for now");
                    }
                    last_logged = round.kept_because;
                }
            }
            // The relay says so itself when the database is away; a lock that is taken is tried again.
            Some(Ok(Err(error))) => match Failure::of(&error) {
                Failure::Locked => tracing::debug!("a partition is in use; tried again"),
                Failure::Away => tracing::debug!(%error, "partitions were not looked at"),
                Failure::Forbidden => health.attention(format!(
                    "the outbox's partitions cannot be kept: {}; grant the schema to this role \
                     (outbox-relay migrate --grant-relay ROLE)",
                    outbox::database::describe(&error)
                )),
                _ => {
                    health.attention(format!(
                        "the outbox's partitions cannot be kept: {}",
                        outbox::database::describe(&error)
                    ));
                }
            },
        }
        if stop.run_until_cancelled(tokio::time::sleep(pause.step())).await.is_none() {
            break;
        }
    }
    connection.close().await;
    Ok(())
}

#[derive(Debug, Default)]
struct Round {
    /// There are rows in the net.
    fallen: bool,
    /// Why nothing more was retired.
    kept_because: Option<String>,
}

/// One look, on a connection of its own: the leader's must not wait for locks.
async fn round(connection: &mut TaskConnection, args: PartitionArgs) -> sqlx::Result<Round> {
    let mut conn = connection.take().await?;
    let round = look(&mut conn, args).await;
    connection.keep(conn, &round);
    round
}

async fn look(conn: &mut PgConnection, args: PartitionArgs) -> sqlx::Result<Round> {
    let added = add(conn, args).await?;
    if added > 0 {
        tracing::info!(added, "partitions were added");
    }
    let fallen =
        sqlx::query_scalar("SELECT first_position IS NOT NULL FROM outbox.partition_status WHERE is_default");
    let fallen: bool = fallen.fetch_one(&mut *conn).await?;
    // Notes of each that is full since when it is, so that its age is known once it matters.
    sqlx::query("SELECT outbox.why_kept(name, '-infinity', true) FROM outbox.partition")
        .execute(&mut *conn)
        .await?;
    let mut kept_because = None;
    if let Some(keep) = args.keep {
        let partitions = retire(conn, keep, args.without_baseline, false).await?;
        for partition in &partitions {
            match &partition.kept {
                None => tracing::info!(partition = partition.name, "retired"),
                Some(reason) => kept_because = Some(format!("{}: {reason}", partition.name)),
            }
        }
        drop_one(conn).await?;
    }
    Ok(Round { fallen, kept_because })
}

/// Adds partitions until enough are ahead of the sequence.
async fn add(conn: &mut PgConnection, args: PartitionArgs) -> Result<i64, sqlx::Error> {
    let mut added = 0;
    // One in use may be all but full, and one of another size may lie above.
    while added <= args.partitions_ahead {
        // None: the topmost partition has no end, so there is always room.
        let ahead: Option<i64> = sqlx::query_scalar(
            "SELECT max(upper) - (SELECT last_value FROM outbox.position) FROM outbox.partition",
        )
        .fetch_one(&mut *conn)
        .await?;
        if ahead.is_none_or(|ahead| ahead >= args.partition_size * args.partitions_ahead) {
            break;
        }
        let name: Option<String> = sqlx::query_scalar("SELECT outbox.add_partition($1)")
            .bind(args.partition_size)
            .fetch_one(&mut *conn)
            .await?;
        if name.is_none() {
            // Another relay is at it.
            break;
        }
        added += 1;
    }
    Ok(added)
}

/// Retires what is older than `keep`, the oldest first and up to the first that must be kept: its
/// aggregates' baselines may lie in the next one. The last in the list is that one. With `dry`, only says
/// what it would do.
pub(crate) async fn retire(
    conn: &mut PgConnection,
    keep: Duration,
    without_baseline: bool,
    dry: bool,
) -> Result<Vec<Partition>, sqlx::Error> {
    // By the server's clock alone, as the ages are. No partition is as old as what is beyond its calendar.
    let keep = keep.as_secs_f64().min(LONGEST_KEPT);
    // Those that hold something: the others were retired, or are not begun.
    let sql = "SELECT name, upper FROM outbox.partition
               WHERE outbox.why_kept(name, '-infinity', true) IS DISTINCT FROM 'it is empty'
               ORDER BY is_default DESC, upper";
    let candidates: Vec<(String, Option<i64>)> = sqlx::query_as(sql).fetch_all(&mut *conn).await?;
    let mut partitions = Vec::new();
    for (name, upper) in candidates {
        let kept: Option<String> = sqlx::query_scalar(
            "SELECT outbox.why_kept($1, clock_timestamp() - make_interval(secs => $2), $3)",
        )
        .bind(&name)
        .bind(keep)
        .bind(without_baseline)
        .fetch_one(&mut *conn)
        .await?;
        let last = kept.is_some() && upper.is_some();
        if kept.is_none() && !dry {
            retire_one(conn, &name, keep, without_baseline).await?;
        }
        partitions.push(Partition { name, upper, kept });
        if last {
            break;
        }
    }
    Ok(partitions)
}

/// Retires it, and tries again when the server preferred another transaction.
async fn retire_one(
    conn: &mut PgConnection,
    name: &str,
    keep: f64,
    without_baseline: bool,
) -> Result<(), sqlx::Error> {
    // Not `outbox::database::again`: the future of a closure that borrows cannot be shown to be `Send`.
    let mut attempts = Attempts::default();
    loop {
        let retire = sqlx::query(
            "SELECT outbox.retire_partition($1, clock_timestamp() - make_interval(secs => $2), $3)",
        );
        let done = retire.bind(name).bind(keep).bind(without_baseline).execute(&mut *conn).await;
        if !is_conflict(&done) || !attempts.again().await {
            return done.map(|_| ());
        }
    }
}

/// Drops the oldest partition that is retired, if nobody is in the way: an empty one costs next to nothing.
async fn drop_one(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let sql = "SELECT name FROM outbox.partition
               WHERE NOT is_default AND upper <= (SELECT min(low_water) FROM outbox.relay)
                 AND outbox.why_kept(name, 'infinity', true) = 'it is empty'
               ORDER BY upper LIMIT 1";
    let name: Option<String> = sqlx::query_scalar(sql).fetch_optional(&mut *conn).await?;
    let Some(name) = name else { return Ok(()) };
    match sqlx::query("SELECT outbox.drop_partition($1)").bind(&name).execute(conn).await {
        Ok(_) => tracing::info!(partition = name, "dropped"),
        Err(error) if Failure::of(&error) == Failure::Locked => {
            tracing::debug!(partition = name, "not dropped: the outbox is in use");
        }
        Err(error) => return Err(error),
    }
    Ok(())
}
