//! The responses of requests that succeed.

use events::{Cpf, ItemKind};
use poem::{
    Response, ResponseBuilder,
    http::{StatusCode, header},
};
use serde_json::json;
use uuid::Uuid;
use web::{conditional::Conditional, problem::Problem, tag::Tag};

use crate::{
    model::PageRequest,
    store::{ChangeOutcome, ItemPage, Representation, StoredResponse, Written, idempotency::CREATED},
};

/// Names a state of a person: the id and the version. A person who was deleted and added again has another id.
pub(crate) fn tag(person: Uuid, version: i64) -> Tag {
    Tag { id: person, version }
}

fn json(etag: &str) -> ResponseBuilder {
    Response::builder().content_type("application/json").header(header::ETAG, etag)
}

/// 200 with a message about what was done.
fn done(message: &str, written: &Written) -> Response {
    let Written { id, person_id, version } = written;
    json(&tag(*person_id, *version).to_string())
        .body(format!("{{\"message\":\"{message}\",\"id\":\"{id}\",\"version\":{version}}}\n"))
}

/// The path of a person.
pub(crate) fn location(cpf: Cpf) -> String {
    format!("/person/{}", cpf.get())
}

/// 201 for what was stored just now.
pub(crate) fn created(written: &Written, location: String) -> Response {
    let Written { id, person_id, version } = written;
    let body = CREATED.replace("{id}", &id.to_string()).replace("{version}", &version.to_string());
    repeated(StoredResponse { location, etag: tag(*person_id, *version).to_string(), body })
}

/// 201 with the content of an earlier response.
pub(crate) fn repeated(stored: StoredResponse) -> Response {
    json(&stored.etag).status(StatusCode::CREATED).header(header::LOCATION, stored.location).body(stored.body)
}

/// 200 after a change.
pub(crate) fn changed(outcome: &ChangeOutcome) -> Response {
    match outcome {
        ChangeOutcome::Changed(written) => done("changed", written),
        ChangeOutcome::Unchanged(written) => done("unchanged", written),
    }
}

/// 200 after a deletion.
pub(crate) fn deleted(written: &Written) -> Response {
    done("deleted", written)
}

/// 200: a person, or an item; or 304.
pub(crate) fn representation(conditional: &Conditional, found: Representation) -> Result<Response, Problem> {
    conditional.respond(tag(found.id, found.version), || Ok(found.body))
}

/// 200: a page of items, with the path of the next one; or 304.
pub(crate) fn list(
    conditional: &Conditional,
    cpf: Cpf,
    kind: ItemKind,
    request: PageRequest,
    page: ItemPage,
) -> Result<Response, Problem> {
    let ItemPage { id, version, more, last, body } = page;
    let next = last.filter(|_| more);
    let next = next.map(|last| format!("{}/{kind}?limit={}&after={last}", location(cpf), request.limit));
    conditional.respond(tag(id, version), || Ok(format!("{{\"items\":{body},\"next\":{}}}", json!(next))))
}
