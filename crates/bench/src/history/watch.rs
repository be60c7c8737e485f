//! What a command does while it runs: which locks its sessions hold, and how long; how much memory it takes.

use std::{collections::BTreeMap, time::Duration};

use serde::Serialize;
use sqlx::{Connection, PgConnection};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::OPERATOR;

/// How often it is looked at the locks.
const LOOK: Duration = Duration::from_millis(20);

/// A lock and how long it was held, as far as looks every 20 ms tell.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Held {
    /// `AccessExclusiveLock on score.person`.
    pub(crate) lock: String,
    /// In seconds; at most 20 ms more or less.
    pub(crate) seconds: f64,
}

/// The strongest locks of a command.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Locks {
    /// Of a relation. None where it was read alone.
    pub(crate) relation: Option<Held>,
    /// Advisory.
    pub(crate) advisory: Option<Held>,
}

/// From the weakest to the strongest.
const MODES: [&str; 8] = [
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];

/// What is held now, since when, and what was held for longest.
#[derive(Debug, Default)]
struct Log {
    since: BTreeMap<Key, Instant>,
    longest: BTreeMap<Key, f64>,
}

/// Strength, advisory or not, and what it is on. The last in order is the strongest.
type Key = (usize, bool, String);

impl Log {
    fn seen(&mut self, now: Instant, held: Vec<Key>) {
        self.since.retain(|key, _| held.contains(key));
        for key in held {
            let since = *self.since.entry(key.clone()).or_insert(now);
            let seconds = now.duration_since(since).as_secs_f64();
            let longest = self.longest.entry(key).or_default();
            *longest = longest.max(seconds);
        }
    }

    /// Of the strongest mode the one that was held for longest.
    fn strongest(&self, advisory: bool) -> Option<Held> {
        let of_kind = || self.longest.iter().filter(|((_, kind, _), _)| *kind == advisory);
        // To read a relation stops nobody but what changes its definition.
        let mode = of_kind().map(|((mode, ..), _)| *mode).max().filter(|mode| advisory || *mode > 0)?;
        let ((_, _, on), seconds) = of_kind()
            .filter(|((of, ..), _)| *of == mode)
            .max_by(|(_, one), (_, other)| one.total_cmp(other))?;
        Some(Held { lock: format!("{} on {on}", MODES.get(mode).unwrap_or(&"?")), seconds: *seconds })
    }
}

/// Looks until `stop` is cancelled.
pub(crate) async fn locks(database: &str, stop: CancellationToken) -> anyhow::Result<Locks> {
    let mut conn = PgConnection::connect(database).await?;
    let mut log = Log::default();
    while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let rows: Vec<(String, bool, String)> = sqlx::query_as(
            "SELECT DISTINCT l.mode, l.locktype = 'advisory',
                    coalesce(c.oid::regclass::text, format('advisory (%s, %s)', l.classid, l.objid))
             FROM pg_locks l
             JOIN pg_stat_activity a ON a.pid = l.pid AND a.usename = $1
             LEFT JOIN pg_class c ON c.oid = l.relation AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
             WHERE l.granted AND (l.locktype = 'advisory'
                   OR l.locktype = 'relation' AND c.relkind IN ('r', 'p') AND c.relnamespace <> 'pg_catalog'::regnamespace)",
        )
        .bind(OPERATOR)
        .fetch_all(&mut conn)
        .await?;
        let mode = |mode: &str| MODES.iter().position(|known| *known == mode).unwrap_or(0);
        log.seen(
            Instant::now(),
            rows.into_iter().map(|(m, advisory, on)| (mode(&m), advisory, on)).collect(),
        );
    }
    conn.close().await?;
    Ok(Locks { relation: log.strongest(false), advisory: log.strongest(true) })
}

/// Lets the peak begin anew with what the process has now.
pub(crate) fn forget_peak(pid: impl std::fmt::Display) {
    let _its_owner_may = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_strongest_lock_counts_and_a_gap_ends_it() {
        let begin = Instant::now();
        let at = |ms| begin + Duration::from_millis(ms);
        let key = |mode, on: &str| (mode, false, on.to_owned());
        let mut log = Log::default();
        log.seen(at(0), vec![key(0, "a"), key(2, "b")]);
        assert_eq!(log.strongest(true), None);
        log.seen(at(100), vec![key(0, "a"), key(2, "b"), key(7, "c")]);
        log.seen(at(140), vec![key(7, "c"), key(7, "d")]);
        log.seen(at(200), vec![key(0, "a")]);
        log.seen(at(300), vec![key(7, "c")]);
        let held = log.strongest(false).unwrap();
        assert_eq!((held.lock.as_str(), held.seconds), ("AccessExclusiveLock on c", 0.04));
    }
}
