//! Problem responses (RFC 9457): what happened, to what, and what to do next. Nothing of the inside.

mod types;

use std::{borrow::Cow, time::Duration};

use poem::{
    Error, IntoResponse, Response,
    error::ResponseError,
    http::{StatusCode, header},
};
use serde::Serialize;

pub use self::types::{
    INCOMPLETE_BODY, INTERNAL, INVALID_FIELDS, MALFORMED_REQUEST, OVERLOADED, PROBLEM_TYPES, ProblemType,
    SLOW_BODY, TOO_LARGE, UNAUTHORIZED, UNAVAILABLE, UNKNOWN_HOST,
};

/// What the body of a problem is.
const MEDIA_TYPE: &str = "application/problem+json";

/// A rule that a field of the request breaks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FieldError {
    /// Where: a JSON pointer into the body as a fragment (`#/value`), or `path: cpf`, `query: limit`, and so on.
    pub pointer: Cow<'static, str>,
    /// The rule. Never the value.
    pub detail: Cow<'static, str>,
}

/// An `application/problem+json` response.
#[derive(Clone, Debug, Serialize, thiserror::Error)]
#[error("{title}: {detail}")]
pub struct Problem {
    /// Tells programs what happened: `/problems/<code>`, stable.
    #[serde(rename = "type")]
    pub type_: Box<str>,
    /// Tells people what happened; the same for every problem of the type.
    pub title: &'static str,
    /// The status code, as in the response.
    #[serde(serialize_with = "status")]
    pub status: StatusCode,
    /// What happened this time and what to do next.
    pub detail: Cow<'static, str>,
    /// All of the rules that the request breaks, not just the first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<FieldError>,
    /// What else problems of this type say: extension members of the body (RFC 9457, 3.2).
    #[serde(flatten, serialize_with = "extensions")]
    pub extensions: Box<[(&'static str, serde_json::Value)]>,
    /// When another try makes sense.
    #[serde(skip)]
    pub retry_after: Option<Duration>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn status<S: serde::Serializer>(status: &StatusCode, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u16(status.as_u16())
}

fn extensions<S: serde::Serializer>(
    extensions: &[(&'static str, serde_json::Value)],
    s: S,
) -> Result<S::Ok, S::Error> {
    s.collect_map(extensions.iter().map(|(name, value)| (name, value)))
}

impl Problem {
    /// `code` is the last part of the type, in kebab case.
    pub fn new(
        status: StatusCode,
        code: &'static str,
        title: &'static str,
        detail: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self {
            type_: format!("/problems/{code}").into(),
            title,
            status,
            detail: detail.into(),
            errors: Vec::new(),
            extensions: Box::default(),
            retry_after: None,
        }
    }

    /// 422 with everything that is wrong.
    pub fn invalid(errors: Vec<FieldError>) -> Self {
        Self { errors, ..INVALID_FIELDS.problem() }
    }

    /// 503: the database does not respond.
    pub fn unavailable(retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..UNAVAILABLE.problem() }
    }

    /// 500: a defect of ours. The cause goes to the log, never to the client.
    pub fn internal() -> Self {
        INTERNAL.problem()
    }

    /// A framework error (404 for a path, 405, 413, 415, …) as a problem of the same status.
    pub fn from_error(error: Error) -> Response {
        if let Some(problem) = error.downcast_ref::<Self>() {
            return problem.clone().into_response();
        }
        let status = error.status();
        let (code, detail): (_, Cow<'static, str>) = match status {
            StatusCode::NOT_FOUND => ("no-such-path", "There is nothing at this path.".into()),
            StatusCode::METHOD_NOT_ALLOWED => (
                "method-not-allowed",
                "This path does not take this method. `Allow` names those that it takes.".into(),
            ),
            StatusCode::PAYLOAD_TOO_LARGE => ("too-large", "The request's body is too large.".into()),
            StatusCode::LENGTH_REQUIRED => ("length-required", "Send a Content-Length header.".into()),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => {
                ("unsupported-media-type", "Send the body as `Content-Type: application/json`.".into())
            }
            s if s.is_client_error() => ("bad-request", "The request could not be understood.".into()),
            _ => {
                tracing::error!(%error, "a request failed");
                return Self::internal().into_response();
            }
        };
        // The headers of the framework's own response say more, such as `Allow`.
        let mut headers = error.into_response().headers().clone();
        headers.remove(header::CONTENT_TYPE);
        headers.remove(header::CONTENT_LENGTH);
        let title = status.canonical_reason().unwrap_or("Bad request");
        let mut response = Self::new(status, code, title, detail).into_response();
        response.headers_mut().extend(headers);
        response
    }
}

impl From<&ProblemType> for Problem {
    fn from(type_: &ProblemType) -> Self {
        type_.problem()
    }
}

impl Problem {
    /// The body.
    pub(crate) fn body(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() + "\n"
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = self.body();
        let mut response = Response::builder().status(self.status).content_type(MEDIA_TYPE);
        if self.status == StatusCode::UNAUTHORIZED {
            response = response.header(header::WWW_AUTHENTICATE, "Bearer");
        }
        if let Some(after) = self.retry_after {
            response = response.header(header::RETRY_AFTER, after.as_secs().max(1));
        }
        response.body(body)
    }
}

impl ResponseError for Problem {
    fn status(&self) -> StatusCode {
        self.status
    }

    fn as_response(&self) -> Response {
        self.clone().into_response()
    }
}
