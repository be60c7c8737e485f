//! What can go wrong, by type; and for each operation, which of it.

use std::time::Duration;

use poem::http::StatusCode;
use service::{
    documentation::{Failure, Problems},
    problem::{INVALID_FIELDS, Kind, Problem, UNAVAILABLE},
};

use crate::store::StoreError;

/// When another try makes sense, while the database is away.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// A kind that another try does not help by itself.
const fn kind(status: StatusCode, code: &'static str, title: &'static str, detail: &'static str) -> Kind {
    Kind { status, code, title, detail, retry_after: None }
}

/// 404: nobody has this cpf.
pub(crate) const UNKNOWN_PERSON: Kind = kind(
    StatusCode::NOT_FOUND,
    "unknown-person",
    "Unknown person",
    "There is no person with this cpf. Create it first with POST /person.",
);

/// 409: somebody has this cpf already.
pub(crate) const CPF_EXISTS: Kind = kind(
    StatusCode::CONFLICT,
    "cpf-exists",
    "The cpf exists",
    "There is a person with this cpf already. Nothing was stored.",
);

/// 503: nobody knows whether a write was stored.
const OUTCOME_UNKNOWN: Kind = Kind {
    retry_after: Some(RETRY_AFTER),
    ..kind(
        StatusCode::SERVICE_UNAVAILABLE,
        "outcome-unknown",
        "Outcome unknown",
        "The database stopped answering during the request. Look whether a write was stored before you send it \
         again.",
    )
};

/// 400: no JSON.
pub(crate) const MALFORMED_JSON: Kind = kind(
    StatusCode::BAD_REQUEST,
    "malformed-json",
    "Malformed JSON",
    "The request's body could not be read.",
);
/// 400: less came than was announced.
pub(crate) const INCOMPLETE_BODY: Kind =
    kind(StatusCode::BAD_REQUEST, "incomplete-body", "Incomplete body", "The request's body broke off.");
/// 408
pub(crate) const SLOW_BODY: Kind = kind(
    StatusCode::REQUEST_TIMEOUT,
    "slow-body",
    "Request Timeout",
    "The request's body did not arrive in time.",
);
/// 413
pub(crate) const TOO_LARGE: Kind = kind(
    StatusCode::PAYLOAD_TOO_LARGE,
    "too-large",
    "Payload Too Large",
    "The request's body is larger than 64 KiB.",
);
/// 415
pub(crate) const UNSUPPORTED_MEDIA_TYPE: Kind = kind(
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "unsupported-media-type",
    "Unsupported Media Type",
    "Send the body as `Content-Type: application/json`.",
);

/// Of every request with a body.
const BODY: &[&Kind] =
    &[&MALFORMED_JSON, &INCOMPLETE_BODY, &SLOW_BODY, &TOO_LARGE, &UNSUPPORTED_MEDIA_TYPE, &INVALID_FIELDS];
/// Of every write.
const WRITE: &[&Kind] = &[&UNAVAILABLE, &OUTCOME_UNKNOWN];

/// What can go wrong when a person is created.
#[derive(Debug)]
pub(crate) enum AddPerson {}
impl Problems for AddPerson {
    const KINDS: &'static [&'static [&'static Kind]] = &[BODY, WRITE, &[&CPF_EXISTS]];
}

/// What can go wrong when an item is created.
#[derive(Debug)]
pub(crate) enum AddItem {}
impl Problems for AddItem {
    const KINDS: &'static [&'static [&'static Kind]] = &[BODY, WRITE, &[&UNKNOWN_PERSON]];
}

/// What can go wrong when something is read.
#[derive(Debug)]
pub(crate) enum Read {}
impl Problems for Read {
    const KINDS: &'static [&'static [&'static Kind]] = &[&[&INVALID_FIELDS, &UNAVAILABLE, &UNKNOWN_PERSON]];
}

/// The database's failures. Logged here, once; the client learns only what it can act on.
impl<P> From<StoreError> for Failure<P> {
    fn from(error: StoreError) -> Self {
        let problem = match error {
            StoreError::Unavailable(_) => {
                tracing::warn!(%error, "a request was not served");
                Problem::unavailable(RETRY_AFTER)
            }
            StoreError::Unknown(_) => {
                tracing::warn!(%error, "a request was not served");
                OUTCOME_UNKNOWN.problem()
            }
            StoreError::Failed(_) => {
                tracing::error!(%error, "a request failed");
                Problem::internal()
            }
        };
        problem.into()
    }
}
