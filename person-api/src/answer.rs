//! What a client gets.

use std::time::Duration;

use events::Cpf;
use poem::{
    Response,
    http::{StatusCode, header},
};
use service::problem::Problem;
use uuid::Uuid;

use crate::store::{Found, StoreError, Written};

/// When another try makes sense, while the database is away.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// 201: stored. The `ETag` is the token that a reader of the score may wait for.
pub(crate) fn created(written: &Written, location: String) -> Response {
    let Written { id, version, .. } = written;
    Response::builder()
        .status(StatusCode::CREATED)
        .content_type("application/json")
        .header(header::LOCATION, location)
        .header(header::ETAG, token(written.person_id, *version))
        .body(format!("{{\"message\":\"created\",\"id\":\"{id}\",\"version\":{version}}}\n"))
}

/// 200: a person with their items.
pub(crate) fn person(found: Found) -> Response {
    Response::builder()
        .content_type("application/json")
        .header(header::ETAG, token(found.id, found.version))
        .body(found.body + "\n")
}

/// Names a state of a person: which life of the cpf, and which version.
fn token(person: Uuid, version: i64) -> String {
    format!("\"{person}.{version}\"")
}

/// Where a person is.
pub(crate) fn location(cpf: Cpf) -> String {
    format!("/person/{}", cpf.get())
}

/// 404: nobody has this cpf.
pub(crate) fn unknown_person() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "unknown-person",
        "Unknown person",
        "There is no person with this cpf. Create it first with POST /person.",
    )
}

/// 409: somebody has this cpf already.
pub(crate) fn cpf_exists() -> Problem {
    Problem::new(
        StatusCode::CONFLICT,
        "cpf-exists",
        "The cpf exists",
        "There is a person with this cpf already. Nothing was stored.",
    )
}

/// The database's failures. Logged here, once; the client learns only what it can act on.
impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => {
                tracing::warn!(%error, "a request was not served");
                Self::unavailable(RETRY_AFTER)
            }
            StoreError::Unknown(_) => {
                tracing::warn!(%error, "a request was not served");
                let detail = "The database stopped answering during the request. Look whether a write was \
                              stored before you send it again.";
                let problem =
                    Self::new(StatusCode::SERVICE_UNAVAILABLE, "outcome-unknown", "Outcome unknown", detail);
                Self { retry_after: Some(RETRY_AFTER), ..problem }
            }
            StoreError::Failed(_) => {
                tracing::error!(%error, "a request failed");
                Self::internal()
            }
        }
    }
}
