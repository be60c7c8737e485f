//! Applies held events again, on an operator's request, beside running consumers.

mod result;

use std::{collections::BTreeSet, mem, time::Duration};

use outbox::database::Attempts;
use sqlx::{PgConnection, Postgres, Transaction};
use tokio_util::sync::CancellationToken;

pub use self::result::{RedriveError, RedriveSummary, RedrivenAggregate, RefusedEvent};
use crate::{
    Handler, HandlerError, Sequencer,
    chain::{Chain, Key, Next, Reason},
    handler::describe,
    held::Filter,
    ledger::{Ledger, UNREADABLE},
    newest::Newest,
    rollback::Rollback,
    save_rejected::RejectedMessage,
    schema::BEGIN,
};

/// How many aggregates one query lists.
const PAGE: i64 = 500;
/// The limit of one transaction.
pub(crate) const LIMIT: Duration = Duration::from_mins(1);

/// Which held events to apply again, and how.
#[derive(Clone, Debug)]
pub struct Redrive {
    /// The aggregates: those with a held event that matches. Each is applied from its first held event on.
    pub filter: Filter,
    /// How many events one transaction takes at most.
    pub batch: usize,
    /// Call the handler and roll back.
    pub dry_run: bool,
}

impl<H: Handler> Sequencer<H> {
    /// Applies held events again: for each aggregate the event that stops it and then those behind it, in order, up to
    /// the next event that is refused. That refusal counts as one more attempt at the event.
    ///
    /// Several aggregates share a transaction for as long as all of their events succeed. Each transaction holds the
    /// aggregates' locks, so any number of redrives and consumers may run at once. `progress` is called after each.
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(sequencer: inbox::Sequencer<H>) -> Result<(), Box<dyn std::error::Error>> {
    /// use inbox::{Redrive, held::Filter};
    ///
    /// let poison = Filter { reason: Some("poison".to_owned()), ..Filter::default() };
    /// let request = Redrive { filter: poison, batch: 64, dry_run: true };
    /// let summary = sequencer.redrive(&request, |so_far| println!("{} aggregates", so_far.aggregates)).await?;
    /// println!("{} events would be applied", summary.applied);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn redrive(
        &self,
        redrive: &Redrive,
        mut progress: impl FnMut(&RedriveSummary),
    ) -> Result<RedriveSummary, RedriveError> {
        self.redrive_until(redrive, &CancellationToken::new(), &mut progress).await
    }

    /// As [`redrive`](Self::redrive), up to the end of the transaction in which `stop` is cancelled. The summary then says
    /// [`interrupted`](RedriveSummary::interrupted).
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(sequencer: inbox::Sequencer<H>, request: inbox::Redrive) -> Result<(), Box<dyn std::error::Error>> {
    /// let stop = tokio_util::sync::CancellationToken::new();
    /// let summary = sequencer.redrive_until(&request, &stop, |_| ()).await?;
    /// if summary.interrupted {
    ///     println!("{} events applied so far", summary.applied);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn redrive_until(
        &self,
        redrive: &Redrive,
        stop: &CancellationToken,
        mut progress: impl FnMut(&RedriveSummary),
    ) -> Result<RedriveSummary, RedriveError> {
        let mut all = RedriveSummary::default();
        let (mut after, mut some) = (None, redrive.batch.max(1));
        loop {
            let mut conn = self.pool.acquire().await?;
            let page = due(&mut conn, &self.consumer, &redrive.filter, after.as_ref(), PAGE).await?;
            drop(conn);
            let Some(last) = page.last().cloned() else { return Ok(all) };
            if !self.bring_all_on(page, redrive, stop, &mut some, &mut all, &mut progress).await? {
                all.interrupted = true;
                return Ok(all);
            }
            after = Some(last);
        }
    }

    /// One aggregate, in as many transactions as needed. A dry run ends after one.
    pub(crate) async fn bring_on(
        &self,
        key: &Key,
        batch: usize,
        dry_run: bool,
    ) -> Result<RedrivenAggregate, RedriveError> {
        let mut all = self.some(key, batch, dry_run).await?;
        while all.unfinished && !dry_run {
            let more = self.some(key, batch, dry_run).await?;
            all = RedrivenAggregate { from: all.from, applied: all.applied + more.applied, ..more };
        }
        Ok(all)
    }

    /// One transaction, retried after a conflict.
    pub(crate) async fn some(
        &self,
        key: &Key,
        batch: usize,
        dry_run: bool,
    ) -> Result<RedrivenAggregate, RedriveError> {
        let mut attempts = Attempts::default();
        loop {
            let work = async {
                let (mut tx, mut ledger) = self.lock(key).await?;
                let done = self.next(&mut tx, &mut ledger, key, batch, dry_run).await?;
                self.end(tx, &done, dry_run).await?;
                Ok(done)
            };
            let done = within(work).await;
            if !matches!(done, Err(RedriveError::Conflict(_))) || !attempts.again().await {
                return done;
            }
        }
    }

    /// Begins a transaction with the lock on one aggregate.
    pub(crate) async fn lock(
        &self,
        key: &Key,
    ) -> Result<(Transaction<'static, Postgres>, Ledger<'_>), RedriveError> {
        let mut tx =
            self.pool.begin_with(BEGIN).await.map_err(|error| RedriveError::Transient(describe(&error)))?;
        self.handler.begin(&mut tx).await.map_err(Rollback::from)?;
        if Newest::of(&mut tx, &self.consumer, &key.source).await?.supersedes(&key.source) {
            return Err(RedriveError::Superseded);
        }
        let mut ledger = Ledger::lock(&mut tx, &self.consumer, &BTreeSet::from([key.clone()])).await?;
        ledger.read_held(&mut tx, &[]).await?;
        Ok((tx, ledger))
    }

    /// Applies at most `batch` held events, each in its own savepoint, up to the first that is refused. Stores the
    /// aggregate's new version.
    pub(crate) async fn next(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        ledger: &mut Ledger<'_>,
        key: &Key,
        batch: usize,
        dry_run: bool,
    ) -> Result<RedrivenAggregate, RedriveError> {
        let from = ledger.chain(key)?.stored;
        let mut applied = 0;
        let mut refused = None;
        while applied < batch.max(1) {
            let Some(version) = turn(ledger.chain(key)?) else { break };
            let Some(mut event) = ledger.events(tx, &[(key, version)]).await?.into_values().next() else {
                break;
            };
            let chain = ledger.chain(key)?;
            if !chain.takes(&event) {
                break;
            }
            if chain.follows_another(&event) {
                let forked = RejectedMessage::forked(&event);
                ledger.reject_held(tx, &forked, self.limits.rejected()).await?;
                if !dry_run {
                    self.rejected_held(&forked);
                }
                refused = Some(RefusedEvent::forked(&event));
                break;
            }
            event.begins_anew = chain.begins_anew();
            let readable = mem::take(&mut ledger.unreadable).is_empty();
            let handled = if readable {
                self.handle_alone(tx, &event).await
            } else {
                Err(HandlerError::poison(UNREADABLE))
            };
            match handled {
                Ok(()) => {
                    ledger.chain(key)?.advance(version, event.id);
                    ledger.applied(&event)?;
                    applied += 1;
                }
                Err(HandlerError::Conflict(reason)) => return Err(RedriveError::Conflict(reason)),
                Err(HandlerError::Transient(reason) | HandlerError::TooLong(reason)) => {
                    return Err(RedriveError::Transient(reason));
                }
                Err(HandlerError::Poison(error)) => {
                    if !readable && !dry_run {
                        ledger.unread(tx, key, version).await?;
                    }
                    if let Some(held) = ledger.chain(key)?.held.get_mut(&version) {
                        held.reason = Reason::Poison;
                        held.attempts = held.attempts.saturating_add(1);
                        if readable && !dry_run {
                            self.refuse(tx, &event, &error, held.attempts).await?;
                        }
                    }
                    // As it is stored.
                    let error = error.replace('\0', "");
                    refused = Some(RefusedEvent { event_id: event.id, version, type_: event.type_, error });
                    break;
                }
            }
        }
        ledger.save(tx).await?;
        let chain = ledger.chain(key)?;
        let unfinished = refused.is_none() && !matches!(chain.next(), Next::Nothing);
        let to = chain.version();
        // Of very many, counting after each transaction would take longer than applying.
        let held = if unfinished && !dry_run { 0 } else { ledger.count(tx, key).await? };
        let applied = applied as u64;
        Ok(RedrivenAggregate { aggregate: key.clone(), from, to, applied, held, refused, unfinished })
    }

    pub(crate) async fn end(
        &self,
        tx: Transaction<'_, Postgres>,
        done: &RedrivenAggregate,
        dry_run: bool,
    ) -> Result<(), RedriveError> {
        if dry_run {
            tx.rollback().await?;
            return Ok(());
        }
        tx.commit().await?;
        if done.to > done.from {
            self.handler.committed();
        }
        Ok(())
    }
}

/// Limits the time of one transaction.
pub(crate) async fn within<T>(
    work: impl Future<Output = Result<T, RedriveError>>,
) -> Result<T, RedriveError> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(done) => done,
        Err(_) => Err(RedriveError::Transient(format!("a transaction took longer than {LIMIT:?}"))),
    }
}

/// The held event to try: the next one, or else the first that was refused, which may jump.
pub(crate) fn turn(chain: &Chain<'_>) -> Option<i64> {
    let next = chain.next_version();
    if chain.held.contains_key(&next) {
        return Some(next);
    }
    chain.held.range(next..).find(|(_, held)| held.reason.blocks()).map(|(version, _)| *version)
}

/// At most `limit` aggregates after `after` that a redrive can advance: one of their events was tried, or is next and was
/// left by a process that died. Those of earlier incarnations are left out.
async fn due(
    conn: &mut PgConnection,
    consumer: &str,
    filter: &Filter,
    after: Option<&Key>,
    limit: i64,
) -> sqlx::Result<Vec<Key>> {
    let (aggregate_type, aggregate_id) = filter.aggregate.clone().unzip();
    let (source, after_type, after_id) = after.map_or(("", "", ""), |after| {
        (after.source.as_str(), after.aggregate_type.as_str(), after.aggregate_id.as_str())
    });
    // A subquery and no join, so that the page is read along the primary key and ends where it is full; a
    // join is hashed as a whole (a million held: 0.1 s a page instead of 6 s).
    sqlx::query_as(
        "SELECT source, aggregate_type, aggregate_id FROM inbox.held h
         WHERE consumer = $1 AND (source, aggregate_type, aggregate_id) > ($2, $3, $4)
           AND ($5::text IS NULL OR (aggregate_type, aggregate_id) = ($5, $6))
           AND source <> ALL (ARRAY(SELECT e.source FROM inbox.earlier_source e WHERE e.consumer = $1))
           AND ($7::text IS NULL OR reason = $7) AND ($8::text IS NULL OR position($8 IN error) > 0)
           AND (reason IN ('poison', 'trying') OR version - 1 = (
                SELECT a.version FROM inbox.aggregate a
                WHERE (a.consumer, a.source, a.aggregate_type, a.aggregate_id)
                    = (h.consumer, h.source, h.aggregate_type, h.aggregate_id)))
         GROUP BY source, aggregate_type, aggregate_id
         ORDER BY source, aggregate_type, aggregate_id LIMIT $9",
    )
    .bind(consumer)
    .bind(source)
    .bind(after_type)
    .bind(after_id)
    .bind(aggregate_type)
    .bind(aggregate_id)
    .bind(&filter.reason)
    .bind(&filter.error)
    .bind(limit)
    .fetch_all(conn)
    .await
}
