//! What an operation answers, when it is well and when it is not.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write, marker::PhantomData};

use poem::{
    Error, IntoResponse, Request, Response,
    http::{HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiResponse,
    registry::{
        MetaHeader, MetaMediaType, MetaParamIn, MetaResponse, MetaResponses, MetaSchema, MetaSchemaRef,
        Registry,
    },
};
use serde_json::json;

use super::{
    Parameter,
    schema::{self, Described, Field, inline},
};
use crate::problem::{ANYWHERE, INTERNAL, INVALID_FIELDS, Kind, Problem};

/// An answer that is described: its status, headers and body.
pub trait Answers {
    /// The body.
    type Body: Described;
    /// The status code.
    const STATUS: u16;
    /// When it is given.
    const DESCRIPTION: &'static str;
    /// Its headers, and what they say.
    const HEADERS: &'static [(&'static str, &'static str)];
    /// When it is a 304 with the same headers and no body instead, if that may be.
    const NOT_MODIFIED: Option<&'static str> = None;
}

/// An answer as described by `A`.
#[derive(Debug)]
pub struct Answer<A>(Response, PhantomData<fn() -> A>);

impl<A> From<Response> for Answer<A> {
    fn from(response: Response) -> Self {
        Self(response, PhantomData)
    }
}

/// What the answer to a read says of caches.
pub const CACHED: (&str, &str) =
    ("Cache-Control", "`private, no-cache`: for the caller's own cache, which has to ask again each time.");

impl<A> Answer<A> {
    /// 200: a state that has this tag, with its body; or 304 where the caller has it. It is personal data, so for
    /// the caller's own cache, which has to ask again each time.
    pub fn of_state(
        request: &Request,
        etag: &str,
        body: impl FnOnce() -> Result<String, Problem>,
    ) -> Result<Self, Problem> {
        let response = Response::builder()
            .header(header::ETAG, etag)
            .header(header::CACHE_CONTROL, HeaderValue::from_static("private, no-cache"));
        if holds(request, etag) {
            return Ok(response.status(StatusCode::NOT_MODIFIED).finish().into());
        }
        Ok(response.content_type("application/json").body(body()? + "\n").into())
    }
}

/// Whether the caller holds the state with this tag: by `*`, or by one of the tags that it sends, weak or not
/// (RFC 9110, 13.1.2).
fn holds(request: &Request, etag: &str) -> bool {
    let tag = etag.trim_matches('"').as_bytes();
    request.headers().get_all(header::IF_NONE_MATCH).iter().map(HeaderValue::as_bytes).any(|held| {
        // What is between quotation marks is every other part.
        held.trim_ascii() == b"*"
            || held.split(|byte| *byte == b'"').skip(1).step_by(2).any(|held| held == tag)
    })
}

/// `If-None-Match`: what the caller holds already. Any text will do: what is no `ETag` of ours names no state.
#[derive(Debug)]
pub struct Held;

impl Parameter for Held {
    const IN: MetaParamIn = MetaParamIn::Header;
    const LIST: bool = true;

    fn parse(_: &str) -> Result<Self, Cow<'static, str>> {
        Ok(Self)
    }

    fn schema() -> MetaSchema {
        schema::text(
            "The `ETag` of an answer that the caller holds, in its quotation marks, weak or not, or several, or `*`: if one \
             is still right, the answer is 304. What is no `ETag` is ignored.",
        )
    }
}

impl<A> IntoResponse for Answer<A> {
    fn into_response(self) -> Response {
        self.0
    }
}

impl<A: Answers> ApiResponse for Answer<A> {
    fn meta() -> MetaResponses {
        let content =
            vec![MetaMediaType { content_type: "application/json", schema: schema::of::<A::Body>() }];
        let response = |status, description, content| MetaResponse {
            description,
            status: Some(status),
            status_range: None,
            content,
            headers: A::HEADERS.iter().map(|(name, description)| text_header(name, description)).collect(),
        };
        let not_modified = A::NOT_MODIFIED.map(|when| response(304, when, Vec::new()));
        let answer = response(A::STATUS, A::DESCRIPTION, content);
        MetaResponses { responses: [answer].into_iter().chain(not_modified).collect() }
    }

    fn register(registry: &mut Registry) {
        schema::register::<A::Body>(registry);
    }
}

/// What can go wrong with an operation, besides what can go wrong with any.
pub trait Problems {
    /// The types of problems, in lists that operations share.
    const KINDS: &'static [&'static [&'static Kind]];

    /// What problems of a type say besides what any says ([`Problem::extensions`]). The same for every
    /// operation that may meet it: it has one place in the documentation.
    fn extensions(_kind: &Kind) -> Vec<Field> {
        Vec::new()
    }
}

/// A problem of an operation: one of those that `P` names.
#[derive(Debug)]
pub struct Failure<P>(Problem, PhantomData<fn() -> P>);

impl<P> From<Problem> for Failure<P> {
    fn from(problem: Problem) -> Self {
        Self(problem, PhantomData)
    }
}

impl<P> From<&Kind> for Failure<P> {
    fn from(kind: &Kind) -> Self {
        kind.problem().into()
    }
}

impl<P> From<Failure<P>> for Error {
    fn from(failure: Failure<P>) -> Self {
        failure.0.into()
    }
}

impl<P: Problems> ApiResponse for Failure<P> {
    /// One response per status, which names every type that it may be of.
    fn meta() -> MetaResponses {
        let mut by_status: BTreeMap<u16, Vec<&Kind>> = BTreeMap::new();
        for kind in kinds::<P>() {
            by_status.entry(kind.status.as_u16()).or_default().push(kind);
        }
        MetaResponses {
            responses: by_status.into_iter().map(|(status, kinds)| response(status, &kinds)).collect(),
        }
    }

    fn register(registry: &mut Registry) {
        schema::register::<Problem>(registry);
        for kind in kinds::<P>() {
            registry.create_schema::<Kind, _>(name(kind), |_| described(kind, extensions::<P>(kind)));
        }
    }
}

/// What problems of a type say besides, here and anywhere.
fn extensions<P: Problems>(kind: &Kind) -> Vec<Field> {
    let mut extensions = P::extensions(kind);
    if kind.code == INTERNAL.code {
        let id = schema::text("The request's id, as `X-Request-Id` and the log of the service have it.");
        let example = Some("0198c0de-0000-7000-8000-000000000001".into());
        extensions.push(("request_id", true, MetaSchema { example, ..id }));
    }
    extensions
}

/// What can go wrong, here and anywhere.
fn kinds<P: Problems>() -> impl Iterator<Item = &'static Kind> {
    P::KINDS.iter().copied().flatten().chain(ANYWHERE).copied()
}

/// A problem type's place in the documentation.
fn name(kind: &Kind) -> String {
    format!("problem.{}", kind.code)
}

fn described(kind: &Kind, extensions: Vec<Field>) -> MetaSchema {
    let (type_, status) = (kind.type_(), kind.status.as_u16());
    let constant = |of, value| inline(MetaSchema { enum_items: vec![value], ..MetaSchema::new(of) });
    let mut example = json!({"type": type_, "title": kind.title, "status": status, "detail": kind.detail});
    if kind.code == INVALID_FIELDS.code {
        example["errors"] = json!([{"pointer": "query: limit", "detail": "is given more than once"}]);
    }
    let mut this = schema::object([]);
    if kind.code == INVALID_FIELDS.code {
        this.required.push("errors");
    }
    this.properties =
        vec![("type", constant("string", type_.into())), ("status", constant("integer", status.into()))];
    for field in extensions {
        example[field.0] = field.2.example.clone().into();
        schema::add(&mut this, field);
    }
    MetaSchema {
        description: Some(kind.detail),
        all_of: vec![schema::of::<Problem>(), inline(this)],
        example: Some(example),
        ..MetaSchema::ANY
    }
}

fn response(status: u16, kinds: &[&Kind]) -> MetaResponse {
    let mut description = String::new();
    for kind in kinds {
        // Writing to a string cannot fail.
        let _ = writeln!(description, "- `{}`: {}", kind.type_(), kind.detail);
    }
    let mut places: Vec<_> = kinds.iter().map(|kind| MetaSchemaRef::Reference(name(kind))).collect();
    let schema = match places.len() {
        1 => places.remove(0),
        _ => inline(MetaSchema { one_of: places, ..MetaSchema::ANY }),
    };
    let again = kinds.iter().any(|kind| kind.retry_after.is_some());
    MetaResponse {
        // poem-openapi wants texts that live for ever. These are few, and made once.
        description: description.leak(),
        status: Some(status),
        status_range: None,
        content: vec![MetaMediaType { content_type: "application/problem+json", schema }],
        headers: [
            (again, "Retry-After", "After so many seconds another try makes sense."),
            (status == 401, "WWW-Authenticate", "`Bearer`: how to say who asks."),
        ]
        .into_iter()
        .filter(|(given, ..)| *given)
        .map(|(_, name, description)| text_header(name, description))
        .collect(),
    }
}

pub(super) fn text_header(name: &str, description: &str) -> MetaHeader {
    MetaHeader {
        name: name.to_owned(),
        description: Some(description.to_owned()),
        required: false,
        deprecated: false,
        schema: inline(MetaSchema::new("string")),
    }
}
