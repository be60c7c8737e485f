//! The problem types of every API.

use std::{borrow::Cow, time::Duration};

use poem::http::StatusCode;

use super::Problem;

/// A problem type (RFC 9457): what all problems of the type have in common.
#[derive(Clone, Copy, Debug)]
pub struct ProblemType {
    /// The status code.
    pub status: StatusCode,
    /// The last part of the type, in kebab case.
    pub code: &'static str,
    /// What happened, in two or three words.
    pub title: &'static str,
    /// What happened and what to do next, unless a problem has its own detail.
    pub detail: &'static str,
    /// When another try makes sense.
    pub retry_after: Option<Duration>,
}

impl ProblemType {
    /// A problem of this type.
    pub fn problem(&self) -> Problem {
        self.with_detail(self.detail)
    }

    /// A problem of this type with its own detail.
    pub fn with_detail(&self, detail: impl Into<Cow<'static, str>>) -> Problem {
        let problem = Problem::new(self.status, self.code, self.title, detail);
        Problem { retry_after: self.retry_after, ..problem }
    }
}

/// 422 with everything that is wrong.
pub const INVALID_FIELDS: ProblemType = ProblemType {
    status: StatusCode::UNPROCESSABLE_ENTITY,
    code: "invalid-fields",
    title: "Invalid fields",
    detail: "The request breaks the rules that `errors` names, and nothing was done. Correct it and send it again.",
    retry_after: None,
};

/// 503: the database does not respond.
pub const UNAVAILABLE: ProblemType = ProblemType {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "unavailable",
    title: "Service unavailable",
    detail: "The service cannot reach its database right now. Try again later.",
    retry_after: Some(Duration::from_secs(1)),
};

/// 500: a defect of ours. The cause goes to the log, never to the client.
pub const INTERNAL: ProblemType = ProblemType {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "internal",
    title: "Internal error",
    detail: "The request could not be completed because of a defect in the service.",
    retry_after: None,
};

/// 401: the key is missing or unknown. The response does not say which.
pub const UNAUTHORIZED: ProblemType = ProblemType {
    status: StatusCode::UNAUTHORIZED,
    code: "unauthorized",
    title: "Unauthorized",
    detail: "The request has no valid key. Send one: `Authorization: Bearer <key>`.",
    retry_after: None,
};

/// 503: the limit of requests that use the database is reached. Nothing was done.
pub const OVERLOADED: ProblemType = ProblemType {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "overloaded",
    title: "Overloaded",
    detail: "The limit of concurrent requests is reached. Nothing was done. Try again later.",
    retry_after: Some(Duration::from_secs(1)),
};

/// 408: a request's body did not arrive in time.
pub const SLOW_BODY: ProblemType = ProblemType {
    status: StatusCode::REQUEST_TIMEOUT,
    code: "slow-body",
    title: "Request Timeout",
    detail: "The request's body did not arrive in time. Nothing was done.",
    retry_after: None,
};

/// 400: the body is shorter than announced.
pub const INCOMPLETE_BODY: ProblemType = ProblemType {
    status: StatusCode::BAD_REQUEST,
    code: "incomplete-body",
    title: "Incomplete body",
    detail: "The request's body broke off, or its chunks are not well formed. Nothing was done.",
    retry_after: None,
};

/// 413: a body beyond [`MAX_BODY`](crate::front::MAX_BODY).
pub const TOO_LARGE: ProblemType = ProblemType {
    status: StatusCode::PAYLOAD_TOO_LARGE,
    code: "too-large",
    title: "Content Too Large",
    detail: "The request's body is larger than 64 KiB. Nothing was done.",
    retry_after: None,
};

/// 400: a request that names no host, or two, or a wrong one.
pub const MALFORMED_REQUEST: ProblemType = ProblemType {
    status: StatusCode::BAD_REQUEST,
    code: "malformed-request",
    title: "Malformed request",
    detail: "The request has no `Host`, more than one, or one that is not a host name. Nothing was done.",
    retry_after: None,
};

/// 421: a host that is not this program's. Without keys a web page could reach it under the page's own name.
pub const UNKNOWN_HOST: ProblemType = ProblemType {
    status: StatusCode::MISDIRECTED_REQUEST,
    code: "unknown-host",
    title: "Unknown host",
    detail: "The request is for a host that this service does not serve: its `Host` is not localhost, a name below \
             it, or an address of this machine. Nothing was done. The operator can allow it with ALLOWED_HOSTS.",
    retry_after: None,
};

/// All of these.
pub const PROBLEM_TYPES: &[&ProblemType] = &[
    &INVALID_FIELDS,
    &UNAVAILABLE,
    &INTERNAL,
    &UNAUTHORIZED,
    &OVERLOADED,
    &SLOW_BODY,
    &INCOMPLETE_BODY,
    &TOO_LARGE,
    &MALFORMED_REQUEST,
    &UNKNOWN_HOST,
];
