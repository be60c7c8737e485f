//! What a client gets when all is well.

use events::{Cpf, Kind};
use poem::{
    Response, ResponseBuilder,
    http::{StatusCode, header},
};
use serde_json::json;
use uuid::Uuid;
use web::{conditional::Conditional, problem::Problem, tag::Tag};

use crate::{
    request::Page,
    store::{
        Change, Found, Listed, Written,
        idempotency::{self, CREATED},
    },
};

/// Names a state of a person: which life of the cpf, and which version.
pub(crate) fn tag(person: Uuid, version: i64) -> Tag {
    Tag { id: person, version }
}

fn json(etag: &str) -> ResponseBuilder {
    Response::builder().content_type("application/json").header(header::ETAG, etag)
}

/// A message about what was done.
fn said(message: &str, written: &Written) -> Response {
    let Written { id, person_id, version } = written;
    json(&tag(*person_id, *version).to_string())
        .body(format!("{{\"message\":\"{message}\",\"id\":\"{id}\",\"version\":{version}}}\n"))
}

/// Where a person is.
pub(crate) fn location(cpf: Cpf) -> String {
    format!("/person/{}", cpf.get())
}

/// 201 for what was stored just now.
pub(crate) fn created(written: &Written, location: String) -> Response {
    let Written { id, person_id, version } = written;
    let body = CREATED.replace("{id}", &id.to_string()).replace("{version}", &version.to_string());
    again(idempotency::Answer { location, etag: tag(*person_id, *version).to_string(), body })
}

/// 201 as it was answered before.
pub(crate) fn again(answer: idempotency::Answer) -> Response {
    json(&answer.etag).status(StatusCode::CREATED).header(header::LOCATION, answer.location).body(answer.body)
}

/// 200 after a change.
pub(crate) fn changed(change: &Change) -> Response {
    match change {
        Change::Changed(written) => said("changed", written),
        Change::Unchanged(written) => said("unchanged", written),
    }
}

/// 200 after a deletion.
pub(crate) fn deleted(written: &Written) -> Response {
    said("deleted", written)
}

/// 200: a person, or an item; or 304.
pub(crate) fn found(conditional: &Conditional, found: Found) -> Result<Response, Problem> {
    conditional.respond(tag(found.id, found.version), || Ok(found.body))
}

/// 200: a page of items, and where the next one is; or 304.
pub(crate) fn list(
    conditional: &Conditional,
    cpf: Cpf,
    kind: Kind,
    page: Page,
    listed: Listed,
) -> Result<Response, Problem> {
    let Listed { id, version, more, last, body } = listed;
    let next = last.filter(|_| more);
    let next = next.map(|last| format!("{}/{kind}?limit={}&after={last}", location(cpf), page.limit));
    conditional.respond(tag(id, version), || Ok(format!("{{\"items\":{body},\"next\":{}}}", json!(next))))
}
