//! What is held, tried again by hand, beside consumers that go on.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::Duration,
};

use outbox::database::Attempts;
use serde::Serialize;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    Handler, HandlerError, Sequencer,
    chain::{Chain, Key, Next, Reason},
    handler::describe,
    held::{self, Filter},
    ledger::{Ledger, UNREADABLE},
    rollback::Rollback,
    schema::BEGIN,
};

/// How many aggregates are looked up at once.
const PAGE: i64 = 500;
/// How many aggregates, and how many errors, an answer lists.
const LISTED: usize = 100;
/// A transaction that takes longer is given up.
const LIMIT: Duration = Duration::from_mins(1);

/// What to try again.
#[derive(Clone, Debug)]
pub struct Redrive {
    /// Aggregates of which a held event matches; in a chain it is the first event that counts.
    pub filter: Filter,
    /// How many events one transaction takes at most.
    pub batch: usize,
    /// Call the handler, and roll back.
    pub dry_run: bool,
}

/// What became of an aggregate.
#[derive(Clone, Debug, Serialize)]
pub struct RedrivenAggregate {
    /// Which one.
    #[serde(flatten)]
    pub aggregate: Key,
    /// The version it stood at.
    pub from: i64,
    /// The version it stands at.
    pub to: i64,
    /// How many events were applied.
    pub applied: u64,
    /// How many are held still.
    pub held: i64,
    /// The event that was refused again; the rest waits behind it.
    pub refused: Option<RefusedEvent>,
    /// There is more to apply.
    #[serde(skip)]
    pub(crate) unfinished: bool,
}

/// An event that was refused again.
#[derive(Clone, Debug, Serialize)]
pub struct RefusedEvent {
    /// Its id.
    pub event_id: Uuid,
    /// Which version.
    pub version: i64,
    /// The event type.
    #[serde(rename = "type")]
    pub type_: String,
    /// What the handler said.
    pub error: String,
}

/// What became of all of them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RedriveSummary {
    /// How many aggregates were taken.
    pub aggregates: u64,
    /// How many events were applied.
    pub applied: u64,
    /// How many aggregates are stopped by an event that was refused again.
    pub refused: u64,
    /// How many events of the aggregates are held still.
    pub held: i64,
    /// How many aggregates each error stops: the first hundred errors.
    pub errors: BTreeMap<String, u64>,
    /// What became of each: the first hundred aggregates, those that are stopped before the others.
    pub each: Vec<RedrivenAggregate>,
}

/// Why something by hand was not done, or not to its end; what was committed before stays.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedriveError {
    /// It passes.
    #[error("{0}; try again later")]
    Transient(String),
    /// The server preferred another transaction each time.
    #[error("{0}; it was tried {ATTEMPTS} times; try again later", ATTEMPTS = outbox::database::ATTEMPTS)]
    Conflict(String),
    /// It does not.
    #[error("{0}")]
    Failed(String),
    /// Somebody was faster.
    #[error("it is not held any more")]
    Gone,
    /// Only the event that stops its aggregate can be skipped.
    #[error("its aggregate is at version {0}, and does not wait for this event")]
    NotNext(i64),
    /// The erased form, too.
    #[error("the handler refuses its erased form, too: {0}")]
    Refused(String),
}

impl From<sqlx::Error> for RedriveError {
    fn from(error: sqlx::Error) -> Self {
        Rollback::from(error).into()
    }
}

impl From<Rollback> for RedriveError {
    fn from(rollback: Rollback) -> Self {
        match rollback {
            Rollback::Transient(reason) | Rollback::TooLong(reason) => Self::Transient(reason),
            Rollback::Conflict(reason) => Self::Conflict(reason),
            rollback => Self::Failed(rollback.reason()),
        }
    }
}

impl RedriveSummary {
    fn add(&mut self, one: RedrivenAggregate) {
        self.aggregates += 1;
        self.applied += one.applied;
        self.held += one.held;
        if let Some(refused) = &one.refused {
            self.refused += 1;
            if self.errors.len() < LISTED || self.errors.contains_key(&refused.error) {
                *self.errors.entry(refused.error.clone()).or_default() += 1;
            }
        }
        // A list that is full gives the place of one that went well to one that did not.
        if self.each.len() < LISTED {
            self.each.push(one);
        } else if one.refused.is_some()
            && let Some(well) = self.each.iter().rposition(|listed| listed.refused.is_none())
        {
            self.each[well] = one;
        }
    }
}

impl<H: Handler> Sequencer<H> {
    /// Tries again what is held: of each aggregate the event that stops it, and what waits behind it, in
    /// their order, up to the next one that is refused, which counts as one more attempt at that one.
    ///
    /// Everything happens under the aggregate's lock, so any number of redrives and consumers may run at
    /// once. `progress` is told after each aggregate.
    pub async fn redrive(
        &self,
        redrive: &Redrive,
        mut progress: impl FnMut(&RedriveSummary),
    ) -> Result<RedriveSummary, RedriveError> {
        let mut all = RedriveSummary::default();
        let mut after = None;
        loop {
            let mut conn = self.pool.acquire().await?;
            let page = held::due(&mut conn, &self.consumer, &redrive.filter, after.as_ref(), PAGE).await?;
            drop(conn);
            for key in &page {
                all.add(self.bring_on(key, redrive.batch, redrive.dry_run).await?);
                progress(&all);
            }
            match page.into_iter().next_back() {
                Some(last) => after = Some(last),
                None => return Ok(all),
            }
        }
    }

    /// One aggregate, in as many transactions as it takes; a dry run sees no further than one goes.
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

    /// One transaction, and again when the server preferred another one.
    async fn some(&self, key: &Key, batch: usize, dry_run: bool) -> Result<RedrivenAggregate, RedriveError> {
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
        let mut ledger = Ledger::lock(&mut tx, &self.consumer, &BTreeSet::from([key.clone()])).await?;
        ledger.read_held(&mut tx, &[]).await?;
        Ok((tx, ledger))
    }

    /// Applies what is held next, at most `batch` events, each in a savepoint of its own: whichever is
    /// refused, the rest is applied. Writes where the aggregate stands then.
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
            let Some(event) = ledger.events(tx, &[(key, version)]).await?.into_values().next() else { break };
            if version > ledger.chain(key)?.version.saturating_add(1) && !event.jumps() {
                break;
            }
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
        let to = chain.version;
        let held = ledger.count(tx, key).await?;
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

/// Not for ever.
pub(crate) async fn within<T>(
    work: impl Future<Output = Result<T, RedriveError>>,
) -> Result<T, RedriveError> {
    match tokio::time::timeout(LIMIT, work).await {
        Ok(done) => done,
        Err(_) => Err(RedriveError::Transient(format!("a transaction took longer than {LIMIT:?}"))),
    }
}

/// The held event to try: the next one, or else the first that was refused, which may jump.
fn turn(chain: &Chain<'_>) -> Option<i64> {
    let next = chain.version.saturating_add(1);
    if chain.held.contains_key(&next) {
        return Some(next);
    }
    chain.held.range(next..).find(|(_, held)| held.reason.blocks()).map(|(version, _)| *version)
}
