use std::{collections::BTreeSet, ops::AddAssign, panic::AssertUnwindSafe, slice, time::Duration};

use chrono::{TimeDelta, Utc};
use futures_util::FutureExt;
use sqlx::{Acquire, PgPool, Postgres, Transaction};

use crate::{
    Envelope, Event, Failure, Handler, Malformed,
    handler::{describe, is_transient},
    ledger::{Chain, Hold, Key, Ledger, Rejection},
    message::made_at,
};

/// How many held events one transaction applies after a gap was filled; the next one goes on.
const DRAIN: usize = 64;
/// A transaction that takes longer is given up; whether it was committed shows at redelivery.
const TRANSACTION: Duration = Duration::from_mins(1);
/// How much later an event must have been made than the last one applied to contradict it with a lower
/// version. Clocks of two writers differ, and ids of one millisecond have no order; a real fork that
/// hides below this shows itself when its chain comes to the version applied last.
const CLOCK_TOLERANCE: TimeDelta = TimeDelta::seconds(10);

/// Applies events once and in order, whatever order and however often they arrive.
///
/// For an event with version *v* of an aggregate that stands at *n*, in one transaction with the handler:
///
/// | case | action |
/// |---|---|
/// | *v* ≤ *n* | a duplicate; but another id at *v* = *n*, or a later-made event below, is a suspected fork: stored, alarm |
/// | *v* = *n* + 1 | applied, then what is held next to it |
/// | *v* > *n* + 1 | held; a baseline or the aggregate's own deletion jumps instead |
/// | the handler refuses it | held with the error; later ones wait behind it |
/// | the database or the handler cannot now | nothing is changed; to be delivered again |
/// | it is no event | stored as it came |
///
/// `consumer` is part of every key: consumers with different names do not see each other, and any number
/// of processes with the same name share the work.
#[derive(Debug)]
pub struct Sequencer<H> {
    consumer: String,
    pool: PgPool,
    handler: H,
}

/// What became of messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Applied, those that had been held included.
    pub applied: u64,
    /// Nothing to do: applied or held before.
    pub duplicates: u64,
    /// Newly held because an earlier version is missing or is poison.
    pub held: u64,
    /// Newly refused by the handler.
    pub poison: u64,
    /// No events.
    pub rejected: u64,
    /// Suspected forks.
    pub forks: u64,
}

impl AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.applied += other.applied;
        self.duplicates += other.duplicates;
        self.held += other.held;
        self.poison += other.poison;
        self.rejected += other.rejected;
        self.forks += other.forks;
    }
}

/// Why messages were not settled. Deliver those from `settled` on again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Interrupted {
    /// How many messages from the start are settled all the same.
    pub settled: usize,
    /// What happened, for logs and readiness.
    pub reason: String,
    /// The database refused the inbox's own statements for the first unsettled message, and another
    /// try would end the same way. False when it passes.
    pub refused: bool,
}

/// How a transaction treats its handler calls.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Many, without savepoints: fast, and failed as a whole when one of them fails.
    Together,
    /// One, in a savepoint, so that its failure is known to be its own.
    Alone,
}

/// Why a transaction was rolled back.
enum Stop {
    /// It passes.
    Transient(String),
    /// It does not.
    Failed(String),
}

impl From<sqlx::Error> for Stop {
    fn from(error: sqlx::Error) -> Self {
        if is_transient(&error) { Self::Transient(describe(&error)) } else { Self::Failed(describe(&error)) }
    }
}

/// A message, parsed once for all tries.
struct Message<'a> {
    envelope: &'a Envelope,
    event: Result<Event, Malformed>,
}

/// The state of one transaction.
struct Run<'a> {
    tx: Transaction<'static, Postgres>,
    ledger: Ledger<'a>,
    mode: Mode,
    /// How many held events, or in [`Mode::Alone`] how many events at all, may still be applied.
    budget: usize,
    /// Aggregates with held events that may be next, but for which the budget did not last.
    unfinished: Vec<Key>,
    outcome: Outcome,
    /// Seconds between making and applying, one for each event applied.
    lags: Vec<f64>,
}

impl<H: Handler> Sequencer<H> {
    /// A sequencer under the name `consumer`, which must stay the same for as long as the read model
    /// lives: what was applied is remembered by it.
    pub fn new(consumer: impl Into<String>, pool: PgPool, handler: H) -> Self {
        Self { consumer: consumer.into(), pool, handler }
    }

    /// The database that it writes to.
    pub(crate) fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// Settles `messages`, in their order: in one transaction, or, when that fails for one of them, in
    /// one transaction each, so that a bad event costs nobody else. Everything it reports as settled is
    /// committed, and may be acknowledged.
    pub async fn apply(&self, messages: &[Envelope]) -> Result<Outcome, Interrupted> {
        let messages: Vec<Message<'_>> =
            messages.iter().map(|envelope| Message { envelope, event: envelope.event() }).collect();
        if messages.len() > 1 {
            match self.settle(&messages, Mode::Together).await {
                Ok(outcome) => return Ok(outcome),
                Err(Stop::Transient(reason)) => {
                    return Err(Interrupted { settled: 0, reason, refused: false });
                }
                Err(Stop::Failed(reason)) => {
                    tracing::debug!(reason, messages = messages.len(), "a batch failed; one at a time");
                }
            }
        }
        let mut outcome = Outcome::default();
        for (settled, message) in messages.iter().enumerate() {
            match self.settle(slice::from_ref(message), Mode::Alone).await {
                Ok(one) => outcome += one,
                Err(Stop::Transient(reason)) => return Err(Interrupted { settled, reason, refused: false }),
                Err(Stop::Failed(reason)) => return Err(Interrupted { settled, reason, refused: true }),
            }
        }
        Ok(outcome)
    }

    /// One transaction for the messages, then as many as it takes for what they freed.
    async fn settle(&self, messages: &[Message<'_>], mode: Mode) -> Result<Outcome, Stop> {
        let (mut outcome, mut unfinished) = self.transaction(messages, &[], mode).await?;
        while !unfinished.is_empty() {
            let (freed, rest) = match self.transaction(&[], &unfinished, Mode::Together).await {
                Err(Stop::Failed(_)) => self.transaction(&[], &unfinished, Mode::Alone).await?,
                done => done?,
            };
            outcome += freed;
            unfinished = rest;
        }
        Ok(outcome)
    }

    /// One transaction: `messages`, and what is held for the aggregates in `resume`.
    async fn transaction(
        &self,
        messages: &[Message<'_>],
        resume: &[Key],
        mode: Mode,
    ) -> Result<(Outcome, Vec<Key>), Stop> {
        let work = async {
            // Whatever keeps it from beginning (no connection, no login) is no message's fault.
            let mut tx = self.pool.begin().await.map_err(|error| Stop::Transient(describe(&error)))?;
            let events = messages.iter().filter_map(|message| message.event.as_ref().ok());
            let keys: BTreeSet<Key> = events.map(Key::from).chain(resume.iter().cloned()).collect();
            let ledger = Ledger::lock(&mut tx, &self.consumer, keys).await?;
            let mut run = Run {
                tx,
                ledger,
                mode,
                budget: if mode == Mode::Alone { 1 } else { DRAIN },
                unfinished: Vec::new(),
                outcome: Outcome::default(),
                lags: Vec::new(),
            };
            for message in messages {
                match &message.event {
                    Ok(event) => self.sequence(&mut run, message.envelope, event).await?,
                    Err(malformed) => {
                        let detail = malformed.to_string();
                        run.ledger
                            .reject(&mut run.tx, message.envelope, Rejection::Malformed, &detail)
                            .await?;
                        run.outcome.rejected += 1;
                        tracing::warn!(consumer = self.consumer, detail, "a message is no event");
                    }
                }
            }
            for key in resume {
                self.drain(&mut run, key).await?;
            }
            let Run { mut tx, ledger, outcome, unfinished, lags, .. } = run;
            ledger.save(&mut tx).await?;
            tx.commit().await?;
            self.committed(outcome, &lags);
            Ok((outcome, unfinished))
        };
        match tokio::time::timeout(TRANSACTION, work).await {
            Ok(done) => done,
            Err(_) => Err(Stop::Transient(format!("a transaction took longer than {TRANSACTION:?}"))),
        }
    }

    /// The table above, for one event.
    async fn sequence(&self, run: &mut Run<'_>, envelope: &Envelope, event: &Event) -> Result<(), Stop> {
        let key = Key::from(event);
        let chain = run.ledger.chain(&key)?;
        let next = chain.version + 1;
        if event.version < next {
            match contradiction(chain, event) {
                Some(detail) => self.fork(run, envelope, event, detail).await?,
                None => run.outcome.duplicates += 1,
            }
        } else if event.version == next || event.jumps() {
            let held =
                if chain.held { run.ledger.held_at(&mut run.tx, &key, event.version).await? } else { None };
            match held {
                Some((id, _)) if id != event.id => self.fork(run, envelope, event, HELD_OTHER).await?,
                // It was tried already. Another delivery is no other attempt.
                Some((_, true)) => run.outcome.duplicates += 1,
                _ => self.advance(run, &key, event).await?,
            }
        } else {
            match run.ledger.hold(&mut run.tx, &key, event).await? {
                Hold::Held => run.outcome.held += 1,
                Hold::Known => run.outcome.duplicates += 1,
                Hold::Contradicted => self.fork(run, envelope, event, HELD_OTHER).await?,
            }
        }
        self.drain(run, &key).await
    }

    /// Applies what is held next to where the chain of `key` stands. Also after a duplicate: the process
    /// may have died between two transactions of a long chain, and then its filler comes again.
    async fn drain(&self, run: &mut Run<'_>, key: &Key) -> Result<(), Stop> {
        while let Some(event) = run.ledger.next_held(&mut run.tx, key).await? {
            if run.budget == 0 {
                if !run.unfinished.contains(key) {
                    run.unfinished.push(key.clone());
                }
                return Ok(());
            }
            if run.mode == Mode::Together {
                run.budget -= 1;
            }
            self.advance(run, key, &event).await?;
        }
        Ok(())
    }

    /// Calls the handler, and moves the chain on or holds the event as poison.
    async fn advance(&self, run: &mut Run<'_>, key: &Key, event: &Event) -> Result<(), Stop> {
        let handled = match run.mode {
            Mode::Together => self.handle(&mut run.tx, event).await,
            Mode::Alone => {
                run.budget = 0;
                let mut savepoint = run.tx.begin().await?;
                let mut handled = self.handle(&mut savepoint, event).await;
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
        };
        match (handled, run.mode) {
            (Ok(()), _) => {
                run.ledger.advance(key, event);
                run.outcome.applied += 1;
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a lag of 285 million years is precise enough"
                )]
                let lag = event.made_at().map(|at| (Utc::now() - at).num_milliseconds() as f64 / 1_000.0);
                run.lags.extend(lag);
                Ok(())
            }
            (Err(Failure::Transient(reason)), _) => Err(Stop::Transient(reason)),
            (Err(Failure::Poison(reason)), Mode::Together) => Err(Stop::Failed(reason)),
            (Err(Failure::Poison(reason)), Mode::Alone) => {
                tracing::warn!(
                    consumer = self.consumer,
                    source = event.source,
                    aggregate = format_args!("{}/{}", event.aggregate_type, event.aggregate_id),
                    version = event.version,
                    event = %event.id,
                    type_ = event.type_,
                    reason,
                    "the handler refused an event; it is held, and later ones of its aggregate wait behind it"
                );
                run.ledger.poison(&mut run.tx, key, event, &reason).await?;
                run.outcome.poison += 1;
                Ok(())
            }
        }
    }

    /// A handler that panics has a defect that this event shows: poison, not the end of the process.
    async fn handle(&self, tx: &mut Transaction<'_, Postgres>, event: &Event) -> Result<(), Failure> {
        AssertUnwindSafe(self.handler.handle(event, tx))
            .catch_unwind()
            .await
            .unwrap_or_else(|_| Err(Failure::poison("the handler panicked")))
    }

    /// Keeps an event that contradicts what was applied or held, and raises the alarm.
    async fn fork(
        &self,
        run: &mut Run<'_>,
        envelope: &Envelope,
        event: &Event,
        detail: &'static str,
    ) -> Result<(), Stop> {
        run.ledger.reject(&mut run.tx, envelope, Rejection::Fork, detail).await?;
        run.outcome.forks += 1;
        tracing::warn!(
            consumer = self.consumer,
            source = event.source,
            aggregate = format_args!("{}/{}", event.aggregate_type, event.aggregate_id),
            version = event.version,
            event = %event.id,
            detail,
            "suspected fork: the source's history was rewritten without a new incarnation; the event is kept \
             in inbox.rejected and not applied"
        );
        Ok(())
    }

    /// Counts, and wakes who waits. After the commit: what is rolled back did not happen.
    fn committed(&self, outcome: Outcome, lags: &[f64]) {
        let count = |name: &'static str, n: u64| {
            metrics::counter!(name, "consumer" => self.consumer.clone()).increment(n);
        };
        count("inbox_applied_total", outcome.applied);
        count("inbox_duplicates_total", outcome.duplicates);
        count("inbox_held_total", outcome.held);
        count("inbox_poison_total", outcome.poison);
        count("inbox_rejected_total", outcome.rejected);
        count("inbox_forks_total", outcome.forks);
        let lag = metrics::histogram!("inbox_lag_seconds", "consumer" => self.consumer.clone());
        for seconds in lags {
            lag.record(seconds.max(0.0));
        }
        if outcome.applied > 0 {
            self.handler.committed();
        }
    }
}

const HELD_OTHER: &str = "another event of this version is held already";

/// Why an event at or below the version applied last cannot be a mere duplicate.
fn contradiction(chain: &Chain, event: &Event) -> Option<&'static str> {
    let last = chain.last_event_id?;
    if event.version == chain.version {
        return (event.id != last).then_some("another event of this version was applied");
    }
    let later = made_at(event.id)? > made_at(last)? + CLOCK_TOLERANCE;
    later.then_some("it was made later than an event of a higher version that was applied")
}
