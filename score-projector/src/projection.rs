//! What the events of persons become: the read model, and what the score service publishes of it.
//!
//! A batch is one fold: what it touches of the read model is loaded ([`needs`]), the events are applied to
//! it in memory ([`slice`]), and what it has become is written in bulk ([`store`](crate::store)). So a
//! batch costs a handful of statements, however many events it has.

pub(crate) mod entry;
pub(crate) mod needs;
pub(crate) mod slice;

use std::slice::from_ref;

use events::PersonEvent;
use inbox::{Event, Failure, Handler};
use outbox::AppendError;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    model::{self, Model, Role},
    projection::{needs::Needs, slice::Slice},
    publish, store,
};

/// Applies a person's events to a read model.
///
/// Every event sets the person's version, so that a reader's token is answered, whether or not the
/// event touches the score. What changes in the score is published as events of the aggregate
/// `score/<person id>`, by one rule:
///
/// - `score.new`: an entry came. Its body is the entry.
/// - `score.changed`: what an entry adds has changed. An entry whose item is gone is published a last
///   time, with value and score 0: it adds nothing any more.
/// - `score.deleted`: the whole aggregate has ended, because its person is gone. Its body is the
///   person's id alone, as `person.deleted`'s is, and it is published once, for all of the entries.
///
/// The last is not used for single entries because `<aggregate type>.deleted` lets a subscriber jump
/// over what it misses: only an end may do that.
///
/// The end of a person erases: what was published of their score, and what is kept of it in the model of
/// before. (What the inbox holds or has rejected of them, the inbox erases.)
///
/// A shadow is built without a word: nothing of it is published, and nobody is woken.
#[derive(Debug)]
pub struct Projection {
    model: Model,
}

impl Projection {
    /// Writes to `model`.
    pub fn new(model: Model) -> Self {
        Self { model }
    }
}

/// An event of a person, parsed.
#[derive(Debug)]
pub(crate) struct Cause {
    pub(crate) person: Uuid,
    pub(crate) version: i64,
    pub(crate) trace: Option<String>,
    pub(crate) body: PersonEvent,
}

/// Why an event cannot be applied, now or later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refused {
    #[error("the read model knows this person already")]
    PersonKnown,
    #[error("the read model does not know this person")]
    PersonUnknown,
    #[error("the read model knows this item already")]
    ItemKnown,
    #[error("the read model does not know this item")]
    ItemUnknown,
    #[error("the read model knows this item as another person's")]
    ItemOfAnother,
    #[error("a value is negative or does not fit 15 digits and 4 decimals")]
    Value,
    #[error("the score cannot be written as JSON")]
    Json,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self::poison(refused.to_string())
    }
}

impl Handler for Projection {
    async fn begin(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), Failure> {
        self.model.fence(tx).await
    }

    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), Failure> {
        self.handle_batch(from_ref(event), tx).await
    }

    async fn handle_batch(
        &self,
        events: &[Event],
        tx: &mut Transaction<'_, Postgres>,
    ) -> Result<(), Failure> {
        let causes = events.iter().map(parse).collect::<Result<Vec<Cause>, Failure>>()?;
        let mut slice = Slice::default();
        let mut needs = Needs::of(&causes);
        store::load_persons(tx, &needs, &mut slice).await?;
        needs.after_persons(&causes, &slice);
        store::load_entries(tx, &needs, &mut slice).await?;
        let publishes = self.model.role() == Role::Live;
        if publishes {
            slice.load_published(publish::published(tx, &needs.ended).await?);
        }
        causes.iter().try_for_each(|cause| slice.apply(cause))?;
        store::save(tx, &slice).await?;
        if publishes {
            publish::append(tx, slice.take_events()).await.map_err(refusal)?;
            model::erase_old(tx, &needs.ended).await?;
        }
        Ok(())
    }

    fn committed(&self) {
        self.model.committed();
    }
}

fn parse(event: &Event) -> Result<Cause, Failure> {
    let person = Uuid::try_parse(&event.aggregate_id)
        .map_err(|_| Failure::poison("the aggregate's id is not a person's UUID"))?;
    let body = if event.is_erased() {
        PersonEvent::Erased
    } else {
        PersonEvent::parse(&event.type_, &event.payload).map_err(|e| Failure::poison(e.to_string()))?
    };
    if subject(&body).is_some_and(|subject| subject != person) {
        return Err(Failure::poison("the body is about another person than the aggregate's id"));
    }
    Ok(Cause { person, version: event.version, trace: event.traceparent().map(str::to_owned), body })
}

/// Whom a body is about.
fn subject(body: &PersonEvent) -> Option<Uuid> {
    match body {
        PersonEvent::New(person) | PersonEvent::Changed(person) => Some(person.id),
        PersonEvent::Deleted(deleted) => Some(deleted.id),
        PersonEvent::Baseline(baseline) => Some(baseline.person.id),
        PersonEvent::ItemNew(_, item)
        | PersonEvent::ItemChanged(_, item)
        | PersonEvent::ItemDeleted(_, item) => Some(item.person_id),
        PersonEvent::Erased | PersonEvent::Unknown => None,
    }
}

fn refusal(error: AppendError) -> Failure {
    match error {
        AppendError::VersionTaken => Failure::poison("the score's next version is in the outbox already"),
        AppendError::Unfit { .. } => Failure::poison(error.to_string()),
        AppendError::Database(error) => error.into(),
    }
}
