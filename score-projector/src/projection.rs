//! What the events of persons become: the read model, and what the score service publishes of it.
//!
//! The part of the read model that a [`batch`](crate::batch) touches is loaded, the events are applied to it in memory,
//! and the result is written in bulk ([`store`](crate::store)). So a batch costs a handful of statements, however
//! many events it has.

use std::slice::from_ref;

use inbox::{Event, Handler, HandlerError};
use outbox::AppendError;
use sqlx::{Postgres, Transaction};

use crate::{
    batch::{cause::Cause, needs::Needs, slice::Slice},
    model::{self, Model, Role},
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

impl Handler for Projection {
    async fn begin(&self, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        self.model.fence(tx).await
    }

    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), HandlerError> {
        self.handle_batch(from_ref(event), tx).await
    }

    async fn handle_batch(
        &self,
        events: &[Event],
        tx: &mut Transaction<'_, Postgres>,
    ) -> Result<(), HandlerError> {
        let causes = events.iter().map(Cause::parse).collect::<Result<Vec<Cause>, HandlerError>>()?;
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

fn refusal(error: AppendError) -> HandlerError {
    match error {
        AppendError::VersionTaken => {
            HandlerError::poison("the score's next version is in the outbox already")
        }
        AppendError::Unfit { .. } => HandlerError::poison(error.to_string()),
        AppendError::Database(error) => error.into(),
    }
}
