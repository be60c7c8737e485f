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
    series::Backlog,
    work::{Mode, Work},
};

/// Applies events once and in order, in whatever order and however often they arrive.
///
/// For an event with version *v* of an aggregate at version *n*, in one transaction with the handler:
///
/// | case | action |
/// |---|---|
/// | *v* ≤ *n* | a duplicate: ignored. Another id than the one applied at *v* is a suspected fork: stored, with an alarm. The last 16 ids of each aggregate are known |
/// | *v* = *n* + 1, and [another event before it](crate::Event::previous_id) than the one applied last | a suspected fork: stored, with an alarm; later events wait for the right one, or for a baseline. Also a held event, when its turn comes |
/// | *v* = *n* + 1 | applied, and then the held events that continue it |
/// | *v* > *n* + 1 | held. A baseline or the aggregate's own deletion is applied instead |
/// | the handler refuses it | held with the error; later events wait behind it |
/// | the database or the handler fails transiently | nothing changes; the event has to be delivered again |
/// | not an event, or from a source or user that is not followed | stored as rejected |
/// | of an earlier incarnation of the source than the newest one known | stored as rejected, with the reason `superseded` |
/// | of a newer incarnation whose parent is the newest one known | that incarnation is the newest one from now on |
/// | of a newer incarnation with another parent | stored as rejected, with the reason `unrelated` |
/// | of a chain in a new incarnation that has not begun, over a state of an earlier one | held, except a baseline, the aggregate's own deletion, or a version 1 that [starts its chain](crate::Event::is_chain_start). One of these is applied, with [`begins_anew`](crate::Event::begins_anew), and ends the earlier chain and its held events |
///
/// The first incarnation of a source that arrives is taken, whatever it is.
///
/// `consumer` is part of every key. Consumers with different names are independent; any number of processes with the
/// same name share the work.
#[derive(Debug)]
pub struct Sequencer<H> {
    pub(crate) consumer: String,
    pub(crate) pool: PgPool,
    /// A connection of the pool, for one transaction after the other.
    pub(crate) session: Session,
    pub(crate) handler: H,
    /// Interrupted attempts that could not be written. This process lives, so they do not count.
    pub(crate) survived: Mutex<BTreeSet<(Key, i64)>>,
    /// How many events of each source were refused in a row.
    pub(crate) streaks: Mutex<Streaks>,
    /// The sources that it follows, and their broker users.
    pub(crate) sources: Sources,
    /// The limits of what it stores.
    pub(crate) limits: Limits,
    /// What waits in its queues.
    pub(crate) backlog: Backlog,
}

/// A database that needs longer for a tiny commit is slow with everything.
const QUICK: Duration = Duration::from_secs(1);

impl<H: Handler> Sequencer<H> {
    /// A sequencer for the consumer of this name. The name is the key of everything that was applied, so it must stay
    /// the same for as long as the read model exists.
    ///
    /// ```
    /// use inbox::{Handler, Sequencer};
    /// use sqlx::PgPool;
    ///
    /// fn sequencer<H: Handler>(pool: PgPool, handler: H) -> Sequencer<H> {
    ///     Sequencer::new("stock", pool, handler)
    /// }
    /// ```
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
            backlog: Backlog::default(),
        }
    }

    /// Follows only these sources, from their broker users. Events that are already held are not checked again.
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(sequencer: inbox::Sequencer<H>) -> Result<(), Box<dyn std::error::Error>> {
    /// use inbox::Publisher;
    ///
    /// let shop: Publisher = "shop=outbox_relay_shop".parse()?;
    /// let sequencer = sequencer.following([shop].into_iter().collect());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn following(mut self, sources: Sources) -> Self {
        self.sources = sources;
        self
    }

    /// Settles `messages` in their order, in one transaction. When a message makes it fail, each half is tried by itself,
    /// and so on down to the message at fault, which is held. A bad event costs about twice the logarithm of the batch
    /// size in transactions, and stops no other event. Settled messages are committed, so the caller may acknowledge
    /// them.
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(sequencer: inbox::Sequencer<H>, messages: Vec<inbox::Envelope>) {
    /// match sequencer.apply(&messages).await {
    ///     // Acknowledge all messages.
    ///     Ok(outcome) => println!("{} events applied", outcome.applied),
    ///     // Acknowledge the first `settled` messages, and return the others.
    ///     Err(interrupted) => println!("{} messages settled: {interrupted}", interrupted.settled),
    /// }
    /// # }
    /// ```
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

    /// Settles one message whose handler may end the process. The attempt is committed before the handler runs. An event
    /// whose handler did not return three times is held as poison.
    ///
    /// ```
    /// # async fn example<H: inbox::Handler>(sequencer: inbox::Sequencer<H>, message: inbox::Envelope) {
    /// // A message that was delivered several times and never acknowledged:
    /// let outcome = sequencer.attempt(&message).await;
    /// # }
    /// ```
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

    /// Retries the event that stops an aggregate, and applies the events behind it.
    pub(crate) async fn retry(&self, key: &Key) -> Result<Outcome, Rollback> {
        let (mut outcome, unfinished) = self.alone(Work::one_held(slice::from_ref(key), Mode::Retry)).await?;
        outcome += self.drain(unfinished).await?;
        Ok(outcome)
    }

    /// One transaction for the messages, then as many as needed for the held events that they free. A message that is
    /// left of `several` goes into a savepoint at once. A message that came alone tries without one first.
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

    /// Applies the held events that are next, as many at a time as succeed.
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

    /// A transaction for one event. When it exceeds a limit, it is retried once, and then the event is held with the
    /// reason: the limit is the consumer's own, so the same attempt would fail forever while all other events wait. When
    /// the database is slow with everything, the failure is transient instead.
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

    /// Whether the database commits a tiny transaction quickly.
    async fn is_quick(&self) -> bool {
        let commit = sqlx::query("SELECT pg_logical_emit_message(true, 'inbox', '')").execute(&self.pool);
        matches!(tokio::time::timeout(QUICK, commit).await, Ok(Ok(_)))
    }
}
