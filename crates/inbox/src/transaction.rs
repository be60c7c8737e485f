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
    handler::describe,
    ledger::{Ledger, NEAR, UNREADABLE},
    plan::{Message, Plan},
    save::{Rejected, Rejection},
    schema::BEGIN,
};

/// A transaction that takes longer is given up; whether it was committed shows at redelivery.
const LIMIT: Duration = Duration::from_mins(1);
/// So long it may take to begin; short enough that the limit of all is never what ends it.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

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
#[derive(Clone, Copy)]
pub(crate) struct Work<'a> {
    pub(crate) messages: &'a [Message<'a>],
    /// Aggregates of which held events may be next.
    pub(crate) resume: &'a [Key],
    pub(crate) mode: Mode,
    /// How many held events it may apply; the next transaction goes on.
    pub(crate) budget: usize,
    /// Hold the event for this reason, without calling its handler again.
    pub(crate) refuse: Option<&'a str>,
}

impl<'a> Work<'a> {
    /// Messages, and what they free.
    pub(crate) fn messages(messages: &'a [Message<'a>]) -> Self {
        Self { messages, resume: &[], mode: Mode::Together, budget: NEAR, refuse: None }
    }

    /// A message of which one has to know whether it is at fault, and nothing of what it frees.
    pub(crate) fn alone(message: &'a Message<'a>) -> Self {
        Self { messages: slice::from_ref(message), resume: &[], mode: Mode::Alone, budget: 0, refuse: None }
    }

    /// A message whose handler may end the process.
    pub(crate) fn suspect(message: &'a Message<'a>) -> Self {
        Self { messages: slice::from_ref(message), resume: &[], mode: Mode::Attempt, budget: 0, refuse: None }
    }

    /// The next held event of some aggregates, in a mode that takes one alone.
    pub(crate) fn one_held(resume: &'a [Key], mode: Mode) -> Self {
        Self { messages: &[], resume, mode, budget: 1, refuse: None }
    }

    /// The next held events of some aggregates, at most `budget` of them.
    pub(crate) fn held(resume: &'a [Key], budget: usize) -> Self {
        let mode = if budget == 1 { Mode::Alone } else { Mode::Together };
        Self { messages: &[], resume, mode, budget, refuse: None }
    }
}

/// Why a transaction was rolled back.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It passes.
    Transient(String),
    /// The server preferred another transaction; the same work may succeed at once.
    Conflict(String),
    /// It does not.
    Failed(String),
    /// What is stored of held events cannot be read.
    Unreadable(Vec<(Key, i64)>),
    /// It took longer than it may; smaller parts may not.
    TooLong(String),
}

impl Stop {
    /// As the caller of the sequencer sees it, when so many messages were settled before.
    pub(crate) fn after(self, settled: usize) -> Interrupted {
        let refused = matches!(self, Self::Failed(_));
        Interrupted { settled, reason: self.reason(), refused }
    }

    /// In words.
    pub(crate) fn reason(self) -> String {
        match self {
            Self::Transient(reason)
            | Self::Conflict(reason)
            | Self::Failed(reason)
            | Self::TooLong(reason) => reason,
            Self::Unreadable(_) => UNREADABLE.to_owned(),
        }
    }
}

impl From<sqlx::Error> for Stop {
    fn from(error: sqlx::Error) -> Self {
        Failure::from(error).into()
    }
}

impl Stop {
    /// Of what only waits for others: that it took long is not the events' fault.
    fn of_waiting(self) -> Self {
        match self {
            Self::TooLong(reason) => Self::Transient(reason),
            other => other,
        }
    }
}

impl<H: Handler> Sequencer<H> {
    /// Does the work and commits. What it could not finish comes back.
    pub(crate) async fn transaction(&self, work: Work<'_>) -> Result<(Outcome, Vec<Key>), Stop> {
        let mut attempts = outbox::database::Attempts::default();
        loop {
            match self.once(work).await {
                // Nothing of it remains. To give the messages back instead would use up their deliveries.
                Err(Stop::Conflict(reason)) => {
                    tracing::debug!(consumer = self.consumer, reason, "another transaction was preferred");
                    if !attempts.again().await {
                        return Err(Stop::Transient(reason));
                    }
                }
                Err(Stop::Unreadable(events)) => {
                    for (key, version) in &events {
                        self.set_aside(key, *version).await?;
                    }
                    // It was to be tried again, and that is what came of it.
                    if work.mode == Mode::Retry {
                        return Ok((Outcome { poison: 1, ..Outcome::default() }, Vec::new()));
                    }
                }
                done => return done,
            }
        }
    }

    async fn once(&self, work: Work<'_>) -> Result<(Outcome, Vec<Key>), Stop> {
        let mut attempt = None;
        let done = match tokio::time::timeout(LIMIT, self.begin(work, &mut attempt)).await {
            Ok(done) => done,
            Err(_) => Err(Stop::TooLong(format!("a transaction took longer than {LIMIT:?}"))),
        };
        if let (Err(_), Some(attempt)) = (&done, attempt) {
            self.take_back(attempt).await;
        }
        done
    }

    /// A held event that cannot be read is refused like one that its handler refuses: whoever looks sees it, and
    /// may skip it.
    async fn set_aside(&self, key: &Key, version: i64) -> Result<(), Stop> {
        let away = |error: sqlx::Error| Stop::Transient(describe(&error));
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

    async fn begin(
        &self,
        work: Work<'_>,
        attempt: &mut Option<Attempt>,
    ) -> Result<(Outcome, Vec<Key>), Stop> {
        // Whatever keeps it from beginning (no connection, no login) is no message's fault.
        let away = |error: sqlx::Error| Stop::Transient(describe(&error));
        let mut conn = self.session.take().await.map_err(away)?;
        let Ok(begun) =
            tokio::time::timeout(BEGIN_LIMIT, sqlx::Connection::begin_with(&mut *conn, BEGIN)).await
        else {
            // It may begin yet, and nothing would roll it back: whoever had the connection next would be in it.
            conn.close_on_drop();
            return Err(Stop::Transient(format!("no transaction began within {BEGIN_LIMIT:?}")));
        };
        let mut tx = begun.map_err(away)?;
        self.handler.begin(&mut tx).await.map_err(|failure| Stop::from(failure).of_waiting())?;
        let received: Vec<&Event> = work.messages.iter().filter_map(|m| m.event.as_ref().ok()).collect();
        let mut keys: BTreeSet<Key> =
            received.iter().map(|event| Key::from(*event)).chain(work.resume.iter().cloned()).collect();
        let full = self.limits.is_full();
        if full {
            self.leave_out(&mut tx, &mut keys, &received).await?;
        }
        let mut ledger = Ledger::lock(&mut tx, &self.consumer, &keys)
            .await
            .map_err(|error| Stop::from(error).of_waiting())?;
        ledger.read_held(&mut tx, &received).await?;

        let mut plan = Plan::new(ledger, work.mode, work.budget, full);
        for message in work.messages {
            plan.message(message)?;
        }
        for key in work.resume {
            plan.drain(key)?;
        }

        let events = plan.events(&mut tx).await?;
        if !plan.ledger.unreadable.is_empty() {
            return Err(Stop::Unreadable(plan.ledger.unreadable));
        }
        match (work.mode, events.as_slice()) {
            (_, []) => {}
            (Mode::Together, events) => self.handle(&mut tx, events).await?,
            (mode, [event]) => {
                let (handled, attempts) = match work.refuse {
                    Some(reason) => (Err(Failure::poison(reason)), plan.attempts().saturating_add(1)),
                    None => self.try_alone(&mut tx, mode, &mut plan, event, attempt).await?,
                };
                match handled {
                    Ok(()) => {}
                    Err(Failure::Transient(reason)) => return Err(Stop::Transient(reason)),
                    Err(Failure::Conflict(reason)) => return Err(Stop::Conflict(reason)),
                    Err(Failure::TooLong(reason)) => return Err(Stop::TooLong(reason)),
                    Err(Failure::Poison(reason)) => {
                        self.refuse(&mut tx, event, &reason, attempts).await?;
                        plan.refused(attempts)?;
                        plan.outcome.poison += 1;
                        self.streaks().refused(mode, &event.source, reason);
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
        plan.ledger.reject(&mut tx, &plan.rejected, self.limits.rejected()).await?;
        plan.outcome.applied = plan.due.len() as u64;
        tx.commit().await?;
        self.session.keep(conn);
        failpoint::hit("commit", &events);
        self.committed(&plan, &events);
        Ok((plan.outcome, plan.unfinished))
    }

    /// Leaves out the aggregates that nobody knows, and of which no event that came is a first one: no more may
    /// wait, so nothing is to be stored of them.
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
            return Ok((self.handle_alone(tx, event).await, attempts.saturating_add(1)));
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
        self.log_refused(&outcome);
        let count = |name: &'static str, n: u64| {
            metrics::counter!(name, "consumer" => self.consumer.clone()).increment(n);
        };
        count("inbox_applied_total", outcome.applied);
        count("inbox_duplicates_total", outcome.duplicates);
        count("inbox_held_total", outcome.held);
        count("inbox_poison_total", outcome.poison);
        count("inbox_rejected_total", outcome.rejected);
        count("inbox_foreign_total", outcome.foreign);
        count("inbox_wrong_user_total", outcome.wrong_user);
        count("inbox_forks_total", outcome.forks);
        if outcome.applied > 0 {
            let mut streaks = self.streaks();
            for event in events {
                streaks.applied(&event.source);
            }
            drop(streaks);
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

    /// One line for all of a transaction: anybody may send any number of them.
    fn log_refused(&self, outcome: &Outcome) {
        let Outcome { foreign, wrong_user, .. } = *outcome;
        let consumer = &self.consumer;
        if foreign > 0 {
            tracing::warn!(consumer, messages = foreign, "messages of sources that are not followed");
        }
        if wrong_user > 0 {
            tracing::error!(
                consumer,
                messages = wrong_user,
                "messages of a followed source from a user that does not publish it: they are kept in \
                 inbox.rejected and not applied. Somebody forges events, or the publisher's user was renamed"
            );
        }
    }

    fn log_rejected(&self, rejected: &Rejected<'_>) {
        if matches!(rejected.reason, Rejection::Foreign | Rejection::WrongUser) {
            return;
        }
        let (consumer, detail) = (&self.consumer, &rejected.detail);
        let Some(event) = rejected.event.filter(|_| rejected.reason == Rejection::Fork) else {
            tracing::warn!(consumer, detail, "a message cannot be applied");
            return;
        };
        tracing::warn!(
            consumer,
            source = event.source,
            aggregate = format_args!("{}/{}", shown::shown(&event.aggregate_type), shown::shown(&event.aggregate_id)),
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
            Failure::Conflict(reason) => Self::Conflict(reason),
            Failure::Poison(reason) => Self::Failed(reason),
            Failure::TooLong(reason) => Self::TooLong(reason),
        }
    }
}
