//! What keeps a partition, and how it is emptied.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use daemon::config::database::Failure;
use outbox::database::{Attempts, is_conflict};
use sqlx::PgConnection;

use super::{LONGEST_KEPT, Partition};
use crate::command::state::LockHolder;

/// When an aggregate has no newer baseline, the relay looks again after so long: by then they may be there, and each look
/// that finds another such aggregate begins anew.
const BASELINES_AGAIN: Duration = Duration::from_hours(3);
/// How often a lock is tried meanwhile. Each try waits for a tenth of a second at most.
const LOCK_AGAIN: Duration = Duration::from_millis(150);

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
    pub(super) async fn one(
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

    pub(super) async fn why_kept(
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
