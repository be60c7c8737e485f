//! What a reader gets when all is well.

use chrono::{DateTime, SecondsFormat, Utc};
use poem::Request;
use rust_decimal::Decimal;
use serde::{Serialize, Serializer};
use service::{
    documentation::{Answer, Answers, CACHED},
    problem::Problem,
};
use uuid::Uuid;

use crate::{
    describe::{EntriesBody, ScoreBody},
    read_model::{
        self, Cpf,
        entries::{self, Page},
    },
    token::Token,
};

type Headers = &'static [(&'static str, &'static str)];

/// What every answer says of itself.
const HEADERS: Headers = &[
    (
        "ETag",
        "Names the state that this is: the person's id, a dot, and the version. The same kind of token as the person \
         service gives with a write. Send it back as `If-None-Match`.",
    ),
    CACHED,
];

/// When there is a 304.
const NOT_MODIFIED: Option<&str> = Some("`If-None-Match` names the state that would be answered.");

/// A person's score.
#[derive(Debug)]
pub(crate) enum Score {}

impl Answers for Score {
    type Body = ScoreBody;
    const STATUS: u16 = 200;
    const DESCRIPTION: &'static str = "The score, and which state of the person it contains.";
    const HEADERS: Headers = HEADERS;
    const NOT_MODIFIED: Option<&'static str> = NOT_MODIFIED;
}

/// How a score came about.
#[derive(Debug)]
pub(crate) enum Entries {}

impl Answers for Entries {
    type Body = EntriesBody;
    const STATUS: u16 = 200;
    const DESCRIPTION: &'static str = "A page of the entries, and the score of all of them.";
    const HEADERS: Headers = HEADERS;
    const NOT_MODIFIED: Option<&'static str> = NOT_MODIFIED;
}

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

/// The same with a page of its entries.
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

/// 200: the score; or 304 where the caller has it.
pub(crate) fn score(request: &Request, score: &read_model::Score) -> Result<Answer<Score>, Problem> {
    found(request, score, &ScoreJson::of(score))
}

/// 200: a page of the entries, and where the next one is; or 304 where the caller has it.
pub(crate) fn entries(
    request: &Request,
    cpf: Cpf,
    page: Page,
    found: entries::Found,
) -> Result<Answer<Entries>, Problem> {
    let last = found.entries.last().filter(|_| found.more);
    let next =
        last.map(|last| format!("/{}/score/entries?limit={}&after_entry={}", cpf.get(), page.limit, last.id));
    let entries = found.entries.into_iter().map(EntryJson::of).collect();
    let body = EntriesJson { score: ScoreJson::of(&found.score), entries, next };
    self::found(request, &found.score, &body)
}

fn found<A>(
    request: &Request,
    score: &read_model::Score,
    body: &impl Serialize,
) -> Result<Answer<A>, Problem> {
    // Which life of the cpf, and how far its events are contained.
    let token = Token { person: score.person_id, version: score.version }.to_string();
    Answer::of_state(request, &token, || {
        serde_json::to_string(body).map_err(|error| {
            tracing::error!(%error, "an answer could not be written");
            Problem::internal()
        })
    })
}
