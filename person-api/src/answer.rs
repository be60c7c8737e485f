//! What a client gets when all is well.

use std::marker::PhantomData;

use events::Cpf;
use poem::{
    Request, Response, ResponseBuilder,
    http::{StatusCode, header},
};
use serde_json::json;
use service::{
    documentation::{Answer, Answers, CACHED},
    problem::Problem,
};
use uuid::Uuid;

use crate::{
    describe::{ChangedBody, CreatedBody, DeletedBody, ItemBody, ListBody, PersonBody},
    kind::ItemKind,
    request::Page,
    store::{
        Change, Found, Listed, Written,
        idempotency::{self, CREATED},
    },
};

type Headers = &'static [(&'static str, &'static str)];

/// What every answer's `ETag` says.
const ETAG: (&str, &str) = (
    "ETag",
    "Names the person's state: the id, a dot, and the version, in quotation marks. Send it as `If-Match` to change \
     this state and no other. Without its quotation marks, a reader of the score may wait for it, at the score \
     service: `GET /{cpf}/score?after=<id>.<version>&wait=2s`.",
);
/// What every answer to a read says.
const READ: Headers = &[ETAG, CACHED];
/// When a read has no body.
const NOT_MODIFIED: Option<&str> = Some("`If-None-Match` names the state that would be answered.");

/// Declares answers: body, status, when, headers.
macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident$(<$k:ident>)?: $body:ty, $status:literal, $when:literal, $headers:expr
       $(, $not_modified:expr)?;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub(crate) struct $name$(<$k>(PhantomData<$k>))?;
            impl$(<$k: ItemKind>)? Answers for $name$(<$k>)? {
                type Body = $body;
                const STATUS: u16 = $status;
                const DESCRIPTION: &'static str = $when;
                const HEADERS: Headers = $headers;
                $(const NOT_MODIFIED: Option<&'static str> = $not_modified;)?
            }
        )*
    };
}

answers! {
    /// A record is stored.
    Created: CreatedBody, 201, "Stored, and its event with it.", &[("Location", "Where it is."), ETAG];
    /// A record is as it was to be.
    Changed: ChangedBody, 200, "`changed`: stored, and its event with it. `unchanged`: it was so already, and there is no new version and no event.", &[ETAG];
    /// A record is gone.
    Deleted: DeletedBody, 200, "Gone, and its event is stored.", &[ETAG];
    /// A person with their items.
    Person: PersonBody, 200, "The person with their items, as one state.", READ, NOT_MODIFIED;
    /// An item.
    Item<K>: ItemBody<K>, 200, "The item.", READ, NOT_MODIFIED;
    /// A page of items.
    List<K>: ListBody<K>, 200, "A page of the person's items.", READ, NOT_MODIFIED;
}

/// Names a state of a person: which life of the cpf, and which version.
fn token(person: Uuid, version: i64) -> String {
    format!("\"{person}.{version}\"")
}

fn json(etag: &str) -> ResponseBuilder {
    Response::builder().content_type("application/json").header(header::ETAG, etag)
}

/// A message about what was done.
fn said(message: &str, written: &Written) -> Response {
    let Written { id, person_id, version } = written;
    json(&token(*person_id, *version))
        .body(format!("{{\"message\":\"{message}\",\"id\":\"{id}\",\"version\":{version}}}\n"))
}

/// Where a person is.
pub(crate) fn location(cpf: Cpf) -> String {
    format!("/person/{}", cpf.get())
}

/// 201 for what was stored just now.
pub(crate) fn created(written: &Written, location: String) -> Answer<Created> {
    let Written { id, person_id, version } = written;
    let body = CREATED.replace("{id}", &id.to_string()).replace("{version}", &version.to_string());
    again(idempotency::Answer { location, etag: token(*person_id, *version), body })
}

/// 201 as it was answered before.
pub(crate) fn again(answer: idempotency::Answer) -> Answer<Created> {
    json(&answer.etag)
        .status(StatusCode::CREATED)
        .header(header::LOCATION, answer.location)
        .body(answer.body)
        .into()
}

/// 200 after a change.
pub(crate) fn changed(change: &Change) -> Answer<Changed> {
    match change {
        Change::Changed(written) => said("changed", written),
        Change::Unchanged(written) => said("unchanged", written),
    }
    .into()
}

/// 200 after a deletion.
pub(crate) fn deleted(written: &Written) -> Answer<Deleted> {
    said("deleted", written).into()
}

fn found<A>(request: &Request, id: Uuid, version: i64, body: String) -> Result<Answer<A>, Problem> {
    Answer::of_state(request, &token(id, version), || Ok(body))
}

/// 200: a person.
pub(crate) fn person(request: &Request, person: Found) -> Result<Answer<Person>, Problem> {
    found(request, person.id, person.version, person.body)
}

/// 200: an item.
pub(crate) fn item<K>(request: &Request, item: Found) -> Result<Answer<Item<K>>, Problem> {
    found(request, item.id, item.version, item.body)
}

/// 200: a page of items, and where the next one is.
pub(crate) fn list<K: ItemKind>(
    request: &Request,
    cpf: Cpf,
    page: Page,
    listed: &Listed,
) -> Result<Answer<List<K>>, Problem> {
    let next = listed.last.as_ref().filter(|_| listed.more);
    let next = next.map(|last| format!("{}/{}?limit={}&after={last}", location(cpf), K::KIND, page.limit));
    let body = format!("{{\"items\":{},\"next\":{}}}", listed.body, json!(next));
    found(request, listed.id, listed.version, body)
}
