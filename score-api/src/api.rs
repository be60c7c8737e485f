//! `GET /{cpf}/score`: from the request to the answer.

use std::time::Duration;

use chrono::{DateTime, SecondsFormat, Utc};
use poem::{
    EndpointExt, Request, Response, Route,
    error::MethodNotAllowedError,
    get, handler,
    http::{HeaderValue, StatusCode, header},
    web::{
        Data,
        headers::{ETag, HeaderMapExt, IfNoneMatch},
    },
};
use rust_decimal::Decimal;
use serde::{Serialize, Serializer};
use service::problem::{FieldError, Problem};
use sqlx::PgPool;
use uuid::Uuid;

use crate::read_model::{self, Cpf, ReadError, Score};

const RETRY_AFTER: Duration = Duration::from_secs(1);

pub(crate) fn routes(pool: PgPool) -> Route {
    Route::new().at("/:cpf/score", get(answer).catch_error(method_not_allowed).data(pool))
}

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

#[handler]
async fn answer(request: &Request, Data(pool): Data<&PgPool>) -> Result<Response, Problem> {
    let cpf = parse(request)?;
    let score = match read_model::newest_life(pool, cpf).await {
        Ok(Some(score)) => score,
        Ok(None) => return Err(unknown_person()),
        Err(ReadError::Unavailable) => return Err(Problem::unavailable(RETRY_AFTER)),
        Err(ReadError::Defect(error)) => {
            tracing::error!(%error, "the score could not be read");
            return Err(Problem::internal());
        }
    };
    found(request, &score)
}

/// Says all that is wrong at once. Query parameters are refused, because to ignore one that asks for
/// more (to wait for a version, say) would answer a question that nobody asked.
fn parse(request: &Request) -> Result<Cpf, Problem> {
    let cpf = request.raw_path_param("cpf").unwrap_or_default().parse::<Cpf>();
    let mut errors = Vec::new();
    if cpf.is_err() {
        errors.push(FieldError {
            pointer: "path: cpf".into(),
            detail: "must be a positive integer of at most 11 digits".into(),
        });
    }
    if request.uri().query().is_some_and(|query| !query.is_empty()) {
        errors.push(FieldError { pointer: "query".into(), detail: "takes no parameters".into() });
    }
    match cpf {
        Ok(cpf) if errors.is_empty() => Ok(cpf),
        _ => Err(Problem {
            detail: "Correct what `errors` names and send the request again.".into(),
            ..Problem::invalid(errors)
        }),
    }
}

fn found(request: &Request, score: &Score) -> Result<Response, Problem> {
    // The token: which life of the cpf, and how far its events are contained.
    let token = format!("\"{}.{}\"", score.person_id, score.version);
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
    let body = serde_json::to_string(&body).map_err(|error| {
        tracing::error!(%error, "the score could not be written");
        Problem::internal()
    })?;
    Ok(response.content_type("application/json").body(body + "\n"))
}

/// Deleted, never heard of, or not arrived yet: from here they look the same.
fn unknown_person() -> Problem {
    Problem::new(
        StatusCode::NOT_FOUND,
        "unknown-person",
        "Unknown person",
        "No person with this cpf is known here. One that was just created may need a moment to arrive.",
    )
}

async fn method_not_allowed(error: MethodNotAllowedError) -> Response {
    let mut response = Problem::from_error(error.into());
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    response
}
