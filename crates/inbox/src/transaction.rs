//! One transaction of the sequencer: lock, decide, apply, write, commit.

use std::{collections::BTreeSet, time::Duration};

use sqlx::{Postgres, Transaction};

use crate::{
    Event, Handler, HandlerError, Outcome, Sequencer,
    attempt::Attempt,
    chain::Key,
    failpoint,
    handler::describe,
    ledger::Ledger,
    newest::Newest,
    plan::Plan,
    rollback::Rollback,
    schema::BEGIN,
    work::{Mode, Work},
};

/// The limit of one transaction. Whether a longer one was committed is known at its redelivery.
const LIMIT: Duration = Duration::from_mins(1);
/// The limit of its BEGIN, shorter than the limit of the whole.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

impl<H: Handler> Sequencer<H> {
    /// Does the work and commits. Returns the aggregates that are not finished.
    pub(crate) async fn transaction(&self, mut work: Work<'_>) -> Result<(Outcome, Vec<Key>), Rollback> {
        let mut attempts = outbox::database::Attempts::default();
        loop {
            match self.once(work).await {
                // It was rolled back whole. Returning the messages instead would use up their delivery limit.
                Err(Rollback::Conflict(reason)) => {
                    tracing::debug!(consumer = self.consumer, reason, "another transaction was preferred");
                    if !attempts.again().await {
                        return Err(Rollback::Transient(reason));
                    }
                }
                Err(Rollback::Unreadable(events)) => {
                    for (key, version) in &events {
                        self.set_aside(key, *version).await?;
                    }
                    // This counts as the retry.
                    if work.mode == Mode::Retry {
                        return Ok((Outcome { poison: 1, ..Outcome::default() }, Vec::new()));
                    }
                }
                // Nothing was called or written yet.
                Err(Rollback::NewIncarnation) if !work.exclusive => work.exclusive = true,
                done => return done,
            }
        }
    }

    async fn once(&self, work: Work<'_>) -> Result<(Outcome, Vec<Key>), Rollback> {
        let mut attempt = None;
        let done = match tokio::time::timeout(LIMIT, self.run(work, &mut attempt)).await {
            Ok(done) => done,
            Err(_) => Err(Rollback::TooLong(format!("a transaction took longer than {LIMIT:?}"))),
        };
        if let (Err(_), Some(attempt)) = (&done, attempt) {
            self.take_back(attempt).await;
        }
        done
    }

    /// Marks a held event that cannot be read as poison, so that an operator sees it and can skip it.
    async fn set_aside(&self, key: &Key, version: i64) -> Result<(), Rollback> {
        let away = |error: sqlx::Error| Rollback::Transient(describe(&error));
        let mut tx = self.pool.begin_with(BEGIN).await.map_err(away)?;
        Ledger::lock(&mut tx, &self.consumer, &BTreeSet::from([key.clone()]))
            .await?
            .unread(&mut tx, key, version)
            .await?;
        tx.commit().await.map_err(away)?;
        tracing::warn!(
            consumer = self.consumer,
            source = key.source,
            aggregate = %key,
            version,
            "a held event cannot be read any more; later ones of its aggregate wait behind it"
        );
        Ok(())
    }

    /// One transaction: locks and decides, calls the handler, writes, and commits.
    async fn run(
        &self,
        work: Work<'_>,
        attempt: &mut Option<Attempt>,
    ) -> Result<(Outcome, Vec<Key>), Rollback> {
        // A transaction that cannot begin (no connection, no login) is no message's fault.
        let away = |error: sqlx::Error| Rollback::Transient(describe(&error));
        let mut conn = self.session.take().await.map_err(away)?;
        let Ok(begun) =
            tokio::time::timeout(BEGIN_LIMIT, sqlx::Connection::begin_with(&mut *conn, BEGIN)).await
        else {
            // The server may begin it later. The next user of the connection would be in that transaction.
            conn.close_on_drop();
            return Err(Rollback::Transient(format!("no transaction began within {BEGIN_LIMIT:?}")));
        };
        let mut tx = begun.map_err(away)?;
        self.handler.begin(&mut tx).await.map_err(|failure| Rollback::from(failure).of_waiting())?;
        let mut plan = self.decide(&mut tx, work).await?;
        plan.reject_forked(&mut tx, self.limits.rejected()).await?;
        let events = plan.events(&mut tx).await?;
        if !plan.ledger.unreadable.is_empty() {
            return Err(Rollback::Unreadable(plan.ledger.unreadable));
        }
        self.apply_events(&mut tx, work, &mut plan, &events, attempt).await?;
        self.write(&mut tx, &mut plan, &events).await?;
        tx.commit().await?;
        self.session.keep(conn);
        failpoint::hit("commit", &events);
        self.committed(&plan, &events);
        Ok((plan.outcome, plan.unfinished))
    }

    /// Locks the sources and the chains of the work, and decides what becomes of each message.
    pub(crate) async fn decide<'a>(
        &'a self,
        tx: &mut Transaction<'_, Postgres>,
        work: Work<'a>,
    ) -> Result<Plan<'a>, Rollback> {
        let waiting = |error: sqlx::Error| Rollback::from(error).of_waiting();
        let mut newest = Newest::lock(tx, &self.consumer, work).await.map_err(waiting)?;
        let refused = newest.refuse(work.messages)?;
        newest.store(tx).await?;
        let taken = work.messages.iter().zip(&refused).filter(|(_, refused)| refused.is_none());
        let received: Vec<&Event> = taken.filter_map(|(message, _)| message.event.as_ref().ok()).collect();
        // What is held of an earlier incarnation is never applied.
        let resume: Vec<&Key> = work.resume.iter().filter(|key| !newest.supersedes(&key.source)).collect();
        let mut keys: BTreeSet<Key> =
            received.iter().map(|event| Key::from(*event)).chain(resume.iter().copied().cloned()).collect();
        let full = self.limits.is_full();
        if full {
            self.leave_out(tx, &mut keys, &received).await?;
        }
        let mut ledger = Ledger::lock(tx, &self.consumer, &keys).await.map_err(waiting)?;
        ledger.read_held(tx, &received).await?;

        let mut plan = Plan::new(ledger, work.mode, work.budget, full);
        plan.taken = newest.taken;
        for (message, refused) in work.messages.iter().zip(refused) {
            plan.message(message, refused)?;
        }
        for key in resume {
            plan.drain(key)?;
        }
        Ok(plan)
    }

    /// Calls the handler for the events that are due. One that is refused alone is taken back from the plan.
    async fn apply_events(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        work: Work<'_>,
        plan: &mut Plan<'_>,
        events: &[Event],
        attempt: &mut Option<Attempt>,
    ) -> Result<(), Rollback> {
        let (mode, event) = match (work.mode, events) {
            (_, []) => return Ok(()),
            (Mode::Together, events) => return Ok(self.handle(tx, events).await?),
            (mode, [event]) => (mode, event),
            (_, _) => return Err(Rollback::Failed("more than one event to take alone".to_owned())),
        };
        let (handled, attempts) = match work.refuse {
            Some(reason) => (Err(HandlerError::poison(reason)), plan.attempts().saturating_add(1)),
            None => self.try_alone(tx, mode, plan, event, attempt).await?,
        };
        match handled {
            Err(HandlerError::Poison(reason)) => {
                self.refuse(tx, event, &reason, attempts).await?;
                plan.refused(attempts)?;
                plan.outcome.poison += 1;
                self.streaks().refused(mode, &event.source, reason);
                Ok(())
            }
            handled => Ok(handled?),
        }
    }

    /// Stores how far the chains are, and what is held and rejected.
    pub(crate) async fn write(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        plan: &mut Plan<'_>,
        events: &[Event],
    ) -> Result<(), Rollback> {
        // What was refused was taken back.
        let applied = if plan.due.is_empty() { &[] } else { events };
        failpoint::hit("apply", applied);
        applied.iter().try_for_each(|event| plan.ledger.applied(event))?;
        plan.ledger.save(tx).await?;
        plan.ledger.reject(tx, &plan.rejected, self.limits.rejected()).await?;
        plan.outcome.applied = plan.due.len() as u64;
        Ok(())
    }

    /// Leaves out aggregates that have no row and no first event among `received`. The limit of waiting events is
    /// reached, so no row is stored for them.
    async fn leave_out(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        keys: &mut BTreeSet<Key>,
        received: &[&Event],
    ) -> sqlx::Result<()> {
        let known = Ledger::known(tx, &self.consumer, keys).await?;
        let first: BTreeSet<Key> = received
            .iter()
            .filter(|event| event.version == 1 || event.jumps())
            .map(|event| Key::from(*event))
            .collect();
        keys.retain(|key| known.contains(key) || first.contains(key));
        Ok(())
    }
}
