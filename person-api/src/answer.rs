//! What a client gets when all is well.

use std::marker::PhantomData;

use events::Cpf;
use poem::{
    Response, ResponseBuilder,
    http::{StatusCode, header},
};
use serde_json::json;
use service::documentation::{Answer, Answers};
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
    "Names the person's state: the id, a dot, and the version. Send it as `If-Match` to change this state and no \
     other. A reader of the score may wait for it (`GET /{cpf}/score?after=<ETag>&wait=2s`).",
);

/// Declares answers: body, status, when, headers.
macro_rules! answers {
    ($($(#[$doc:meta])* $name:ident$(<$k:ident>)?: $body:ty, $status:literal, $when:literal, $headers:expr;)*) => {
        $(
            $(#[$doc])*
            #[derive(Debug)]
            pub(crate) struct $name$(<$k>(PhantomData<$k>))?;
            impl$(<$k: ItemKind>)? Answers for $name$(<$k>)? {
                type Body = $body;
                const STATUS: u16 = $status;
                const DESCRIPTION: &'static str = $when;
                const HEADERS: Headers = $headers;
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
    Person: PersonBody, 200, "The person with their items, as one state.", &[ETAG];
    /// An item.
    Item<K>: ItemBody<K>, 200, "The item.", &[ETAG];
    /// A page of items.
    List<K>: ListBody<K>, 200, "A page of the person's items.", &[ETAG];
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

fn found<A>(found: Found) -> Answer<A> {
    json(&token(found.id, found.version)).body(found.body + "\n").into()
}

/// 200: a person.
pub(crate) fn person(person: Found) -> Answer<Person> {
    found(person)
}

/// 200: an item.
pub(crate) fn item<K>(item: Found) -> Answer<Item<K>> {
    found(item)
}

/// 200: a page of items, and where the next one is.
pub(crate) fn list<K: ItemKind>(cpf: Cpf, page: Page, listed: &Listed) -> Answer<List<K>> {
    let next = listed.last.as_ref().filter(|_| listed.more);
    let next = next.map(|last| format!("{}/{}?limit={}&after={last}", location(cpf), K::KIND, page.limit));
    json(&token(listed.id, listed.version))
        .body(format!("{{\"items\":{},\"next\":{}}}\n", listed.body, json!(next)))
        .into()
}
