//! The event contract between the person service, the score service and other subscribers:
//! exchange names, event types and bodies. No I/O; `docs/events.md` says the same for other languages.
//!
//! Bodies grow by addition only and readers ignore what they do not know, so nothing here denies
//! unknown fields. `golden/` keeps a body of every shape ever published; a test parses them all.

mod body;
mod cpf;

pub use body::{
    Baseline, BaselineItem, Deleted, Item, ItemKind, ParseError, Person, PersonEvent, Score, ScoreBaseline,
    ScoreBaselineEntry, Status,
};
pub use cpf::{Cpf, InvalidCpf};

/// The topic exchange that every event is published to, with the event type as its routing key.
pub const EXCHANGE: &str = "event_dispatcher";

/// A headers exchange fed by everything from [`EXCHANGE`]. Who follows versions binds here by
/// `aggregate_type`, and so also receives the types that are invented later.
pub const EXCHANGE_BY_AGGREGATE: &str = "event_dispatcher.by_aggregate";

/// The aggregate type of a person with all of their items. The aggregate id is the person's UUID.
pub const AGGREGATE_PERSON: &str = "person";

/// The aggregate type of a person's score. The aggregate id is the person's UUID.
pub const AGGREGATE_SCORE: &str = "score";

/// A score entry came into being.
pub const SCORE_NEW: &str = "score.new";

/// What a score entry adds has changed. An entry whose item is gone is published a last time, with
/// value and score 0.
pub const SCORE_CHANGED: &str = "score.changed";

/// A person's whole score at its version: what the receiver had is replaced.
pub const SCORE_BASELINE: &str = "score.baseline";

/// A person's score has ended, with all of its entries, because the person is gone. Its body is the
/// person's id alone: like `person.deleted` it ends its aggregate, so receivers may jump to it, and that
/// is why it never stands for a single entry.
pub const SCORE_DELETED: &str = "score.deleted";
