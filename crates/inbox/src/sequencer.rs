use std::{collections::BTreeSet, slice, sync::Mutex, time::Duration};

use outbox::database::Session;
use sqlx::PgPool;

use crate::{
    Envelope, Handler, Interrupted, Outcome, Sources,
    breaker::Streaks,
    chain::Key,
    ledger::NEAR,
    limits::Limits,
    parsed::ParsedMessage,
    rollback::Rollback,
    work::{Mode, Work},
};

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
/// | it is no event, or from a source or user that is not followed | stored as it came |
///
/// `consumer` is part of every key: consumers with different names do not see each other, and any number
/// of processes with the same name share the work.
#[derive(Debug)]
pub struct Sequencer<H> {
    pub(crate) consumer: String,
    pub(crate) pool: PgPool,
    /// Of the pool, for one transaction after the other.
    pub(crate) session: Session,
    pub(crate) handler: H,
    /// Attempts that were interrupted, which could not be written: this process lives, so they do not count.
    pub(crate) survived: Mutex<BTreeSet<(Key, i64)>>,
    /// How many events of each source were refused in a row.
    pub(crate) streaks: Mutex<Streaks>,
    /// Whom it believes.
    pub(crate) sources: Sources,
    /// How much it stores.
    pub(crate) limits: Limits,
}

/// A database that takes longer for a tiny commit is slow with everything.
const QUICK: Duration = Duration::from_secs(1);

impl<H: Handler> Sequencer<H> {
    /// A sequencer under the name `consumer`, which must stay the same for as long as the read model
    /// lives: what was applied is remembered by it.
    pub fn new(consumer: impl Into<String>, pool: PgPool, handler: H) -> Self {
        Self {
            consumer: consumer.into(),
            session: Session::of(pool.clone()),
            pool,
            handler,
            survived: Mutex::default(),
            streaks: Mutex::default(),
            sources: Sources::default(),
            limits: Limits::default(),
        }
    }

    /// Follows these sources alone, as published by their users. What it has stored already it believes.
    #[must_use]
    pub fn following(mut self, sources: Sources) -> Self {
        self.sources = sources;
        self
    }

    /// Settles `messages`, in their order. They are taken in one transaction; when that fails for one
    /// of them, each half is taken by itself, and so on down to the one at fault, which is held. So a
    /// bad event costs nobody else, and about twice the logarithm of the batch. Everything that is reported as
    /// settled is committed, and may be acknowledged.
    pub async fn apply(&self, messages: &[Envelope]) -> Result<Outcome, Interrupted> {
        let messages: Vec<ParsedMessage<'_>> =
            messages.iter().map(|message| ParsedMessage::new(message, &self.sources)).collect();
        let mut outcome = Outcome::default();
        let mut settled = 0;
        let mut parts = vec![messages.as_slice()];
        while let Some(part) = parts.pop().filter(|part| !part.is_empty()) {
            match self.settle(part, messages.len() > 1).await {
                Ok(one) => {
                    outcome += one;
                    settled += part.len();
                    // The rest would only go the same way.
                    if let Some(reason) = self.broken() {
                        return Err(Interrupted { settled, reason, refused: false });
                    }
                }
                Err(Rollback::Failed(reason) | Rollback::TooLong(reason)) if part.len() > 1 => {
                    tracing::debug!(
                        reason,
                        messages = part.len(),
                        "a batch failed; its halves by themselves"
                    );
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(rollback) => return Err(rollback.after(settled)),
            }
        }
        Ok(outcome)
    }

    /// Settles one message whose handler may end the process. That it is tried is committed before the
    /// handler runs, and an event whose handler has not come back three times is held as poison.
    pub async fn attempt(&self, message: &Envelope) -> Result<Outcome, Interrupted> {
        let message = ParsedMessage::new(message, &self.sources);
        let settled = async {
            let (outcome, mut unfinished) = self.alone(Work::suspect(&message)).await?;
            let mut outcome = outcome;
            // What it freed is as suspect as itself.
            while !unfinished.is_empty() {
                let (one, rest) = self.alone(Work::one_held(&unfinished, Mode::Attempt)).await?;
                outcome += one;
                unfinished = rest;
            }
            Ok(outcome)
        };
        settled.await.map_err(|rollback: Rollback| rollback.after(0))
    }

    /// Tries again the event that stops an aggregate, and applies what waits behind it.
    pub(crate) async fn retry(&self, key: &Key) -> Result<Outcome, Rollback> {
        let (mut outcome, unfinished) = self.alone(Work::one_held(slice::from_ref(key), Mode::Retry)).await?;
        outcome += self.drain(unfinished).await?;
        Ok(outcome)
    }

    /// One transaction for the messages, then as many as it takes for what they freed. What is left of `several`
    /// that failed goes into a savepoint at once, which most messages that come alone need not pay for.
    async fn settle(&self, messages: &[ParsedMessage<'_>], several: bool) -> Result<Outcome, Rollback> {
        let settled = match messages {
            [message] if several => self.alone(Work::alone(message)).await,
            _ => match (self.transaction(Work::messages(messages)).await, messages) {
                (Err(Rollback::Failed(_) | Rollback::TooLong(_)), [message]) => {
                    self.alone(Work::alone(message)).await
                }
                (settled, _) => settled,
            },
        };
        let (mut outcome, unfinished) = settled?;
        outcome += self.drain(unfinished).await?;
        Ok(outcome)
    }

    /// Applies what is held next, as much at a time as succeeds.
    async fn drain(&self, mut unfinished: Vec<Key>) -> Result<Outcome, Rollback> {
        let mut outcome = Outcome::default();
        let mut budget = NEAR;
        while !unfinished.is_empty() {
            let work = Work::held(&unfinished, budget);
            let drained = if budget == 1 { self.alone(work).await } else { self.transaction(work).await };
            match drained {
                Ok((freed, rest)) => {
                    outcome += freed;
                    unfinished = rest;
                    budget = NEAR.min(budget * 2);
                }
                Err(Rollback::Failed(_) | Rollback::TooLong(_)) if budget > 1 => budget /= 2,
                Err(rollback) => return Err(rollback),
            }
        }
        Ok(outcome)
    }

    /// A transaction for one event. When it takes longer than it may, it is tried once more, and then the event is held
    /// with the reason: the limit is our own, and the same attempt would end the same way for ever, while everybody
    /// waits. Unless the database is slow with anything: then it is nobody's fault, and passes.
    async fn alone(&self, work: Work<'_>) -> Result<(Outcome, Vec<Key>), Rollback> {
        let mut done = self.transaction(work).await;
        for again in [true, false] {
            let Err(Rollback::TooLong(reason)) = done else { return done };
            if !self.is_quick().await {
                return Err(Rollback::Transient(reason));
            }
            tracing::warn!(consumer = self.consumer, reason, again, "one event alone took too long");
            let work = if again { work } else { Work { refuse: Some(&reason), ..work } };
            done = self.transaction(work).await;
        }
        done
    }

    /// Whether the database commits something small in no time.
    async fn is_quick(&self) -> bool {
        let commit = sqlx::query("SELECT pg_logical_emit_message(true, 'inbox', '')").execute(&self.pool);
        matches!(tokio::time::timeout(QUICK, commit).await, Ok(Ok(_)))
    }
}
