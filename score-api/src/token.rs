//! The token that a reader sends as `after`: the `ETag` that person-api returns for a write.

use uuid::Uuid;
use web::tag::Tag;

/// A person and the person's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) person: Uuid,
    pub(crate) version: i64,
}

impl From<Tag> for Token {
    fn from(tag: Tag) -> Self {
        Self { person: tag.id, version: tag.version }
    }
}
