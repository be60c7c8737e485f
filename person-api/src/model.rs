//! What passes from a request to the store.

use chrono::{DateTime, Utc};
use events::{Cpf, Status};
use rust_decimal::Decimal;
use uuid::Uuid;

/// The largest number of items of each kind in the response to `GET /person/{cpf}`, and of a page of items.
pub const ITEMS_MAX: i32 = 1000;

/// A person as a client sends it.
#[derive(Clone, Debug)]
pub struct NewPerson {
    /// Not stored yet.
    pub cpf: Cpf,
    /// 1 to 200 characters.
    pub name: String,
    /// 1 to 500 characters, or unknown.
    pub address: Option<String>,
    /// Within the years 1 to 9999 UTC, which is what RFC 3339 can write.
    pub date_of_birth: DateTime<Utc>,
}

/// What a merge patch changes: what is none stays.
#[derive(Clone, Debug, Default)]
pub struct PersonPatch {
    /// As in [`NewPerson`].
    pub name: Option<String>,
    /// As in [`NewPerson`]; `Some(None)` clears it.
    pub address: Option<Option<String>>,
    /// As in [`NewPerson`].
    pub date_of_birth: Option<DateTime<Utc>>,
    /// Whether new items are taken.
    pub status: Option<Status>,
}

/// An income, an asset or a debt as a client sends it.
#[derive(Clone, Debug)]
pub(crate) struct NewItem {
    /// 1 to 100 characters; a debt has none.
    pub(crate) type_: Option<String>,
    /// Not negative, at most 15 digits before the point and 4 after it.
    pub(crate) value: Decimal,
}

/// Which page of a list a client asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageRequest {
    /// 1 to [`ITEMS_MAX`].
    pub(crate) limit: i32,
    /// The page begins after this id; at the beginning when there is none.
    pub(crate) after: Option<Uuid>,
}

/// The states of a person in which a write may happen (`If-Match`): an id and a version each. None: any state.
#[derive(Clone, Debug, Default)]
pub struct Precondition(pub Option<Vec<(Uuid, i64)>>);

impl Precondition {
    /// The ids and the versions, as the statements take them.
    pub(crate) fn columns(&self) -> (Option<Vec<Uuid>>, Option<Vec<i64>>) {
        self.0.as_ref().map(|states| states.iter().copied().unzip()).unzip()
    }
}

/// A request that its client may safely send again: it has an `Idempotency-Key`.
#[derive(Clone, Debug)]
pub struct IdempotentRequest {
    /// The name of the client's API key. Another client's idempotency keys are others.
    pub caller: String,
    /// The path.
    pub route: String,
    /// The idempotency key.
    pub key: String,
    /// SHA-256 of the body.
    pub digest: Vec<u8>,
}
