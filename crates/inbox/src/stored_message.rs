//! What is stored of a rejected message. It is bounded for any message, and is computed before the transaction begins,
//! so that no lock is held meanwhile.

use lapin::types::AMQPValue;
use sha2::{Digest, Sha256};

use crate::{Envelope, Event, identifiers, rejection::Rejection};

/// How many bytes of a body are stored.
const MAX_BODY: usize = 64 * 1024;

/// A message as it is stored in `inbox.rejected`.
#[derive(Clone, Debug)]
pub(crate) struct StoredMessage<'a> {
    /// The hash of reason, message id, routing key and whole body, by which a redelivery is recognized.
    pub(crate) digest: Vec<u8>,
    pub(crate) routing_key: String,
    pub(crate) properties: String,
    /// The beginning of the body.
    pub(crate) body: &'a [u8],
    /// The length of the whole body.
    pub(crate) bytes: i64,
    /// Which identifiers the stored part has: see [`identifiers`].
    pub(crate) identifiers: Vec<String>,
}

impl<'a> StoredMessage<'a> {
    pub(crate) fn of(envelope: &'a Envelope, reason: Rejection) -> Self {
        let Envelope { routing_key, properties, body } = envelope;
        let id = properties.message_id().as_ref().map_or("", |id| id.as_str());
        let digest = digest(reason, id, routing_key, body);
        Self::with(digest, routing_key, envelope.properties_json().to_string(), aggregate(envelope), body)
    }

    /// Of an event that was held, which has no message any more. Its type is its routing key as a rule.
    pub(crate) fn of_held(event: &'a Event, reason: Rejection) -> Self {
        let digest = digest(reason, &event.id.to_string(), &event.type_, &event.payload);
        let properties = event.properties_json().to_string();
        Self::with(digest, &event.type_, properties, Some(&event.aggregate_id), &event.payload)
    }

    fn with(
        digest: Vec<u8>,
        routing_key: &str,
        properties: String,
        aggregate: Option<&str>,
        body: &'a [u8],
    ) -> Self {
        let some = &body[..body.len().min(MAX_BODY)];
        let (found, complete) = identifiers::of(aggregate, &properties, some);
        Self {
            digest,
            routing_key: routing_key.replace('\0', "\u{fffd}"),
            properties,
            // Only as much as erasure can find by its identifiers.
            body: &some[..complete],
            bytes: i64::try_from(body.len()).unwrap_or(i64::MAX),
            identifiers: found.into_iter().collect(),
        }
    }
}

impl StoredMessage<'static> {
    /// The row that counts all further messages for a reason, above the limit of stored ones.
    pub(crate) fn overflow(reason: Rejection) -> Self {
        Self {
            digest: Sha256::digest(["not kept, ", reason.as_str()].concat()).to_vec(),
            routing_key: String::new(),
            properties: "{}".to_owned(),
            body: &[],
            bytes: 0,
            identifiers: Vec::new(),
        }
    }
}

/// The identity of a message. Each part except the last is preceded by its length, so that different parts never join
/// to the same bytes.
fn digest(reason: Rejection, message_id: &str, routing_key: &str, body: &[u8]) -> Vec<u8> {
    let mut digest = Sha256::new();
    for part in [reason.as_str(), message_id, routing_key] {
        digest.update(part.len().to_be_bytes());
        digest.update(part.as_bytes());
    }
    digest.update(body);
    digest.finalize().to_vec()
}

/// The id of the aggregate in the headers, if there is one.
fn aggregate(envelope: &Envelope) -> Option<&str> {
    let headers = envelope.properties.headers().as_ref()?;
    let id = match headers.inner().get("aggregate_id")? {
        AMQPValue::LongString(id) => std::str::from_utf8(id.as_bytes()).ok()?,
        AMQPValue::ShortString(id) => id.as_str(),
        _ => return None,
    };
    // NUL cannot be stored, and no aggregate's id has one, or is longer.
    (!id.contains('\0') && id.len() <= 255).then_some(id)
}
