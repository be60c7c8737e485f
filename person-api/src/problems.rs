//! What can go wrong, by type.

use std::time::Duration;

use daemon::config::database::Failure as DatabaseFailure;
use poem::http::StatusCode;
use web::problem::{OVERLOADED, Problem, ProblemType, UNAVAILABLE};

use crate::store::{Refusal, StoreError};

/// When another try makes sense, while the database is away.
const RETRY_AFTER: Duration = Duration::from_secs(2);
/// When another try makes sense, while others write about the same person.
const BUSY_AFTER: Duration = Duration::from_secs(1);

/// A problem that a retry alone does not solve.
const fn problem_type(
    status: StatusCode,
    code: &'static str,
    title: &'static str,
    detail: &'static str,
) -> ProblemType {
    ProblemType { status, code, title, detail, retry_after: None }
}

/// 404: there is no person with this cpf.
const UNKNOWN_PERSON: ProblemType = problem_type(
    StatusCode::NOT_FOUND,
    "unknown-person",
    "Unknown person",
    "There is no person with this cpf. The person was deleted, or never existed.",
);

/// 409: there is a person with this cpf already.
const CPF_EXISTS: ProblemType = problem_type(
    StatusCode::CONFLICT,
    "cpf-exists",
    "The cpf exists",
    "There is a person with this cpf already. Nothing was stored.",
);

/// 404: the person has no item with this id.
const UNKNOWN_ITEM: ProblemType = problem_type(
    StatusCode::NOT_FOUND,
    "unknown-item",
    "Unknown item",
    "The person has no item of this kind with this id.",
);

/// 409: no new items.
const PERSON_INACTIVE: ProblemType = problem_type(
    StatusCode::CONFLICT,
    "person-inactive",
    "The person is inactive",
    "An inactive person takes no new items. Nothing was stored. PATCH the person's `status` first.",
);

/// 409: somebody changed the person's row, or inserted it, without an event.
const PERSON_INCONSISTENT: ProblemType = problem_type(
    StatusCode::CONFLICT,
    "person-inconsistent",
    "The person is inconsistent",
    "The record of this person was changed outside of this service, and does not continue the history of its events. \
     Nothing was stored, and a retry fails, too. The operator finds the cause in the log, by the `X-Request-Id` of this \
     response, and has to mend the record.",
);

/// 412: the person was changed, or deleted and created again.
const OTHER_STATE: ProblemType = problem_type(
    StatusCode::PRECONDITION_FAILED,
    "other-state",
    "Another state",
    "The person is not in the state that `If-Match` names. Nothing was changed. Read the person again before you \
     decide.",
);

/// 422: a mistake of the client, as the draft on the key says.
const KEY_REUSED: ProblemType = problem_type(
    StatusCode::UNPROCESSABLE_ENTITY,
    "key-reused",
    "The key was used before",
    "This `Idempotency-Key` was used with another body. Nothing was stored. Use a new key for a new record.",
);

/// 410: a record that was created with this key went with its person.
const KEY_SPENT: ProblemType = problem_type(
    StatusCode::GONE,
    "created-and-deleted",
    "Created, and deleted since",
    "A request with this `Idempotency-Key` created a record, and the person was deleted since. Nothing was stored. Use \
     a new key for a new record.",
);

/// 503: a row of the person is locked.
const PERSON_BUSY: ProblemType = ProblemType {
    retry_after: Some(BUSY_AFTER),
    ..problem_type(
        StatusCode::SERVICE_UNAVAILABLE,
        "person-busy",
        "The person is busy",
        "Other requests are changing this person. Nothing was stored. Send the request again after the time in \
         `Retry-After`.",
    )
};

/// 503: the write may be stored or not.
const OUTCOME_UNKNOWN: ProblemType = ProblemType {
    retry_after: Some(RETRY_AFTER),
    ..problem_type(
        StatusCode::SERVICE_UNAVAILABLE,
        "outcome-unknown",
        "Outcome unknown",
        "The connection to the database was lost during the request. The change is stored, or it is not. Read the \
         record before you send the request again. A `POST` with an `Idempotency-Key` can be sent again at once.",
    )
};

/// 400: no JSON.
pub(crate) const MALFORMED_JSON: ProblemType = problem_type(
    StatusCode::BAD_REQUEST,
    "malformed-json",
    "Malformed JSON",
    "The request's body could not be read. Nothing was done.",
);
/// 415
pub(crate) const UNSUPPORTED_MEDIA_TYPE: ProblemType = problem_type(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "unsupported-media-type",
    "Unsupported Media Type",
    "Nothing was done. Send the body with a `Content-Type` that the operation takes.",
);
/// 415: a body that would have to be unpacked first.
pub(crate) const UNSUPPORTED_CODING: ProblemType = problem_type(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "unsupported-coding",
    "Unsupported Content-Encoding",
    "Nothing was done. Send the body as it is, without a `Content-Encoding`.",
);

/// What the database decided.
impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let type_ = match refusal {
            Refusal::UnknownPerson => &UNKNOWN_PERSON,
            Refusal::UnknownItem => &UNKNOWN_ITEM,
            Refusal::CpfExists => &CPF_EXISTS,
            Refusal::Inactive => &PERSON_INACTIVE,
            Refusal::OtherState => &OTHER_STATE,
            Refusal::KeyReused => &KEY_REUSED,
            Refusal::KeySpent => &KEY_SPENT,
        };
        type_.into()
    }
}

/// What a client learns of a database that did not do as it was asked.
fn unavailable(failure: DatabaseFailure) -> &'static str {
    match failure {
        DatabaseFailure::Conflict => {
            "Other requests changed the same rows at the same time, several times in a row. Nothing was stored. Send \
             the request again."
        }
        DatabaseFailure::Locked | DatabaseFailure::Cancelled => {
            "The database did not finish the request in time: others may be working on the same rows. Nothing was \
             stored. Send the request again later."
        }
        DatabaseFailure::ReadOnly => {
            "The service's database takes no writes right now. Nothing was stored. Send the request again later."
        }
        DatabaseFailure::Resources => {
            "The service's database has no disk space, memory or connections left. Nothing was stored. Send the \
             request again later."
        }
        DatabaseFailure::Forbidden | DatabaseFailure::Pooler | DatabaseFailure::Login => {
            "The service's database lacks something that the service needs; `/ready` names it. Nothing \
             was stored. Send the request again later."
        }
        DatabaseFailure::Away | DatabaseFailure::Restarting | DatabaseFailure::Defect => UNAVAILABLE.detail,
    }
}

/// The database's failures. Logged here, once; the client learns only what it can act on.
impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Overloaded => OVERLOADED.problem(),
            StoreError::Busy => PERSON_BUSY.problem(),
            StoreError::Unavailable(failure, _) => {
                tracing::warn!(%error, "a request was not served");
                Problem { retry_after: Some(RETRY_AFTER), ..UNAVAILABLE.with_detail(unavailable(failure)) }
            }
            StoreError::CannotStore { what, .. } => {
                tracing::warn!(%error, "a request was not served");
                let detail = format!(
                    "The database cannot store anything right now: {what}. Nothing was stored. Try again later."
                );
                Problem { retry_after: Some(RETRY_AFTER), ..UNAVAILABLE.with_detail(detail) }
            }
            StoreError::Unknown(_) => {
                tracing::warn!(%error, "a request was not served");
                OUTCOME_UNKNOWN.problem()
            }
            StoreError::Inconsistent(_) => {
                tracing::error!(%error, "a person cannot be changed");
                PERSON_INCONSISTENT.problem()
            }
            StoreError::Failed(_) => {
                tracing::error!(%error, "a request failed");
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
        let own = [
            &UNKNOWN_PERSON,
            &CPF_EXISTS,
            &UNKNOWN_ITEM,
            &PERSON_INACTIVE,
            &PERSON_INCONSISTENT,
            &OTHER_STATE,
            &KEY_REUSED,
            &KEY_SPENT,
            &PERSON_BUSY,
            &OUTCOME_UNKNOWN,
            &MALFORMED_JSON,
            &UNSUPPORTED_MEDIA_TYPE,
            &UNSUPPORTED_CODING,
        ];
        let document: Value = serde_json::from_str(&documentation::json(crate::api::OPENAPI)).unwrap();
        for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
            let Some(code) = name.strip_prefix("problem.") else { continue };
            let type_ = own.iter().chain(PROBLEM_TYPES).find(|type_| type_.code == code).expect(name);
            for (field, sent) in serde_json::to_value(type_.problem()).unwrap().as_object().unwrap() {
                assert_eq!(&schema["examples"][0][field], sent, "{name} {field}");
            }
        }
    }
}
