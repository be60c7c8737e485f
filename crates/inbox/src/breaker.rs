//! The breaker: when every event is refused, or too many are held, the handler is broken and not the events. Consuming
//! stops then, until one of the refused events succeeds.
//!
//! One queue carries all sources of a consumer, so consuming cannot stop for one of them alone. It stops when the
//! events of every source are refused. The refused events of one source do not stop another one's, up to the limit of
//! held events.

use std::{
    collections::BTreeMap,
    sync::{MutexGuard, PoisonError},
};

use sqlx::AssertSqlSafe;

use crate::{
    Handler, Sequencer, attempt::NEVER_CAME_BACK, chain::Key, incarnation::name, ledger::NEAR,
    rollback::Rollback, work::Mode,
};

/// How many sources are remembered at most, where every source is followed.
const SOURCES: usize = 1_000;

/// How many of the last events of each source were refused in a row.
#[derive(Debug, Default)]
pub(crate) struct Streaks {
    /// How many in a row are too many; 0 for never.
    limit: u32,
    /// By the source's name.
    of: BTreeMap<String, Streak>,
}

/// Events of a source that were refused, with none applied in between.
#[derive(Debug, Default)]
struct Streak {
    count: u32,
    error: String,
}

impl Streaks {
    pub(crate) fn limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// One more was refused, or one of them again.
    pub(crate) fn refused(&mut self, mode: Mode, source: &str, error: String) {
        if let Some(streak) = self.of(source) {
            streak.count = streak.count.saturating_add(u32::from(mode != Mode::Retry));
            streak.error = error;
        }
    }

    /// One was applied.
    pub(crate) fn applied(&mut self, source: &str) {
        if let Some(streak) = self.of(source) {
            streak.count = 0;
        }
    }

    fn ended(&mut self) {
        self.of.values_mut().for_each(|streak| streak.count = 0);
    }

    fn of(&mut self, source: &str) -> Option<&mut Streak> {
        let source = name(source);
        if !self.of.contains_key(source) && self.of.len() < SOURCES {
            self.of.insert(source.to_owned(), Streak::default());
        }
        self.of.get_mut(source)
    }

    /// Too many of one source were refused, and none of the others is known to succeed: of those `followed`, or
    /// of all that have come.
    fn broken(&self, followed: Option<&[&str]>) -> Option<String> {
        let counts =
            |(source, _): &(&String, &Streak)| followed.is_none_or(|all| all.contains(&source.as_str()));
        let streaks: Vec<_> = self.of.iter().filter(counts).collect();
        let (source, Streak { count, error }) = streaks.iter().max_by_key(|(_, streak)| streak.count)?;
        let all_refused = streaks.iter().all(|(_, streak)| streak.count > 0)
            && followed.is_none_or(|all| all.len() == streaks.len());
        (self.limit > 0 && *count >= self.limit && all_refused).then(|| {
            let of = if streaks.len() > 1 { format!(" of {source:?}, and the last of every other source") } else { String::new() };
            format!(
                "the handler refused {count} events in a row{of}, the last with: {error}; they are in inbox.held"
            )
        })
    }
}

impl<H: Handler> Sequencer<H> {
    pub(crate) fn streaks(&self) -> MutexGuard<'_, Streaks> {
        self.streaks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the handler counts as broken, if it does.
    pub(crate) fn broken(&self) -> Option<String> {
        self.streaks().broken(self.sources.names().as_deref())
    }

    /// Why no more may be held, when more than `limit` events of followed sources are poison or wait behind it.
    /// A gap does not count: it is filled from the queue alone. Nor does
    /// an earlier incarnation of a source: nothing of it is applied any more.
    pub(crate) async fn overfull(&self, limit: u32) -> sqlx::Result<Option<String>> {
        if limit == 0 {
            return Ok(None);
        }
        // No further than it has to be known.
        let count: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM (SELECT FROM inbox.held
                                   WHERE consumer = $1 AND reason IN ('poison', 'behind')
                                     AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e
                                                              WHERE e.consumer = $1))
                                     AND ($3::text[] IS NULL OR split_part(source, '~', 1) = ANY ($3))
                                   LIMIT $2) AS counted",
        )
        .bind(&self.consumer)
        .bind(i64::from(limit) + 1)
        .bind(self.sources.names())
        .fetch_one(&self.pool)
        .await?;
        if count <= i64::from(limit) {
            return Ok(None);
        }
        let error: Option<String> = sqlx::query_scalar(
            "SELECT error FROM inbox.held WHERE consumer = $1 AND reason = 'poison'
               AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e WHERE e.consumer = $1))
               AND ($2::text[] IS NULL OR split_part(source, '~', 1) = ANY ($2))
             ORDER BY first_at DESC LIMIT 1",
        )
        .bind(&self.consumer)
        .bind(self.sources.names())
        .fetch_optional(&self.pool)
        .await?;
        let error = error.map(|error| format!(", the last with: {error}")).unwrap_or_default();
        Ok(Some(format!(
            "more than {limit} events were refused or wait behind one that was{error}; they are in inbox.held"
        )))
    }

    /// Tries again what was refused, as long as that succeeds: first one event, then more at a time, since the cause is
    /// gone. None when it may go on, else why not.
    pub(crate) async fn mend(&self, limit: u32) -> Result<Option<String>, Rollback> {
        let mut some = 1;
        loop {
            let overfull = self.overfull(limit).await?;
            let Some(reason) = overfull.clone().or_else(|| self.broken()) else { return Ok(None) };
            let keys = self.refused(overfull.is_some(), some).await?;
            let applied = match &*keys {
                [] if overfull.is_none() => {
                    // An operator has redriven or skipped all of them.
                    self.streaks().ended();
                    return Ok(None);
                }
                [] => 0,
                [key] => self.retry(key).await?.applied,
                keys => match self.together(keys, NEAR, false).await {
                    Ok(together) => together.done.values().map(|one| one.applied).sum(),
                    Err(Rollback::Failed(_) | Rollback::TooLong(_) | Rollback::Unreadable(_)) => {
                        some = (some / 2).max(1);
                        continue;
                    }
                    Err(rollback) => return Err(rollback),
                },
            };
            if applied == 0 {
                return Ok(Some(self.broken().filter(|_| overfull.is_none()).unwrap_or(reason)));
            }
            some = NEAR.min(some * 2);
        }
    }

    /// The aggregates whose refused events have waited longest for another try, at most `some`: among all, or among the
    /// last ones, since those of before may be bad for themselves. One that ends the process is not
    /// among them.
    async fn refused(&self, all: bool, some: usize) -> sqlx::Result<Vec<Key>> {
        // Each by an index that ends where enough are found: held_retry, and held_reason. The planner believes that the
        // conditions on the source and the error hold for hardly any row. Behind `OFFSET 0` it does not know them, and
        // reads in the order of the index. Poison alone has an error.
        const FILTER: &str = "
            error <> $2
            AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e WHERE e.consumer = $1))
            AND ($3::text[] IS NULL OR split_part(source, '~', 1) = ANY ($3))";
        let sql = if all {
            format!(
                "SELECT source, aggregate_type, aggregate_id
                 FROM (SELECT * FROM inbox.held WHERE consumer = $1 AND error IS NOT NULL ORDER BY last_at OFFSET 0) AS p
                 WHERE {FILTER} LIMIT {some}"
            )
        } else {
            format!(
                "SELECT source, aggregate_type, aggregate_id
                 FROM (SELECT * FROM (SELECT * FROM inbox.held WHERE consumer = $1 AND reason = 'poison'
                                      ORDER BY first_at DESC OFFSET 0) AS p
                       WHERE {FILTER} LIMIT {last}) AS refused
                 ORDER BY last_at LIMIT {some}",
                last = self.streaks().limit
            )
        };
        let query = sqlx::query_as(AssertSqlSafe(sql))
            .bind(&self.consumer)
            .bind(NEVER_CAME_BACK)
            .bind(self.sources.names());
        query.fetch_all(&self.pool).await
    }
}
