//! Applies the events of persons to the read model, and publishes the changes of scores.
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
/// Every event sets the person's version, so that a reader's token is found, whether or not the event changes the score.
/// Changes of the score are published as events of the aggregate `score/<person id>`:
///
/// - `score.new`: a new entry. Its body is the entry.
/// - `score.changed`: an entry's score has changed. A deleted item's entry is published a last time, with value and
///   score 0.
/// - `score.deleted`: the aggregate has ended, because its person was deleted. Its body is the person's id alone, as in
///   `person.deleted`. It is published once, for all entries.
///
/// `score.deleted` is not used for a single entry: `<aggregate type>.deleted` lets a subscriber skip missing versions,
/// which only the end of the aggregate allows.
///
/// The deletion of a person erases the published events of the score, and the person in the old model that a swap has
/// kept. The inbox erases its own held events and rejected messages.
///
/// A shadow publishes nothing and notifies no reader.
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
        let causes = events.iter().map(|event| Cause::parse(event, events.len() == 1));
        let causes = causes.collect::<Result<Vec<Cause>, HandlerError>>()?;
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
        AppendError::Unfit { .. } | AppendError::VersionTaken(_) | AppendError::VersionSkipped(_) => {
            HandlerError::poison(error.to_string())
        }
        // Right for all events, until an operator has acted.
        AppendError::NotSetUp(_) => HandlerError::Transient(error.to_string()),
        AppendError::Conflict(error) | AppendError::Database(error) => error.into(),
    }
}
