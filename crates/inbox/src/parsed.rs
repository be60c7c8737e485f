use crate::{Envelope, Event, Sources, rejection::Rejection, stored_message::StoredMessage};

/// A message, parsed once for all tries.
pub(crate) struct ParsedMessage<'a> {
    pub(crate) envelope: &'a Envelope,
    /// The event in it, or why it is rejected.
    pub(crate) event: Result<Event, (Rejection, String)>,
    /// What is stored of it when it is none.
    pub(crate) stored: Option<StoredMessage<'a>>,
}

impl<'a> ParsedMessage<'a> {
    /// Who sent it comes first: what is foreign is not looked into.
    pub(crate) fn new(envelope: &'a Envelope, sources: &Sources) -> Self {
        let event = match sources.refuse(envelope) {
            Some(refused) => Err(refused),
            None => envelope.event().map_err(|malformed| (Rejection::Malformed, malformed.to_string())),
        };
        let stored = event.as_ref().err().map(|(reason, _)| StoredMessage::of(envelope, *reason));
        Self { envelope, event, stored }
    }
}
