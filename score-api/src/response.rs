//! The 200 and 304 responses.

use chrono::{DateTime, SecondsFormat, Utc};
use poem::Response;
use rust_decimal::Decimal;
use serde::{Serialize, Serializer};
use uuid::Uuid;
use web::{conditional::Conditional, problem::Problem, tag::Tag};

use crate::read_model::{
    self, Cpf,
    entries::{self, Page},
};

/// The body of a 200. The cpf is not repeated: the caller has it, and it is personal data.
#[derive(Serialize)]
struct ScoreJson {
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    score: Decimal,
    person_id: Uuid,
    version: i64,
    #[serde(serialize_with = "rfc3339")]
    updated_at: DateTime<Utc>,
}

/// The same body with a page of its entries.
#[derive(Serialize)]
struct EntriesJson {
    #[serde(flatten)]
    score: ScoreJson,
    entries: Vec<EntryJson>,
    next: Option<String>,
}

#[derive(Serialize)]
struct EntryJson {
    id: Uuid,
    #[serde(rename = "type")]
    type_: String,
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    value: Decimal,
    score: i64,
    #[serde(serialize_with = "rfc3339")]
    created_at: DateTime<Utc>,
}

impl ScoreJson {
    fn of(score: &read_model::Score) -> Self {
        Self {
            score: score.total,
            person_id: score.person_id,
            version: score.version,
            updated_at: score.updated_at,
        }
    }
}

impl EntryJson {
    fn of(entry: entries::Entry) -> Self {
        let entries::Entry { id, type_, value, score, created_at } = entry;
        Self { id, type_, value, score, created_at }
    }
}

fn rfc3339<S: Serializer>(time: &DateTime<Utc>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&time.to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// 200 with the score, or 304 when the client has it.
pub(crate) fn score(conditional: &Conditional, score: &read_model::Score) -> Result<Response, Problem> {
    respond(conditional, score, &ScoreJson::of(score))
}

/// 200 with a page of the entries and the link to the next one, or 304 when the client has it.
pub(crate) fn entries(
    conditional: &Conditional,
    cpf: Cpf,
    page: Page,
    found: entries::EntryPage,
) -> Result<Response, Problem> {
    let last = found.entries.last().filter(|_| found.more);
    let next =
        last.map(|last| format!("/{}/score/entries?limit={}&after_entry={}", cpf.get(), page.limit, last.id));
    let entries = found.entries.into_iter().map(EntryJson::of).collect();
    let body = EntriesJson { score: ScoreJson::of(&found.score), entries, next };
    respond(conditional, &found.score, &body)
}

/// The person, and the version that the read model contains.
pub(crate) fn tag(score: &read_model::Score) -> Tag {
    Tag { id: score.person_id, version: score.version }
}

fn respond(
    conditional: &Conditional,
    score: &read_model::Score,
    body: &impl Serialize,
) -> Result<Response, Problem> {
    conditional.respond(tag(score), || {
        serde_json::to_string(body).map_err(|error| {
            tracing::error!(%error, "a response could not be serialized");
            Problem::internal()
        })
    })
}
