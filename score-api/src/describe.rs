//! How bodies are described. The examples are what `payloads/` comes to.

use poem_openapi::{Tags, registry::MetaSchema};
use serde_json::json;
use service::documentation::schema::{Described, about, formatted, integer, object};

/// The operations, grouped.
#[derive(Debug, Tags)]
pub(crate) enum Tag {
    /// What a person's items come to.
    Scores,
}

/// A score in an answer.
pub(crate) struct ScoreBody;

impl Described for ScoreBody {
    const NAME: &'static str = "Score";

    fn schema() -> MetaSchema {
        let life = "Names this life of the cpf: one that is deleted and created again has another.";
        let score = "The sum of what the items add: an integer, which may exceed 64 bits. 0 without items.";
        let version = "The person's version that the score contains: it counts the person's changes.";
        let schema = object([
            ("score", true, about(score, MetaSchema::new("integer"))),
            ("person_id", true, formatted("uuid", life)),
            ("version", true, integer(1.0, version)),
            ("updated_at", true, formatted("date-time", "When the copy was last changed.")),
        ]);
        let example = json!({
            "score": 4970,
            "person_id": "019928b5-6a3c-7d41-9c35-2f6c1d1e8a07",
            "version": 4,
            "updated_at": "2026-02-01T12:00:00.123456Z",
        });
        MetaSchema { example: Some(example), ..schema }
    }
}
