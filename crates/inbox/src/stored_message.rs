//! What is kept of a message that is rejected. It is bounded, whatever was sent, and made before a transaction
//! begins, so that nobody waits for it.

use sha2::{Digest, Sha256};

use crate::{Envelope, identifiers, rejection::Rejection};

/// How much of a body is kept.
const MAX_BODY: usize = 64 * 1024;

/// A message as it is stored in `inbox.rejected`.
#[derive(Clone, Debug)]
pub(crate) struct StoredMessage<'a> {
    /// Of reason, message id, routing key and the whole body: by it, a redelivery is known.
    pub(crate) digest: Vec<u8>,
    pub(crate) routing_key: String,
    pub(crate) properties: String,
    /// The beginning of the body.
    pub(crate) body: &'a [u8],
    /// How long the body is.
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
            // Nothing is kept that could not be found when it has to be erased.
            body: &body[..complete],
            bytes: i64::try_from(envelope.body.len()).unwrap_or(i64::MAX),
            identifiers: found.into_iter().collect(),
        }
    }
}

impl StoredMessage<'static> {
    /// What stands for all messages that were rejected for a reason beyond those that are kept.
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

/// What makes two messages the same: each part but the last with its length before it, so that no two run
/// together to the same bytes.
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
