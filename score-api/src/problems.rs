//! The problems that the API returns, by type.

use std::time::Duration;

use poem::http::StatusCode;
use web::problem::{Problem, ProblemType, UNAVAILABLE};

use crate::{
    read_model::ReadError,
    waiters::{Behind, Missed},
};

/// 404: deleted, unknown, or not arrived yet. The read model cannot tell these apart.
pub(crate) const UNKNOWN_PERSON: ProblemType = ProblemType {
    status: StatusCode::NOT_FOUND,
    code: "unknown-person",
    title: "Unknown person",
    detail: "No person with this cpf is known here. One that was just created may need a moment to arrive.",
    retry_after: None,
};

/// 503: another try may succeed soon.
const fn again(code: &'static str, title: &'static str, detail: &'static str) -> ProblemType {
    let retry_after = Some(Duration::from_secs(1));
    ProblemType { status: StatusCode::SERVICE_UNAVAILABLE, code, title, detail, retry_after }
}

/// The wait is over.
const NOT_THERE_YET: ProblemType = again(
    "not-there-yet",
    "Not there yet",
    "The copy does not contain the version that `after` names, yet. Ask again; the copy follows within moments \
     when all is well, and the version may be one that does not exist.",
);

/// All slots for waiting reads are taken.
const TOO_MANY_WAITERS: ProblemType = again(
    "too-many-waiters",
    "Too many waiters",
    "The limit of reads that wait for a write is reached. Try again later, or read without `after`.",
);

/// The process shuts down.
const SHUTTING_DOWN: ProblemType = again(
    "shutting-down",
    "Shutting down",
    "This instance is shutting down. Try again, and another instance responds.",
);

/// Versions and times, without personal data.
fn not_there_yet(behind: &Behind) -> Problem {
    let extensions = [
        ("asked", behind.asked.into()),
        ("has", behind.has.into()),
        ("waited_ms", behind.waited_ms.into()),
        ("last_applied_ms_ago", behind.last_applied_ms_ago.into()),
    ];
    Problem { extensions: extensions.into(), ..NOT_THERE_YET.problem() }
}

/// Why a wait ended without the write.
impl From<Missed> for Problem {
    fn from(missed: Missed) -> Self {
        let type_ = match missed {
            Missed::Behind(behind) => return not_there_yet(&behind),
            Missed::Defect => return Problem::internal(),
            Missed::Unavailable => &UNAVAILABLE,
            Missed::TooMany => &TOO_MANY_WAITERS,
            Missed::Ending => &SHUTTING_DOWN,
        };
        type_.into()
    }
}

/// The database's failures. A defect is logged here, once; the client learns only what it can act on.
impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Unavailable => UNAVAILABLE.problem(),
            ReadError::Defect(error) => {
                tracing::error!(%error, "the score could not be read");
                Problem::internal()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;
    use web::{documentation, problem::PROBLEM_TYPES};

    use super::*;

    #[test]
    fn the_document_shows_problems_as_they_are_sent() {
        let own = [&UNKNOWN_PERSON, &NOT_THERE_YET, &TOO_MANY_WAITERS, &SHUTTING_DOWN];
        let document: Value = serde_json::from_str(&documentation::json(crate::api::OPENAPI)).unwrap();
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            let Some(code) = name.strip_prefix("problem.") else { continue };
            let type_ = own.iter().chain(PROBLEM_TYPES).find(|type_| type_.code == code).expect(name);
            for (field, sent) in serde_json::to_value(type_.problem()).unwrap().as_object().unwrap() {
                assert_eq!(&schema["examples"][0][field], sent, "{name} {field}");
            }
        }
    }

    /// The example of `docs/http.md` is what a reader gets.
    #[test]
    fn the_page_shows_what_is_sent() {
        let page = include_str!("../../docs/http.md");
        let (_, rest) = page.split_once("of type `/problems/not-there-yet`:\n\n```json\n").unwrap();
        let (shown, _) = rest.split_once("\n```").unwrap();
        let behind = Behind { asked: 5, has: Some(4), waited_ms: 2001, last_applied_ms_ago: Some(310) };
        assert_eq!(shown, serde_json::to_string(&not_there_yet(&behind)).unwrap());
    }
}
