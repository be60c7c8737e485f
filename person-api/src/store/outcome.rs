//! What became of a request to the database.

use uuid::Uuid;

/// What a write left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The record's id.
    pub id: Uuid,
    /// The id of the person that it is or belongs to.
    pub person_id: Uuid,
    /// The person's version that contains it.
    pub version: i64,
}

/// What became of a request to create a record.
#[derive(Clone, Debug)]
pub enum AddOutcome {
    /// The record is stored, with its event.
    Added(Written),
    /// An earlier request with the same idempotency key stored it, and this was the response.
    Repeated(StoredResponse),
    /// Nothing is stored.
    Refused(Refusal),
}

/// What became of a request to change a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeOutcome {
    /// The change is stored, with its event.
    Changed(Written),
    /// The record was like that already: no new version, no event.
    Unchanged(Written),
}

impl ChangeOutcome {
    /// `version` is the person's version before the change, `changed` the one after it, if there was a change.
    pub(super) fn of(id: Uuid, person_id: Uuid, version: i64, changed: Option<i64>) -> Self {
        match changed {
            Some(version) => Self::Changed(Written { id, person_id, version }),
            None => Self::Unchanged(Written { id, person_id, version }),
        }
    }
}

/// Why a write stored nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no person with this cpf.
    UnknownPerson,
    /// The person has no such item.
    UnknownItem,
    /// There is a person with this cpf already.
    CpfExists,
    /// The person takes no new items.
    Inactive,
    /// The person is not in a state that `If-Match` names.
    OtherState,
    /// The idempotency key was used before, with another body.
    KeyReused,
    /// The idempotency key was used before, for a record that was deleted with its person.
    KeySpent,
}

/// The response to a request that created a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResponse {
    /// The record's path.
    pub location: String,
    /// The state that contains the record.
    pub etag: String,
    /// The body.
    pub body: String,
}

/// A person or an item as JSON, and the person's version in which it is so.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Representation {
    /// The person's id.
    pub id: Uuid,
    /// The person's version.
    pub version: i64,
    /// Compact JSON.
    pub body: String,
}

/// A page of items.
#[derive(Clone, Debug, sqlx::FromRow)]
pub(crate) struct ItemPage {
    /// The person's id.
    pub(crate) id: Uuid,
    /// The person's version.
    pub(crate) version: i64,
    /// Whether another page follows.
    pub(crate) more: bool,
    /// The last item's id, when another page follows.
    pub(crate) last: Option<String>,
    /// The items as compact JSON.
    pub(crate) body: String,
}
