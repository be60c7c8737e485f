//! What can go wrong, by type.

use std::time::Duration;

use poem::http::StatusCode;
use poem_openapi::registry::MetaSchema;
use service::{
    documentation::{
        Failure, Problems,
        schema::{Field, integer},
    },
    problem::{INVALID_FIELDS, Kind, OVERLOADED, Problem, UNAVAILABLE},
};

use crate::{
    read_model::ReadError,
    waiters::{Behind, Missed},
};

/// 404. Deleted, never heard of, or not arrived yet: from here they look the same.
pub(crate) const UNKNOWN_PERSON: Kind = Kind {
    status: StatusCode::NOT_FOUND,
    code: "unknown-person",
    title: "Unknown person",
    detail: "No person with this cpf is known here. One that was just created may need a moment to arrive.",
    retry_after: None,
};

/// 503, worth another try soon.
const fn again(code: &'static str, title: &'static str, detail: &'static str) -> Kind {
    let retry_after = Some(Duration::from_secs(1));
    Kind { status: StatusCode::SERVICE_UNAVAILABLE, code, title, detail, retry_after }
}

/// The wait is over.
const NOT_THERE_YET: Kind = again(
    "not-there-yet",
    "Not there yet",
    "The copy does not contain the version that `after` names, yet. Ask again; the copy follows within moments \
     when all is well, and the version may be one that does not exist.",
);

/// There was no place among those who wait.
const TOO_MANY_WAITERS: Kind = again(
    "too-many-waiters",
    "Too many waiters",
    "As many reads wait for a write as may. Ask again later, or without `after`.",
);

/// The process is to end.
const SHUTTING_DOWN: Kind = again(
    "shutting-down",
    "Shutting down",
    "This instance is ending and waits for nothing more. Ask again, and another one answers.",
);

/// What can go wrong when a score is read.
#[derive(Debug)]
pub(crate) enum ReadScore {}

impl Problems for ReadScore {
    const KINDS: &'static [&'static [&'static Kind]] = &[&[
        &INVALID_FIELDS,
        &UNKNOWN_PERSON,
        &UNAVAILABLE,
        &OVERLOADED,
        &NOT_THERE_YET,
        &TOO_MANY_WAITERS,
        &SHUTTING_DOWN,
    ]];

    fn extensions(kind: &Kind) -> Vec<Field> {
        if kind.code == NOT_THERE_YET.code { behind() } else { Vec::new() }
    }
}

/// Where the read model stands.
fn behind() -> Vec<Field> {
    const HAS: &str = "The version that the read model contains; null when it has nothing of the person.";
    const APPLIED: &str = "How long ago, in milliseconds, anything was applied to the read model, of whomever; \
                           null when nothing was since this instance began to listen.";
    let like = |example: i64, schema| MetaSchema { example: Some(example.into()), ..schema };
    let nullable = |schema| MetaSchema { nullable: true, ..schema };
    vec![
        ("asked", true, like(5, integer(1.0, "The version that `after` names."))),
        ("has", true, like(4, nullable(integer(1.0, HAS)))),
        ("waited_ms", true, like(2001, integer(0.0, "How long this read has waited, in milliseconds."))),
        ("last_applied_ms_ago", true, like(310, nullable(integer(0.0, APPLIED)))),
    ]
}

/// Versions and times, and nothing of the person.
fn not_there_yet(behind: &Behind) -> Problem {
    let extensions = [
        ("asked", behind.asked.into()),
        ("has", behind.has.into()),
        ("waited_ms", behind.waited_ms.into()),
        ("last_applied_ms_ago", behind.last_applied_ms_ago.into()),
    ];
    Problem { extensions: extensions.into(), ..NOT_THERE_YET.problem() }
}

/// Why a reader's write was not waited for to the end.
impl From<Missed> for Failure<ReadScore> {
    fn from(missed: Missed) -> Self {
        let kind = match missed {
            Missed::Behind(behind) => return not_there_yet(&behind).into(),
            Missed::Defect => return Problem::internal().into(),
            Missed::Unavailable => &UNAVAILABLE,
            Missed::TooMany => &TOO_MANY_WAITERS,
            Missed::Ending => &SHUTTING_DOWN,
        };
        kind.into()
    }
}

/// The database's failures. A defect is logged here, once; the client learns only what it can act on.
impl From<ReadError> for Failure<ReadScore> {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unavailable => (&UNAVAILABLE).into(),
            ReadError::Defect(error) => {
                tracing::error!(%error, "the score could not be read");
                Problem::internal().into()
            }
        }
    }
}
