//! What the clients did, what they were answered, and the state that follows from it.

use uuid::Uuid;

use super::model::Person;

/// A write that was acknowledged, or that a later read found to be done.
#[derive(Clone, Debug)]
pub(crate) struct AcknowledgedWrite {
    pub(crate) person: Uuid,
    pub(crate) version: i64,
    /// The highest version that it may have: a write that was in doubt may have come before or after a baseline.
    pub(crate) at_most: i64,
    /// The type of its event.
    pub(crate) type_: String,
    /// The id of the person or item that was written.
    pub(crate) record: Uuid,
}

/// The history of one client, or of all of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct History {
    pub(crate) acknowledged: Vec<AcknowledgedWrite>,
    /// How many more were acknowledged, and are forgotten since a database went back in time.
    pub(crate) forgotten: usize,
    /// Requests that were repeated.
    pub(crate) retries: u64,
    /// Writes whose outcome was unknown for a while.
    pub(crate) in_doubt: u64,
    /// Scores that were read with a write's token.
    pub(crate) reads: u64,
    /// The persons that exist at the end.
    pub(crate) persons: Vec<Person>,
}

impl History {
    /// The counts without what they count.
    pub(crate) fn forget(self) -> Self {
        let forgotten = self.forgotten + self.acknowledged.len();
        Self { acknowledged: Vec::new(), persons: Vec::new(), forgotten, ..self }
    }

    /// Adds the history of another client.
    pub(crate) fn merge(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.forgotten += other.forgotten;
        self.retries += other.retries;
        self.in_doubt += other.in_doubt;
        self.reads += other.reads;
        self.persons.extend(other.persons);
    }
}
