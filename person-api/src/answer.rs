//! What a client gets when all is well.

use poem::{
    Response,
    http::{StatusCode, header},
};
use poem_openapi::registry::MetaSchema;
use service::documentation::{
    Answer, Answers,
    schema::{Described, formatted, integer, object, one_of},
};
use uuid::Uuid;

use crate::{
    describe::{PersonBody, VERSION},
    store::{Found, Written},
};

/// What every answer's `ETag` says.
const ETAG: (&str, &str) = (
    "ETag",
    "Names this state: the person's id, a dot, and the version. A reader of the score may wait for it \
     (`GET /{cpf}/score?after=<ETag>&wait=2s`).",
);

/// 201: stored.
#[derive(Debug)]
pub(crate) enum Created {}

impl Answers for Created {
    type Body = WrittenBody;
    const STATUS: u16 = 201;
    const DESCRIPTION: &'static str = "Stored, and its event with it.";
    const HEADERS: &'static [(&'static str, &'static str)] = &[("Location", "Where it is."), ETAG];
}

/// What a write says of itself.
pub(crate) struct WrittenBody;

impl Described for WrittenBody {
    const NAME: &'static str = "Written";

    fn schema() -> MetaSchema {
        object([
            ("message", true, one_of(&["created"], "What was done.")),
            ("id", true, formatted("uuid", "The record's id.")),
            ("version", true, integer(1.0, VERSION)),
        ])
    }
}

/// 201.
pub(crate) fn created(written: &Written, location: String) -> Answer<Created> {
    let Written { id, version, .. } = written;
    Response::builder()
        .status(StatusCode::CREATED)
        .content_type("application/json")
        .header(header::LOCATION, location)
        .header(header::ETAG, token(written.person_id, *version))
        .body(format!("{{\"message\":\"created\",\"id\":\"{id}\",\"version\":{version}}}\n"))
        .into()
}

/// 200: a person with their items.
#[derive(Debug)]
pub(crate) enum Person {}

impl Answers for Person {
    type Body = PersonBody;
    const STATUS: u16 = 200;
    const DESCRIPTION: &'static str = "The person with their items, as one state.";
    const HEADERS: &'static [(&'static str, &'static str)] = &[ETAG];
}

/// 200.
pub(crate) fn person(found: Found) -> Answer<Person> {
    Response::builder()
        .content_type("application/json")
        .header(header::ETAG, token(found.id, found.version))
        .body(found.body + "\n")
        .into()
}

/// Names a state of a person: which life of the cpf, and which version.
fn token(person: Uuid, version: i64) -> String {
    format!("\"{person}.{version}\"")
}
