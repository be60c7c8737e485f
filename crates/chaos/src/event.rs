//! An event, as it is stored and as it is delivered.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
};

use serde_json::Value;
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
    /// Of a baseline of a score.
    pub(crate) score: Option<WholeScore>,
}

/// The numbers in an event of a score, as they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ScoreEntry {
    pub(crate) score: String,
    pub(crate) total: String,
}

/// The numbers in a baseline of a score, as they are written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WholeScore {
    pub(crate) total: String,
    /// What each entry adds, by its id.
    pub(crate) entries: BTreeMap<String, String>,
}

impl EventSummary {
    /// Of an event with this body.
    pub(crate) fn new(
        id: Uuid,
        type_: String,
        aggregate_type: &str,
        bytes: &[u8],
        erased: bool,
    ) -> anyhow::Result<Self> {
        let body: Value = serde_json::from_slice(bytes)?;
        let number = |value: &Value| value.as_number().map(ToString::to_string);
        let of_score = aggregate_type == "score";
        let entry = number(&body["score"]).zip(number(&body["total"])).filter(|_| of_score);
        let entries = body["entries"].as_array().filter(|_| of_score).map(|entries| {
            let entry = |entry: &Value| Some((entry["id"].as_str()?.to_owned(), number(&entry["score"])?));
            entries.iter().filter_map(entry).collect()
        });
        let score = number(&body["total"]).zip(entries).map(|(total, entries)| WholeScore { total, entries });
        let record = body["id"].as_str().unwrap_or_default().to_owned();
        let entry = entry.map(|(score, total)| ScoreEntry { score, total });
        Ok(Self { id, type_, hash: hash(bytes), record, erased, entry, score })
    }
}

fn hash(body: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    body.hash(&mut hasher);
    hasher.finish()
}

/// An incarnation of a source.
pub(crate) type Incarnation = i64;

/// The source that publishes the events of this type of aggregate.
pub(crate) fn source_of(aggregate_type: &str) -> &'static str {
    if aggregate_type == "score" { "score" } else { "person" }
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
