//! The event of a person that causes a change, parsed.

use events::PersonEvent;
use inbox::{Event, HandlerError};
use uuid::Uuid;

/// An event of a person, parsed.
#[derive(Debug)]
pub(crate) struct Cause {
    pub(crate) person: Uuid,
    pub(crate) version: i64,
    /// The trace of what it causes; none for that of the transaction.
    pub(crate) trace: Option<String>,
    /// It begins the person's chain anew: the read model's state of the person is of a history that was lost.
    pub(crate) begins_anew: bool,
    pub(crate) body: PersonEvent,
}

impl Cause {
    /// Reads a person's event. One that comes `alone` causes its events in the transaction's span. Of several, each has a
    /// trace of its own, which what it causes continues; not that of an event that is replayed, which has ended.
    pub(crate) fn parse(event: &Event, alone: bool) -> Result<Self, HandlerError> {
        let person = Uuid::try_parse(&event.aggregate_id)
            .map_err(|_| HandlerError::poison("the aggregate's id is not a person's UUID"))?;
        let body = if event.is_erased() {
            PersonEvent::Erased
        } else {
            PersonEvent::parse(&event.type_, &event.payload)
                .map_err(|e| HandlerError::poison(e.to_string()))?
        };
        if subject(&body).is_some_and(|subject| subject != person) {
            return Err(HandlerError::poison("the body is about another person than the aggregate's id"));
        }
        let own = || outbox::trace::header(&outbox::trace::remote(event.traceparent()?)?);
        let trace = if alone || event.is_replayed() { None } else { own() };
        Ok(Self { person, version: event.version, trace, begins_anew: event.begins_anew, body })
    }
}

/// The person in a body.
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
