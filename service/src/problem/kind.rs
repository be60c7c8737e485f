//! Types of problems: what an answer says, and what the documentation says that it may.

use std::{borrow::Cow, time::Duration};

use poem::http::StatusCode;

use super::Problem;

/// What all problems of one type have in common.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// The status code.
    pub status: StatusCode,
    /// The last part of the type, in kebab case.
    pub code: &'static str,
    /// What happened, in two or three words.
    pub title: &'static str,
    /// What happened and what to do next, where there is nothing more particular to say.
    pub detail: &'static str,
    /// When another try makes sense.
    pub retry_after: Option<Duration>,
}

impl Kind {
    /// A problem of this type.
    pub fn problem(&self) -> Problem {
        self.saying(self.detail)
    }

    /// A problem of this type with something more particular to say.
    pub fn saying(&self, detail: impl Into<Cow<'static, str>>) -> Problem {
        let problem = Problem::new(self.status, self.code, self.title, detail);
        Problem { retry_after: self.retry_after, ..problem }
    }

    /// As it stands in an answer.
    pub fn type_(&self) -> String {
        format!("/problems/{}", self.code)
    }
}

/// 422 with everything that is wrong.
pub const INVALID_FIELDS: Kind = Kind {
    status: StatusCode::UNPROCESSABLE_ENTITY,
    code: "invalid-fields",
    title: "Invalid fields",
    detail: "Nothing was stored. Correct the fields in `errors` and send the request again.",
    retry_after: None,
};

/// 503: the database does not answer; nothing is known to be lost.
pub const UNAVAILABLE: Kind = Kind {
    status: StatusCode::SERVICE_UNAVAILABLE,
    code: "unavailable",
    title: "Service unavailable",
    detail: "The service cannot reach its database right now. Try again later.",
    retry_after: Some(Duration::from_secs(1)),
};

/// 500: a defect of ours. The cause goes to the log, never to the client.
pub const INTERNAL: Kind = Kind {
    status: StatusCode::INTERNAL_SERVER_ERROR,
    code: "internal",
    title: "Internal error",
    detail: "The request could not be completed because of a defect in the service.",
    retry_after: None,
};

/// What any request may meet, whatever it asks for: the part in front of the routes answers it.
pub const ANYWHERE: &[&Kind] = &[&INTERNAL];
