//! What the clients did, and what they know.

use uuid::Uuid;

use super::model::Person;

/// A write that was acknowledged, or found to be done.
#[derive(Clone, Debug)]
pub(crate) struct Acknowledged {
    pub(crate) person: Uuid,
    pub(crate) version: i64,
    pub(crate) type_: String,
    pub(crate) record: Uuid,
}

/// What a client did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    pub(crate) acknowledged: Vec<Acknowledged>,
    /// Requests that were sent again.
    pub(crate) retries: u64,
    /// Writes of which nobody knew for a while whether they were done.
    pub(crate) in_doubt: u64,
    /// Scores that were read with a write's token.
    pub(crate) reads: u64,
}

/// What the clients were told, and what they know of the persons who are there at the end.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) told: Told,
    pub(crate) persons: Vec<Person>,
}
