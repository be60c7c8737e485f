//! The token that a reader sends as `after`: the tag of a state of a person, as person-api gives it with a write.

use uuid::Uuid;
use web::tag::Tag;

/// Which life of a cpf, and which version of it.
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
