//! Partitions of the outbox: made ahead, and emptied when they are older than what is kept.

mod in_use;
mod retire;

use std::time::Duration;

use amqp::Backoff;
use daemon::{
    config::database::{Database, Failure},
    health::Part,
};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

pub(crate) use self::{
    in_use::{begin_next, in_use, in_use_for},
    retire::{Candidate, Keeper, Retention, candidates},
};
use crate::task_connection::TaskConnection;

/// In seconds, 3,000 years: the server's calendar begins in the year -4713.
const LONGEST_KEPT: f64 = 1e11;
/// How often the relay looks whether there is a partition to be made or emptied.
const ROUND: Duration = Duration::from_secs(10);
/// A round takes no longer. Looking for baselines reads an index over a whole partition.
const TIMEOUT: Duration = Duration::from_mins(5);
/// The relay waits no longer for a reader of a partition; it comes again.
const PATIENCE: Duration = Duration::from_secs(1);

/// How the outbox is partitioned, and for how long events are kept.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct PartitionArgs {
    /// Positions of each new partition of the outbox. With --keep, writers begin the next partition after about a day in any
    /// case, so this is the most that a partition holds.
    #[arg(long, env = "PARTITION_SIZE", default_value = "1000000", value_parser = clap::value_parser!(i64).range(1_000..=1_000_000_000))]
    pub partition_size: i64,
    /// Partitions that are made before they are needed. A burst of events fits into all of them together.
    #[arg(long, env = "PARTITIONS_AHEAD", default_value = "2", value_parser = clap::value_parser!(i64).range(1..=100))]
    pub partitions_ahead: i64,
    /// Empty partitions that have been full for longer than this, by the server's clock: settled by every relay name, not set aside,
    /// not being replayed, and with a newer baseline of each aggregate. A partition is full after a day at the latest, or a
    /// thirtieth of this if that is longer. Without it everything is kept.
    #[arg(long, env = "KEEP", value_parser = daemon::config::duration, value_name = "DURATION")]
    pub keep: Option<Duration>,
    /// With --keep: empty them also when an aggregate has no newer baseline, so that its history cannot be
    /// replayed any more.
    #[arg(long, env = "WITHOUT_BASELINE")]
    pub without_baseline: bool,
}

/// A partition, and what became of it.
#[derive(Debug)]
struct Partition {
    name: String,
    /// The first position after it; none for the net.
    upper: Option<i64>,
    /// Why its events are kept; none when they were retired.
    kept: Option<String>,
    /// It is kept because a session uses it, for now.
    in_use: bool,
}

impl Partition {
    /// The next ones are kept, too: the aggregates' baselines may lie in this one.
    fn ends(&self) -> bool {
        self.kept.is_some() && self.upper.is_some()
    }
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
    let mut retention = args.keep.map(|keep| Retention::new(keep, args.without_baseline, PATIENCE));
    loop {
        let round = tokio::time::timeout(TIMEOUT, round(&mut connection, args, retention.as_mut()));
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
async fn round(
    connection: &mut TaskConnection,
    args: PartitionArgs,
    retention: Option<&mut Retention>,
) -> sqlx::Result<Round> {
    let mut conn = connection.take().await?;
    let round = look(&mut conn, args, retention).await;
    connection.keep(conn, &round);
    round
}

async fn look(
    conn: &mut PgConnection,
    args: PartitionArgs,
    retention: Option<&mut Retention>,
) -> sqlx::Result<Round> {
    let mut added = add(conn, args).await?;
    if let Some(ended) = begin_next(conn, args.keep).await? {
        tracing::info!(partition = ended, "writers begin the next partition");
        added += add(conn, args).await?;
    }
    if added > 0 {
        tracing::info!(added, "partitions were added");
    }
    let fallen =
        sqlx::query_scalar("SELECT first_position IS NOT NULL FROM outbox.partition_status WHERE is_default");
    let fallen: bool = fallen.fetch_one(&mut *conn).await?;
    // Notes of each that is full since when it is, so that its age is known once it matters. The net has no end.
    sqlx::query(
        "SELECT outbox.why_kept(name, '-infinity', true) FROM outbox.partition_status
         WHERE full_since IS NULL OR is_default",
    )
    .execute(&mut *conn)
    .await?;
    let mut kept_because = None;
    if let Some(retention) = retention {
        for candidate in candidates(conn).await? {
            let partition = retention.one(conn, candidate).await?;
            let ends = partition.ends();
            match partition {
                Partition { kept: None, name, .. } => tracing::info!(partition = name, "retired"),
                Partition { kept: Some(reason), in_use: true, name, .. } => {
                    tracing::debug!(partition = name, reason, "not retired for now");
                }
                Partition { kept: Some(reason), name, .. } => {
                    kept_because = Some(format!("{name}: {reason}"));
                }
            }
            if ends {
                break;
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

/// Drops the oldest partition that is retired, if nobody is in the way: an empty one costs next to nothing.
async fn drop_one(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let sql = "SELECT name FROM outbox.partition_status
               WHERE NOT is_default AND upper <= (SELECT min(low_water) FROM outbox.relay)
                 AND first_position IS NULL
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
