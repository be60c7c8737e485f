//! An event, as it is stored and as it is delivered.

use std::hash::{DefaultHasher, Hash, Hasher};

use uuid::Uuid;

/// The aggregate types. Both have the same event types, `note.new` and `note.changed`, so that only the exchange by
/// aggregate can tell them apart.
pub(crate) const NOTE: &str = "note";
pub(crate) const MEMO: &str = "memo";
/// The aggregate type of events that cannot be published. An operator drops them.
pub(crate) const MISFIT: &str = "misfit";

/// Which aggregate: type and id.
pub(crate) type Key = (String, String);

/// An event, as it was first seen.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) id: Uuid,
    pub(crate) type_: String,
    /// Of the body.
    pub(crate) hash: u64,
    /// The body's `id`.
    pub(crate) record: String,
    pub(crate) erased: bool,
    /// What it says of a score.
    pub(crate) entry: Option<Entry>,
}

/// An entry of a score, as an event tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) score: String,
    pub(crate) total: String,
}

pub(crate) fn hash(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

/// Positions that lie between two moments: what a fault may have touched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stretch {
    /// Everything at or below was settled before.
    pub(crate) above: i64,
    /// The last position that was given when it was over.
    pub(crate) to: i64,
}

impl Stretch {
    pub(crate) fn contains(self, position: i64) -> bool {
        position > self.above && position <= self.to
    }
}
