//! An event, as it is stored and as it is delivered.

use std::hash::{DefaultHasher, Hash, Hasher};

use uuid::Uuid;

/// The aggregate types of the SQL writers. Both have the same event types, `note.new` and `note.changed`, so that only the exchange by
/// aggregate can tell them apart.
pub(crate) const NOTE: &str = "note";
pub(crate) const MEMO: &str = "memo";
/// The aggregate type of events that cannot be published, which an operator drops.
pub(crate) const UNPUBLISHABLE: &str = "unpublishable";

/// An aggregate's type and id.
pub(crate) type AggregateKey = (String, String);

/// What the oracle compares of an event: as it is stored, or as it was first delivered.
#[derive(Clone, Debug)]
pub(crate) struct EventSummary {
    pub(crate) id: Uuid,
    pub(crate) type_: String,
    /// A hash of the body.
    pub(crate) hash: u64,
    /// The body's `id`.
    pub(crate) record: String,
    pub(crate) erased: bool,
    /// Of an event of a score.
    pub(crate) entry: Option<ScoreEntry>,
}

/// The numbers in an event of a score, as they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScoreEntry {
    pub(crate) score: String,
    pub(crate) total: String,
}

pub(crate) fn hash(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

/// The positions that a fault may have affected.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PositionRange {
    /// Every position up to this one was settled before the fault.
    pub(crate) after: i64,
    /// The last position that was taken when the fault ended.
    pub(crate) through: i64,
}

impl PositionRange {
    pub(crate) fn contains(self, position: i64) -> bool {
        position > self.after && position <= self.through
    }
}
