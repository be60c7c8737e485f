//! What a reader gets.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use poem::{
    IntoResponse, Request, Response,
    error::MethodNotAllowedError,
    http::{HeaderValue, StatusCode, header},
    web::headers::{ETag, HeaderMapExt, IfNoneMatch},
};
use rust_decimal::Decimal;
use serde::{Serialize, Serializer};
use service::problem::Problem;
use uuid::Uuid;

use crate::{
    read_model::Score,
    token::Token,
    waiters::{Behind, Missed},
};

/// When another try makes sense.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The body of a 200. The cpf is not repeated: the caller has it, and it is personal data.
#[derive(Serialize)]
struct Body {
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    score: Decimal,
    person_id: Uuid,
    version: i64,
    #[serde(serialize_with = "rfc3339")]
    updated_at: DateTime<Utc>,
}

fn rfc3339<S: Serializer>(time: &DateTime<Utc>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_str(&time.to_rfc3339_opts(SecondsFormat::AutoSi, true))
}

/// 200, or 304 where the caller has it.
pub(crate) fn found(request: &Request, score: &Score) -> Result<Response, Problem> {
    // Which life of the cpf, and how far its events are contained.
    let token = Token { person: score.person_id, version: score.version }.to_string();
    // Personal data, so for the caller's own cache, which has to ask again each time.
    let response = Response::builder()
        .header(header::ETAG, &token)
        .header(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
    let known = request.headers().typed_get::<IfNoneMatch>();
    if let (Some(known), Ok(tag)) = (known, token.parse::<ETag>())
        && !known.precondition_passes(&tag)
    {
        return Ok(response.status(StatusCode::NOT_MODIFIED).finish());
    }
    let body = Body {
        score: score.total,
        person_id: score.person_id,
        version: score.version,
        updated_at: score.updated_at,
    };
    Ok(response.content_type("application/json").body(json(&body)?))
}

fn json(body: &impl Serialize) -> Result<String, Problem> {
    let body = serde_json::to_string(body).map_err(|error| {
        tracing::error!(%error, "an answer could not be written");
        Problem::internal()
    })?;
    Ok(body + "\n")
}

/// 404. Deleted, never heard of, or not arrived yet: from here they look the same.
pub(crate) fn unknown_person() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "unknown-person",
        "Unknown person",
        "No person with this cpf is known here. One that was just created may need a moment to arrive.",
    )
}

/// Why a reader's write was not waited for to the end.
pub(crate) fn missed(missed: Missed) -> Result<Response, Problem> {
    match missed {
        Missed::Behind(behind) => not_there_yet(&behind),
        Missed::Unavailable => Err(Problem::unavailable(RETRY_AFTER)),
        Missed::Defect => Err(Problem::internal()),
        // Nobody reads it; the number stands in the metrics, and is what others give for it.
        Missed::HungUp => Ok(StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST).into_response()),
        Missed::TooMany => Err(again(
            "too-many-waiters",
            "Too many waiters",
            "As many reads wait for a write as may. Ask again later, or without `after`.",
        )),
        Missed::Ending => Err(again(
            "shutting-down",
            "Shutting down",
            "This instance is ending and waits for nothing more. Ask again, and another one answers.",
        )),
    }
}

/// 503, worth another try.
fn again(code: &'static str, title: &'static str, detail: &'static str) -> Problem {
    let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, code, title, detail);
    Problem { retry_after: Some(RETRY_AFTER), ..problem }
}

/// 503 with where the read model stands. Versions and times, and nothing of the person.
fn not_there_yet(behind: &Behind) -> Result<Response, Problem> {
    #[derive(Serialize)]
    struct Body<'a> {
        #[serde(flatten)]
        problem: &'a Problem,
        #[serde(flatten)]
        behind: &'a Behind,
    }
    let problem = again(
        "not-there-yet",
        "Not there yet",
        "The read model does not contain the asked version yet. Ask again, with a longer `wait`.",
    );
    let body = json(&Body { problem: &problem, behind })?;
    // Status and headers of the problem, with more in its body.
    let mut response = problem.into_response();
    response.set_body(body);
    Ok(response)
}

/// 405, with what is allowed.
pub(crate) async fn method_not_allowed(error: MethodNotAllowedError) -> Response {
    let mut response = Problem::from_error(error.into());
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}
