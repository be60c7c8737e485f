//! How bodies are described. The examples are what `payloads/` comes to.

use poem_openapi::{Tags, registry::MetaSchema};
use serde_json::json;
use service::documentation::schema::{
    Described, Field, about, formatted, inline, integer, list, object, one_of, text,
};

/// The operations, grouped.
#[derive(Debug, Tags)]
pub(crate) enum Tag {
    /// What a person's items come to.
    Scores,
}

/// The fields of a score.
fn score() -> [Field; 4] {
    let life = "Names this life of the cpf: one that is deleted and created again has another.";
    let score = "The sum of what the items add: an integer, which may exceed 64 bits. 0 without items.";
    let version = "The person's version that the score contains: it counts the person's changes.";
    [
        ("score", true, about(score, MetaSchema::new("integer"))),
        ("person_id", true, formatted("uuid", life)),
        ("version", true, integer(1.0, version)),
        ("updated_at", true, formatted("date-time", "When this person's copy was last changed.")),
    ]
}

/// A score in an answer.
pub(crate) struct ScoreBody;

impl Described for ScoreBody {
    const NAME: &'static str = "Score";

    fn schema() -> MetaSchema {
        example(
            object(score()),
            json!({
                "score": 4970,
                "person_id": "019928b5-6a3c-7d41-9c35-2f6c1d1e8a07",
                "version": 4,
                "updated_at": "2026-02-01T12:00:00.123456Z",
            }),
        )
    }
}

/// A page of the entries of a score.
pub(crate) struct EntriesBody;

impl Described for EntriesBody {
    const NAME: &'static str = "Entries";

    fn schema() -> MetaSchema {
        let adds = "What it adds: ⌊value/20⌋ for an asset, ⌊value/50⌋ for an income, −⌊value/20⌋ for a debt.";
        let entry = object([
            ("id", true, formatted("uuid", "The item's id.")),
            ("type", true, one_of(&["income", "asset", "debt"], "What the item is.")),
            (
                "value",
                true,
                MetaSchema { minimum: Some(0.0), ..about("An exact decimal.", MetaSchema::new("number")) },
            ),
            ("score", true, about(adds, MetaSchema::new_with_format("integer", "int64"))),
            ("created_at", true, formatted("date-time", "When the item was stored.")),
        ]);
        let next = MetaSchema { nullable: true, ..text("Where the next page is; null on the last one.") };
        let entries = about("In the order in which they came.", list(inline(entry)));
        let schema = object(score().into_iter().chain([("entries", true, entries), ("next", true, next)]));
        let item = |id: &str, type_: &str, value: u32, score: i64| {
            json!({"id": id, "type": type_, "value": value, "score": score,
                   "created_at": "2026-02-01T11:59:57.250631Z"})
        };
        example(
            schema,
            json!({
                "score": 4970,
                "person_id": "019928b5-6a3c-7d41-9c35-2f6c1d1e8a07",
                "version": 4,
                "updated_at": "2026-02-01T12:00:00.123456Z",
                "entries": [
                    item("019928b5-6d10-7f2a-8b1c-5e0a9d3c4f11", "income", 1000, 20),
                    item("019928b5-70e4-7a05-9d77-1b2f6c8e0a93", "asset", 100_000, 5000),
                    item("019928b5-74c8-7c1e-a3f0-8d4b5e6f7a02", "debt", 1000, -50),
                ],
                "next": null,
            }),
        )
    }
}

fn example(schema: MetaSchema, example: serde_json::Value) -> MetaSchema {
    MetaSchema { example: Some(example), ..schema }
}
