//! Reads of a state: the response has its `ETag`, and no body for a client that has the state already.

use poem::{
    Request, Response, ResponseBuilder,
    http::{HeaderValue, StatusCode, header},
};

use crate::{
    front::headers_only,
    parameters::texts,
    problem::Problem,
    tag::{Tag, Tags},
};

/// What a read says of the states that the client has: `If-None-Match`, and whether it is a HEAD.
#[derive(Clone, Debug)]
pub struct Conditional {
    known: Tags,
    headers_only: bool,
}

impl Conditional {
    /// Of this request. A header that is no list of tags is ignored: it names no state.
    pub fn of(request: &Request) -> Self {
        let known = texts(request, "If-None-Match").and_then(|lines| Tags::parse(&lines.join(", ")));
        Self { known: known.unwrap_or_default(), headers_only: headers_only(request) }
    }

    /// Whether the response may need no body. Then it is worth to read the tag alone first.
    pub fn may_need_no_body(&self) -> bool {
        self.headers_only || self.known != Tags::default()
    }

    /// The response where it needs no body: 304 to a client that has the state with this tag, and the headers alone to a
    /// HEAD. They are without `Content-Length`, which only the body would tell.
    pub fn without_body(&self, tag: Tag) -> Option<Response> {
        if self.known.name(tag) {
            Some(not_modified(tag))
        } else if self.headers_only {
            Some(state(tag).content_type("application/json").finish())
        } else {
            None
        }
    }

    /// 200 with the body of the state that has this tag, or 304 to a client that has it. It is personal data: only the
    /// client's own cache may keep it, and has to ask again each time.
    pub fn respond(
        &self,
        tag: Tag,
        body: impl FnOnce() -> Result<String, Problem>,
    ) -> Result<Response, Problem> {
        if self.known.name(tag) {
            return Ok(not_modified(tag));
        }
        Ok(state(tag).content_type("application/json").body(body()? + "\n"))
    }
}

fn not_modified(tag: Tag) -> Response {
    state(tag).status(StatusCode::NOT_MODIFIED).finish()
}

fn state(tag: Tag) -> ResponseBuilder {
    Response::builder()
        .header(header::ETAG, tag.to_string())
        .header(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"))
}
