//! What one transaction will do, decided in memory before anything is called or written.

use std::{borrow::Cow, collections::BTreeMap};

use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    Event, Outcome,
    chain::{Decision, Held, Key, Next, Reached, Reason},
    ledger::Ledger,
    newest::Refusal,
    parsed::ParsedMessage,
    rejection::Rejection,
    rollback::Rollback,
    save_rejected::RejectedMessage,
    stored_message::StoredMessage,
    work::Mode,
};

/// Why an event that came too early is rejected.
const TOO_MANY: &str = "earlier versions have not arrived, and the limit of events that wait for missing versions is \
                        reached. Have the aggregate replayed";

/// An event to apply.
pub(crate) struct Due<'a> {
    pub(crate) key: Key,
    pub(crate) version: i64,
    id: Uuid,
    /// None when it is held, and has to be read from the database.
    received: Option<&'a Event>,
    /// The reason and the attempts, if it is held.
    pub(crate) held: Option<(Reason, i32)>,
    /// What it follows, as far as it names that.
    follows: Option<Uuid>,
    /// Its chain's state before, to restore when it is refused.
    before: Reached,
    /// It begins its chain over a state of an earlier incarnation.
    begins_anew: bool,
}

impl Due<'_> {
    /// As it is held after an attempt.
    fn tried(&self, reason: Reason, attempts: i32) -> Held<'static> {
        Held { id: self.id, reason, attempts, follows: self.follows, received: None }
    }
}

/// The decisions of one transaction.
pub(crate) struct Plan<'a> {
    pub(crate) ledger: Ledger<'a>,
    mode: Mode,
    /// How many held events may still be applied.
    budget: usize,
    /// The limit of events that wait for missing versions is reached.
    full: bool,
    /// What to apply, in this order.
    pub(crate) due: Vec<Due<'a>>,
    /// Aggregates with more held events than the budget allows.
    pub(crate) unfinished: Vec<Key>,
    pub(crate) rejected: Vec<RejectedMessage<'a>>,
    /// Stored events that were next and follow another event than the one that was applied.
    forked: Vec<(Key, i64)>,
    /// The same, whole.
    pub(crate) forks: Vec<Event>,
    pub(crate) outcome: Outcome,
    /// The sources that go on to another incarnation, each with the one before it and the new one.
    pub(crate) taken: BTreeMap<String, (i64, i64)>,
}

impl<'a> Plan<'a> {
    pub(crate) fn new(ledger: Ledger<'a>, mode: Mode, budget: usize, full: bool) -> Self {
        Self {
            ledger,
            mode,
            budget,
            full,
            due: Vec::new(),
            unfinished: Vec::new(),
            rejected: Vec::new(),
            forked: Vec::new(),
            forks: Vec::new(),
            outcome: Outcome::default(),
            taken: BTreeMap::new(),
        }
    }

    /// Decides about a received message. `refused`: its incarnation is not taken.
    pub(crate) fn message(
        &mut self,
        message: &'a ParsedMessage<'a>,
        refused: Option<Refusal>,
    ) -> Result<(), Rollback> {
        let event = match &message.event {
            Ok(event) => event,
            Err((reason, detail)) => {
                *match reason {
                    Rejection::Foreign => &mut self.outcome.foreign,
                    Rejection::WrongUser => &mut self.outcome.wrong_user,
                    _ => &mut self.outcome.rejected,
                } += 1;
                self.reject(message, None, *reason, detail.clone());
                return Ok(());
            }
        };
        if let Some((reason, detail)) = refused {
            *match reason {
                Rejection::Superseded => &mut self.outcome.superseded,
                _ => &mut self.outcome.unrelated,
            } += 1;
            self.reject(message, Some(event), reason, detail);
            return Ok(());
        }
        let key = Key::from(event);
        if self.full && !self.ledger.chains.contains_key(&key) {
            self.outcome.rejected += 1;
            self.reject(message, Some(event), Rejection::Malformed, TOO_MANY.to_owned());
            return Ok(());
        }
        match self.ledger.chain(&key)?.decide(event) {
            Decision::Duplicate => self.outcome.duplicates += 1,
            Decision::Tried if self.mode == Mode::Together => {
                return Err(Rollback::Failed("an event that may end the process is taken alone".to_owned()));
            }
            Decision::Fork(detail) => {
                self.outcome.forks += 1;
                self.reject(message, Some(event), Rejection::Fork, detail.to_owned());
            }
            Decision::Apply | Decision::Tried => {
                self.apply(&key, event.version, event.id, event.follows(), Some(event))?;
            }
            Decision::Hold if self.full && self.ledger.chain(&key)?.waits() == Reason::Gap => {
                self.outcome.rejected += 1;
                self.reject(message, Some(event), Rejection::Malformed, TOO_MANY.to_owned());
            }
            Decision::Hold => {
                self.outcome.held += 1;
                let (id, follows) = (event.id, event.follows());
                let held = Held { id, reason: Reason::Gap, attempts: 0, follows, received: Some(event) };
                self.ledger.chain(&key)?.held.insert(event.version, held);
            }
        }
        Ok(self.drain(&key)?)
    }

    /// Takes what is held next to where the chain of `key` stands. Also after a duplicate: the process
    /// may have died between two transactions of a long chain, and then its filler comes again.
    pub(crate) fn drain(&mut self, key: &Key) -> sqlx::Result<()> {
        let mode = self.mode;
        loop {
            let chain = self.ledger.chain(key)?;
            let version = chain.next_version();
            let (id, follows, received) = match chain.next() {
                Next::Nothing => return Ok(()),
                Next::Event(held) if chain.reached.contradicts(held.follows) => {
                    let received = held.received;
                    chain.held.remove(&version);
                    self.fork(key, version, received);
                    return Ok(());
                }
                Next::Event(held) if !mode.takes(held.reason) => return Ok(()),
                Next::Event(held) if held.received.is_some() || self.budget > 0 => {
                    (held.id, held.follows, held.received)
                }
                Next::Event(_) | Next::Unknown => {
                    if !self.unfinished.contains(key) {
                        self.unfinished.push(key.clone());
                    }
                    return Ok(());
                }
            };
            if received.is_none() {
                self.budget -= 1;
            }
            self.apply(key, version, id, follows, received)?;
        }
    }

    /// A held event that is next is a suspected fork. The event that has its version may still come.
    fn fork(&mut self, key: &Key, version: i64, received: Option<&'a Event>) {
        self.outcome.forks += 1;
        match received {
            Some(event) => {
                self.outcome.held -= 1;
                self.rejected.push(RejectedMessage::forked(event));
            }
            None => self.forked.push((key.clone(), version)),
        }
    }

    fn apply(
        &mut self,
        key: &Key,
        version: i64,
        id: Uuid,
        follows: Option<Uuid>,
        received: Option<&'a Event>,
    ) -> sqlx::Result<()> {
        let chain = self.ledger.chain(key)?;
        let (before, begins_anew) = (chain.reached.clone(), chain.begins_anew());
        let held = chain.held.get(&version).filter(|held| held.received.is_none());
        let held = held.map(|held| (held.reason, held.attempts));
        chain.advance(version, id);
        self.due.push(Due { key: key.clone(), version, id, received, held, follows, before, begins_anew });
        Ok(())
    }

    fn reject(
        &mut self,
        message: &'a ParsedMessage<'a>,
        event: Option<&'a Event>,
        reason: Rejection,
        detail: String,
    ) {
        let stored = match &message.stored {
            Some(stored) => Cow::Borrowed(stored),
            None => Cow::Owned(StoredMessage::of(message.envelope, reason)),
        };
        self.rejected.push(RejectedMessage { stored, event, reason, detail });
    }

    /// Rejects the held events that are suspected forks, before anything else is written.
    pub(crate) async fn reject_forked(
        &mut self,
        tx: &mut Transaction<'_, Postgres>,
        most: u32,
    ) -> sqlx::Result<()> {
        let forked: Vec<_> = self.forked.iter().map(|(key, version)| (key, *version)).collect();
        let forks = self.ledger.events(tx, &forked).await?;
        // The other headers of one that cannot be read do not matter.
        self.ledger.unreadable.clear();
        self.forks = forks.into_values().collect();
        for event in &self.forks {
            self.ledger.reject_held(tx, &RejectedMessage::forked(event), most).await?;
        }
        Ok(())
    }

    /// The events to apply, whole.
    pub(crate) async fn events(&mut self, tx: &mut Transaction<'_, Postgres>) -> sqlx::Result<Vec<Event>> {
        let held: Vec<_> =
            self.due.iter().filter(|due| due.received.is_none()).map(|due| (&due.key, due.version)).collect();
        let mut held = self.ledger.events(tx, &held).await?;
        self.due
            .iter()
            .map(|due| {
                let event = match due.received {
                    Some(event) => event.clone(),
                    None => held.remove(&(due.key.clone(), due.version)).ok_or(sqlx::Error::RowNotFound)?,
                };
                Ok(Event { begins_anew: due.begins_anew, ..event })
            })
            .collect()
    }

    /// How often the due event was tried before.
    pub(crate) fn attempts(&self) -> i32 {
        self.due.first().and_then(|due| due.held).map_or(0, |(_, attempts)| attempts)
    }

    /// The attempt at the only event was stored.
    pub(crate) fn tried(&mut self, attempts: i32) -> sqlx::Result<()> {
        for due in &self.due {
            let held = due.tried(Reason::Trying, attempts);
            self.ledger.chain(&due.key)?.held.insert(due.version, held);
        }
        Ok(())
    }

    /// The only event was refused: restores its chain.
    pub(crate) fn refused(&mut self, attempts: i32) -> sqlx::Result<()> {
        for due in self.due.drain(..) {
            let chain = self.ledger.chain(&due.key)?;
            let held = due.tried(Reason::Poison, attempts);
            chain.reached = due.before;
            chain.held.insert(due.version, held);
            self.unfinished.retain(|key| *key != due.key);
        }
        Ok(())
    }
}
