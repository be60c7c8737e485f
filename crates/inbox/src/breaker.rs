//! When nothing succeeds any more, or too much is held, it is the handler that is broken and not the
//! events: then nothing more is consumed, until one of those that it refused succeeds.

use std::sync::{MutexGuard, PoisonError};

use crate::{
    Handler, Sequencer,
    attempt::NEVER_CAME_BACK,
    chain::Key,
    transaction::{Mode, Stop},
};

/// Events that were refused, with none applied in between.
#[derive(Debug, Default)]
pub(crate) struct Streak {
    /// How many are too many; 0 for never.
    limit: u32,
    count: u32,
    error: String,
}

impl Streak {
    pub(crate) fn limit(&mut self, limit: u32) {
        self.limit = limit;
    }

    /// One more was refused, or one of them again.
    pub(crate) fn refused(&mut self, mode: Mode, error: String) {
        self.count += u32::from(mode != Mode::Retry);
        self.error = error;
    }

    pub(crate) fn ended(&mut self) {
        self.count = 0;
    }
}

impl<H: Handler> Sequencer<H> {
    pub(crate) fn streak(&self) -> MutexGuard<'_, Streak> {
        self.streak.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why it is to be believed that the handler is broken.
    pub(crate) fn broken(&self) -> Option<String> {
        let Streak { limit, count, error } = &*self.streak();
        (*limit > 0 && count >= limit).then(|| {
            format!(
                "the handler refused {count} events in a row, the last with: {error}; `held list` shows them"
            )
        })
    }

    /// Why no more may be held, when more than `limit` events are poison or wait behind it. A gap does
    /// not count: it is filled from the queue alone.
    pub(crate) async fn overfull(&self, limit: u32) -> sqlx::Result<Option<String>> {
        if limit == 0 {
            return Ok(None);
        }
        // No further than it has to be known.
        let count: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM (SELECT FROM inbox.held
                                   WHERE consumer = $1 AND reason IN ('poison', 'behind') LIMIT $2) AS counted",
        )
        .bind(&self.consumer)
        .bind(i64::from(limit) + 1)
        .fetch_one(&self.pool)
        .await?;
        if count <= i64::from(limit) {
            return Ok(None);
        }
        let error: Option<String> = sqlx::query_scalar(
            "SELECT error FROM inbox.held WHERE consumer = $1 AND reason = 'poison'
             ORDER BY first_at DESC LIMIT 1",
        )
        .bind(&self.consumer)
        .fetch_optional(&self.pool)
        .await?;
        let error = error.map(|error| format!(", the last with: {error}")).unwrap_or_default();
        Ok(Some(format!(
            "more than {limit} events were refused or wait behind one that was{error}; `held list` shows them"
        )))
    }

    /// Tries again what was refused, as long as that succeeds. None when it may go on, else why not.
    pub(crate) async fn mend(&self, limit: u32) -> Result<Option<String>, Stop> {
        loop {
            let overfull = self.overfull(limit).await?;
            let Some(reason) = overfull.clone().or_else(|| self.broken()) else { return Ok(None) };
            let Some(key) = self.refused(overfull.is_some()).await? else {
                if overfull.is_none() {
                    // Somebody has seen to all of them.
                    self.streak().ended();
                    return Ok(None);
                }
                return Ok(Some(reason));
            };
            if self.retry(&key).await?.applied == 0 {
                return Ok(Some(self.broken().filter(|_| overfull.is_none()).unwrap_or(reason)));
            }
        }
    }

    /// The aggregate whose refused event has waited longest for another try: among all, or among the
    /// last ones, since those of before may be bad for themselves. One that ends the process is not
    /// among them.
    async fn refused(&self, all: bool) -> sqlx::Result<Option<Key>> {
        let last = if all { i64::MAX } else { self.streak().limit.into() };
        let key: Option<(String, String, String)> = sqlx::query_as(
            "SELECT source, aggregate_type, aggregate_id
             FROM (SELECT source, aggregate_type, aggregate_id, last_at FROM inbox.held
                   WHERE consumer = $1 AND reason = 'poison' AND error <> $2
                   ORDER BY first_at DESC LIMIT $3) AS refused
             ORDER BY last_at LIMIT 1",
        )
        .bind(&self.consumer)
        .bind(NEVER_CAME_BACK)
        .bind(last)
        .fetch_optional(&self.pool)
        .await?;
        Ok(key.map(|(source, aggregate_type, aggregate_id)| Key { source, aggregate_type, aggregate_id }))
    }
}
