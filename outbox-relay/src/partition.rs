//! Partitions of the outbox: made ahead, and emptied when they are older than what is kept.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use amqp::Backoff;
use daemon::{
    config::database::{Database, Failure},
    health::Part,
};
use outbox::database::{Attempts, is_conflict};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use crate::{command::state::LockHolder, task_connection::TaskConnection};

/// How often somebody looks whether there is a partition to be made or emptied.
const ROUND: Duration = Duration::from_secs(10);
/// A round takes no longer. Looking for baselines reads an index over a whole partition.
const TIMEOUT: Duration = Duration::from_mins(5);
/// When an aggregate has no newer baseline, the relay looks again after so long: by then they may be there, and each look
/// that finds another such aggregate begins anew.
const BASELINES_AGAIN: Duration = Duration::from_hours(3);
/// The relay waits no longer for a reader of a partition; it comes again.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a lock is tried meanwhile. Each try waits for a tenth of a second at most.
const LOCK_AGAIN: Duration = Duration::from_millis(150);
/// In seconds, 3,000 years: the server's calendar begins in the year -4713.
const LONGEST_KEPT: f64 = 1e11;
/// For so long writers fill a partition, so what is retired at once is about a day of events. Longer where much is kept, so
/// that there are never many partitions, and shorter where little is kept.
const IN_USE: Duration = Duration::from_hours(24);
const SHORTEST_IN_USE: Duration = Duration::from_hours(1);
/// So many partitions are kept at most, apart from those that fill up earlier.
const MOST_KEPT: u32 = 30;
/// Steps of a million positions in which a partition is ended, one after the other; the next round goes on.
const STEPS: usize = 5;

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

/// How long writers fill a partition, where events are kept for `keep`.
pub(crate) fn in_use_for(keep: Duration) -> Duration {
    IN_USE.min(keep).max(keep / MOST_KEPT).max(SHORTEST_IN_USE)
}

/// The partition that writers fill.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct InUse {
    pub(crate) name: String,
    /// Writers should begin the next one: this has been in use for long enough, or is the net.
    pub(crate) is_due: bool,
    /// The next one is there.
    pub(crate) has_next: bool,
}

pub(crate) async fn in_use(conn: &mut PgConnection, keep: Option<Duration>) -> sqlx::Result<InUse> {
    sqlx::query_as(
        "SELECT name, next_begins IS NOT NULL AS has_next,
                is_default OR has_events AND coalesce(since < clock_timestamp() - make_interval(secs => $1), false) AS is_due
         FROM outbox.partition_in_use",
    )
    .bind(keep.map(seconds_in_use))
    .fetch_one(conn)
    .await
}

/// Lets writers begin the next partition, when they are in the net or, if events are kept for `keep`, when they have filled
/// this one for long enough. Returns the name of the one that has ended.
pub(crate) async fn begin_next(
    conn: &mut PgConnection,
    keep: Option<Duration>,
) -> sqlx::Result<Option<String>> {
    for _ in 0..STEPS {
        let sql = "SELECT partition, coalesce(has_begun, false)
                   FROM outbox.begin_next_partition(coalesce(clock_timestamp() - make_interval(secs => $1), '-infinity'))";
        let step = sqlx::query_as(sql).bind(keep.map(seconds_in_use)).fetch_one(&mut *conn).await?;
        match step {
            (Some(name), true) => return Ok(Some(name)),
            (Some(_), false) => {}
            // Nothing to do; or another session is at it.
            (None, _) => break,
        }
    }
    Ok(None)
}

/// By the server's clock alone, as the ages are.
fn seconds_in_use(keep: Duration) -> f64 {
    in_use_for(keep).as_secs_f64().min(LONGEST_KEPT)
}

/// A partition that holds something: the others were retired, or are not begun.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Candidate {
    pub(crate) name: String,
    pub(crate) upper: Option<i64>,
}

/// The partitions in the order in which they are retired: first the net, then the oldest.
pub(crate) async fn candidates(conn: &mut PgConnection) -> sqlx::Result<Vec<Candidate>> {
    sqlx::query_as(
        "SELECT name, upper FROM outbox.partition_status WHERE first_position IS NOT NULL
         ORDER BY is_default DESC, upper",
    )
    .fetch_all(conn)
    .await
}

/// How to retire.
#[derive(Debug)]
pub(crate) struct Retention {
    /// By the server's clock alone, as the ages are, in seconds.
    keep: f64,
    without_baseline: bool,
    /// How long to try while a session uses the partition.
    patience: Duration,
    /// Partitions that lack baselines, as of when, and how that was said.
    lacking: HashMap<String, (Instant, String)>,
}

/// What keeps a partition.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Keeper {
    /// One word; `lacking` when only baselines are missing.
    pub(crate) kind: String,
    /// In words.
    pub(crate) reason: String,
    /// The first aggregates that lack one.
    pub(crate) aggregates: Vec<String>,
}

impl Retention {
    pub(crate) fn new(keep: Duration, without_baseline: bool, patience: Duration) -> Self {
        // No partition is as old as what is beyond the server's calendar.
        let keep = keep.as_secs_f64().min(LONGEST_KEPT);
        Self { keep, without_baseline, patience, lacking: HashMap::new() }
    }

    /// Retires a partition, unless it must be kept.
    async fn one(
        &mut self,
        conn: &mut PgConnection,
        Candidate { name, upper }: Candidate,
    ) -> sqlx::Result<Partition> {
        let mut kept = self.why_kept(conn, &name, true).await?;
        if kept.is_none() && !self.without_baseline {
            let known = self.lacking.get(&name).filter(|(at, _)| at.elapsed() < BASELINES_AGAIN);
            kept = match known {
                Some((_, reason)) => Some(reason.clone()),
                None => self.why_kept(conn, &name, false).await?,
            };
            match &kept {
                Some(reason) => {
                    self.lacking.entry(name.clone()).or_insert_with(|| (Instant::now(), reason.clone()));
                }
                None => {
                    self.lacking.remove(&name);
                }
            }
        }
        let mut in_use = false;
        if kept.is_none() {
            kept = self.retire(conn, &name).await?;
            in_use = kept.is_some();
        }
        Ok(Partition { name, upper, kept, in_use })
    }

    async fn why_kept(
        &self,
        conn: &mut PgConnection,
        name: &str,
        without_baseline: bool,
    ) -> sqlx::Result<Option<String>> {
        sqlx::query_scalar("SELECT outbox.why_kept($1, clock_timestamp() - make_interval(secs => $2), $3)")
            .bind(name)
            .bind(self.keep)
            .bind(without_baseline)
            .fetch_one(conn)
            .await
    }

    /// What keeps a partition, with the first `most` aggregates that lack a baseline; none when nothing does. Notes since
    /// when the partition is full, if that was not noted.
    pub(crate) async fn keeper(
        &self,
        conn: &mut PgConnection,
        name: &str,
        most: i32,
    ) -> sqlx::Result<Option<Keeper>> {
        self.why_kept(conn, name, true).await?;
        let sql = "SELECT kind, reason, aggregates
                   FROM outbox.what_keeps($1, clock_timestamp() - make_interval(secs => $2), $3) WHERE kind IS NOT NULL";
        sqlx::query_as(sql).bind(name).bind(self.keep).bind(most).fetch_optional(conn).await
    }

    /// Retires it, and tries again when the server preferred another transaction, or a session uses the partition. When
    /// that session goes on for too long, says which it is.
    ///
    /// That there are baselines is known, and they do not go away: this is not asked again.
    pub(crate) async fn retire(&self, conn: &mut PgConnection, name: &str) -> sqlx::Result<Option<String>> {
        let (began, mut attempts) = (Instant::now(), Attempts::default());
        loop {
            let retire = sqlx::query(
                "SELECT outbox.retire_partition($1, clock_timestamp() - make_interval(secs => $2), true)",
            );
            let done = retire.bind(name).bind(self.keep).execute(&mut *conn).await;
            match &done {
                Err(error) if Failure::of(error) == Failure::Locked => {
                    if began.elapsed() >= self.patience {
                        return in_use_by(conn, name).await.map(Some);
                    }
                    tokio::time::sleep(LOCK_AGAIN).await;
                }
                _ if is_conflict(&done) && attempts.again().await => {}
                _ => return done.map(|_| None),
            }
        }
    }
}

/// Which sessions keep a partition from being emptied.
async fn in_use_by(conn: &mut PgConnection, name: &str) -> sqlx::Result<String> {
    // A row that a replay writes keeps it for a moment, too.
    let sql = "SELECT a.pid, a.application_name, a.state, NULL::text AS gid, a.xact_start AS since,
                      extract(epoch FROM statement_timestamp() - a.xact_start)::float8 AS seconds
               FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
               WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND (l.relation = to_regclass(format('outbox.%I', $1))
                      OR l.relation = 'outbox.replay'::regclass AND l.mode NOT IN ('AccessShareLock', 'RowShareLock'))
               GROUP BY 1, 2, 3, 5
               ORDER BY since NULLS LAST, pid LIMIT 5";
    let sessions: Vec<LockHolder> = sqlx::query_as(sql).bind(name).fetch_all(conn).await?;
    let sessions: Vec<String> = sessions.iter().map(LockHolder::text).collect();
    Ok(if sessions.is_empty() {
        "it is in use by a session that has ended just now: run this again".to_owned()
    } else {
        format!(
            "it is in use by {}: end its transaction, or wait for it, and run this again",
            sessions.join("; ")
        )
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_in_use_for_a_day_or_as_keep_says() {
        let hours = |keep: u64| in_use_for(Duration::from_hours(keep)).as_secs() / 3_600;
        let days = [1, 30, 60, 3_650].map(|days| hours(days * 24) / 24);
        assert_eq!((hours(0), hours(6), days), (1, 6, [1, 1, 2, 121]));
    }
}
