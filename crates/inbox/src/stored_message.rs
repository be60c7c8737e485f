//! What is stored of a rejected message. It is bounded for any message, and is computed before the transaction begins,
//! so that no lock is held meanwhile.

use sha2::{Digest, Sha256};

use crate::{Envelope, identifiers, rejection::Rejection};

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
        let properties = envelope.properties_json().to_string();
        let body = &envelope.body[..envelope.body.len().min(MAX_BODY)];
        let (found, complete) = identifiers::of(envelope, &properties, body);
        Self {
            digest: digest(envelope, reason),
            routing_key: envelope.routing_key.replace('\0', "\u{fffd}"),
            properties,
            // Only as much as erasure can find by its identifiers.
            body: &body[..complete],
            bytes: i64::try_from(envelope.body.len()).unwrap_or(i64::MAX),
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
fn digest(envelope: &Envelope, reason: Rejection) -> Vec<u8> {
    let message_id = envelope.properties.message_id().as_ref().map_or("", |id| id.as_str());
    let mut digest = Sha256::new();
    for part in [reason.as_str(), message_id, &envelope.routing_key] {
        digest.update(part.len().to_be_bytes());
        digest.update(part.as_bytes());
    }
    digest.update(&envelope.body);
    digest.finalize().to_vec()
}
