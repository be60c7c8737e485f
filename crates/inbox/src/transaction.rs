//! One transaction of the sequencer: lock, decide, apply, write, commit.

use std::{collections::BTreeSet, panic::AssertUnwindSafe, slice, time::Duration};

use chrono::Utc;
use futures_util::FutureExt;
use sqlx::{Acquire, Postgres, Transaction};

use crate::{
    Event, Failure, Handler, Interrupted, Outcome, Sequencer,
    attempt::{Attempt, NEVER_CAME_BACK},
    chain::{Key, Reason},
    failpoint,
    handler::{describe, is_transient},
    ledger::{Ledger, NEAR},
    plan::{Message, Plan},
    save::Rejected,
};

/// A transaction that takes longer is given up; whether it was committed shows at redelivery.
const LIMIT: Duration = Duration::from_mins(1);
/// So long it may take to begin; short enough that the limit of all is never what ends it.
const BEGIN: Duration = Duration::from_secs(10);

/// How a transaction treats its events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Without savepoints: fast, and failed as a whole when one of them fails.
    Together,
    /// One, in a savepoint, so that its failure is known to be its own.
    Alone,
    /// Alone; and since its handler may end the process, that it is tried is committed before.
    Attempt,
    /// Alone, and poison too: it is to be tried again.
    Retry,
}

impl Mode {
    /// Whether an event that is held for this reason may have its turn.
    pub(crate) fn takes(self, reason: Reason) -> bool {
        match reason {
            Reason::Gap | Reason::Behind => true,
            Reason::Trying => matches!(self, Self::Attempt | Self::Retry),
            Reason::Poison => self == Self::Retry,
        }
    }
}

/// What a transaction is about.
pub(crate) struct Work<'a> {
    pub(crate) messages: &'a [Message<'a>],
    /// Aggregates of which held events may be next.
    pub(crate) resume: &'a [Key],
    pub(crate) mode: Mode,
    /// How many held events it may apply; the next transaction goes on.
    pub(crate) budget: usize,
}

impl<'a> Work<'a> {
    /// Messages, and what they free.
    pub(crate) fn messages(messages: &'a [Message<'a>]) -> Self {
        Self { messages, resume: &[], mode: Mode::Together, budget: NEAR }
    }

    /// A message of which one has to know whether it is at fault, and nothing of what it frees.
    pub(crate) fn alone(message: &'a Message<'a>) -> Self {
        Self { messages: slice::from_ref(message), resume: &[], mode: Mode::Alone, budget: 0 }
    }

    /// A message whose handler may end the process.
    pub(crate) fn suspect(message: &'a Message<'a>) -> Self {
        Self { messages: slice::from_ref(message), resume: &[], mode: Mode::Attempt, budget: 0 }
    }

    /// The next held event of some aggregates, in a mode that takes one alone.
    pub(crate) fn one_held(resume: &'a [Key], mode: Mode) -> Self {
        Self { messages: &[], resume, mode, budget: 1 }
    }

    /// The next held events of some aggregates, at most `budget` of them.
    pub(crate) fn held(resume: &'a [Key], budget: usize) -> Self {
        let mode = if budget == 1 { Mode::Alone } else { Mode::Together };
        Self { messages: &[], resume, mode, budget }
    }
}

/// Why a transaction was rolled back.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It passes.
    Transient(String),
    /// It does not.
    Failed(String),
}

impl Stop {
    /// As the caller of the sequencer sees it, when so many messages were settled before.
    pub(crate) fn after(self, settled: usize) -> Interrupted {
        let refused = matches!(self, Self::Failed(_));
        let (Self::Transient(reason) | Self::Failed(reason)) = self;
        Interrupted { settled, reason, refused }
    }
}

impl From<sqlx::Error> for Stop {
    fn from(error: sqlx::Error) -> Self {
        if is_transient(&error) { Self::Transient(describe(&error)) } else { Self::Failed(describe(&error)) }
    }
}

impl<H: Handler> Sequencer<H> {
    /// Does the work and commits. What it could not finish comes back.
    pub(crate) async fn transaction(&self, work: Work<'_>) -> Result<(Outcome, Vec<Key>), Stop> {
        let mut attempt = None;
        let done = match tokio::time::timeout(LIMIT, self.begin(work, &mut attempt)).await {
            Ok(done) => done,
            Err(_) => Err(Stop::Transient(format!("a transaction took longer than {LIMIT:?}"))),
        };
        if let (Err(_), Some(attempt)) = (&done, attempt) {
            self.take_back(attempt).await;
        }
        done
    }

    async fn begin(
        &self,
        work: Work<'_>,
        attempt: &mut Option<Attempt>,
    ) -> Result<(Outcome, Vec<Key>), Stop> {
        // Whatever keeps it from beginning (no connection, no login) is no message's fault.
        let away = |error: sqlx::Error| Stop::Transient(describe(&error));
        let mut conn = self.session.take().await.map_err(away)?;
        let Ok(begun) = tokio::time::timeout(BEGIN, conn.begin()).await else {
            // It may begin yet, and nothing would roll it back: whoever had the connection next would be in it.
            conn.close_on_drop();
            return Err(Stop::Transient(format!("no transaction began within {BEGIN:?}")));
        };
        let mut tx = begun.map_err(away)?;
        self.handler.begin(&mut tx).await?;
        let received: Vec<&Event> = work.messages.iter().filter_map(|m| m.event.as_ref().ok()).collect();
        let keys: BTreeSet<Key> =
            received.iter().map(|event| Key::from(*event)).chain(work.resume.iter().cloned()).collect();
        let mut ledger = Ledger::lock(&mut tx, &self.consumer, &keys).await?;
        ledger.read_held(&mut tx, &received).await?;

        let mut plan = Plan::new(ledger, work.mode, work.budget);
        for message in work.messages {
            plan.message(message)?;
        }
        for key in work.resume {
            plan.drain(key)?;
        }

        let events = plan.events(&mut tx).await?;
        match (work.mode, events.as_slice()) {
            (_, []) => {}
            (Mode::Together, events) => self.handle(&mut tx, events).await?,
            (mode, [event]) => {
                let (handled, attempts) = self.try_alone(&mut tx, mode, &mut plan, event, attempt).await?;
                match handled {
                    Ok(()) => {}
                    Err(Failure::Transient(reason)) => return Err(Stop::Transient(reason)),
                    Err(Failure::Poison(reason)) => {
                        self.refuse(&mut tx, event, &reason, attempts).await?;
                        plan.refused(attempts)?;
                        plan.outcome.poison += 1;
                        self.streak().refused(mode, reason);
                    }
                }
            }
            (_, _) => return Err(Stop::Failed("more than one event to take alone".to_owned())),
        }
        // What was refused was taken back.
        let applied = if plan.due.is_empty() { &[] } else { events.as_slice() };
        failpoint::hit("apply", applied);
        applied.iter().try_for_each(|event| plan.ledger.applied(event))?;
        plan.ledger.save(&mut tx).await?;
        plan.ledger.reject(&mut tx, &plan.rejected).await?;
        plan.outcome.applied = plan.due.len() as u64;
        tx.commit().await?;
        self.session.keep(conn);
        failpoint::hit("commit", &events);
        self.committed(&plan, &events);
        Ok((plan.outcome, plan.unfinished))
    }

    /// Calls the handler for one event, unless it never came back from that often enough. Also says the
    /// how-manieth attempt it was.
    async fn try_alone(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        mode: Mode,
        plan: &mut Plan<'_>,
        event: &Event,
        attempt: &mut Option<Attempt>,
    ) -> Result<(Result<(), Failure>, i32), Stop> {
        let held = plan.due.first().and_then(|due| due.held);
        let attempts = held.map_or(0, |(_, attempts)| attempts);
        let tried = matches!(held, Some((Reason::Trying, _)));
        if mode == Mode::Retry || !tried && mode == Mode::Alone {
            return Ok((self.handle_alone(tx, event).await, attempts + 1));
        }
        match self.begin_attempt(event, held).await? {
            Some(begun) => {
                let attempts = attempt.insert(begun).attempts;
                plan.tried(attempts)?;
                Ok((self.handle_alone(tx, event).await, attempts))
            }
            None => Ok((Err(Failure::poison(NEVER_CAME_BACK)), attempts)),
        }
    }

    /// In a savepoint, so that what the handler has changed can be taken back alone.
    pub(crate) async fn handle_alone(
        &self,
        tx: &mut Transaction<'_, Postgres>,
        event: &Event,
    ) -> Result<(), Failure> {
        let mut savepoint = tx.begin().await?;
        let mut handled = self.handle(&mut savepoint, slice::from_ref(event)).await;
        if handled.is_ok() {
            // A deferred constraint would fail at the commit, where nobody could tell whose it is.
            handled = sqlx::query("SET CONSTRAINTS ALL IMMEDIATE")
                .execute(&mut *savepoint)
                .await
                .map(drop)
                .map_err(Failure::from);
        }
        if handled.is_ok() {
            savepoint.commit().await?;
        } else {
            savepoint.rollback().await?;
        }
        handled
    }

    /// A handler that panics has a defect that these events show: poison, not the end of the process.
    async fn handle(&self, tx: &mut Transaction<'_, Postgres>, events: &[Event]) -> Result<(), Failure> {
        AssertUnwindSafe(self.handler.handle_batch(events, tx))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Err(Failure::poison("the handler panicked")))
    }

    /// Logs, counts, and wakes who waits. After the commit: what is rolled back did not happen.
    fn committed(&self, plan: &Plan<'_>, events: &[Event]) {
        for rejected in &plan.rejected {
            self.log_rejected(rejected);
        }
        let outcome = plan.outcome;
        let count = |name: &'static str, n: u64| {
            metrics::counter!(name, "consumer" => self.consumer.clone()).increment(n);
        };
        count("inbox_applied_total", outcome.applied);
        count("inbox_duplicates_total", outcome.duplicates);
        count("inbox_held_total", outcome.held);
        count("inbox_poison_total", outcome.poison);
        count("inbox_rejected_total", outcome.rejected);
        count("inbox_forks_total", outcome.forks);
        if outcome.applied > 0 {
            self.streak().ended();
            let lag = metrics::histogram!("inbox_lag_seconds", "consumer" => self.consumer.clone());
            let now = Utc::now();
            for made in events.iter().filter_map(Event::made_at) {
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a lag of 285 million years is precise enough"
                )]
                let seconds = (now - made).num_milliseconds() as f64 / 1_000.0;
                lag.record(seconds.max(0.0));
            }
            self.handler.committed();
        }
    }

    fn log_rejected(&self, rejected: &Rejected<'_>) {
        let (consumer, detail) = (&self.consumer, &rejected.detail);
        let Some(event) = rejected.event else {
            tracing::warn!(consumer, detail, "a message is no event");
            return;
        };
        tracing::warn!(
            consumer,
            source = event.source,
            aggregate = format_args!("{}/{}", event.aggregate_type, event.aggregate_id),
            version = event.version,
            event = %event.id,
            detail,
            "suspected fork: the source's history was rewritten without a new incarnation; the event is kept \
             in inbox.rejected and not applied"
        );
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Transient(reason) => Self::Transient(reason),
            Failure::Poison(reason) => Self::Failed(reason),
        }
    }
}
