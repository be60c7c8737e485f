//! What a client may send. Parsing is strict: a field that is missing, unknown, given twice, of the wrong type or against
//! its rule is named, all of them at once, and then nothing is stored.

mod body;
mod characters;
mod cpf;
mod fields;
mod parameters;
mod rules;

use events::{Cpf, ItemKind};
use poem::Request;
use uuid::Uuid;
use web::problem::Problem;

pub use self::cpf::CpfCheck;
use self::fields::Fields;
pub(crate) use self::{
    body::{JSON, MERGE_PATCH, body},
    parameters::KeyHeader,
};
use crate::model::{ITEMS_MAX, NewItem, NewPerson, PageRequest, PersonPatch, Precondition};

/// The number of items of a page when the client names none.
const PAGE: i32 = 100;

/// Parses the request of `POST /person`.
pub(crate) fn new_person(
    request: &Request,
    check: CpfCheck,
    body: &[u8],
) -> Result<(NewPerson, Option<KeyHeader>), Problem> {
    let mut fields = Fields::read(request, body)?;
    fields.parameters.only_query(&[]);
    let key = fields.idempotency_key();
    let cpf = fields.required("cpf", |raw| check.check(rules::cpf(raw)?));
    let name = fields.required("name", |raw| rules::text(raw, 200));
    let address = fields.optional("address", |raw| rules::text(raw, 500));
    let date_of_birth = fields.required("date_of_birth", rules::date_of_birth);
    fields
        .finish(|| Some((NewPerson { cpf: cpf?, name: name?, address, date_of_birth: date_of_birth? }, key)))
}

/// Parses the request of `PATCH /person/{cpf}`: a merge patch (RFC 7396), in which null clears.
pub(crate) fn patch(request: &Request, body: &[u8]) -> Result<(Cpf, Precondition, PersonPatch), Problem> {
    let mut fields = Fields::read(request, body)?;
    fields.parameters.only_query(&[]);
    let (cpf, precondition) = (fields.cpf(), fields.precondition());
    let patch = PersonPatch {
        name: fields.given("name", |raw| rules::text(raw, 200)),
        address: fields.given("address", rules::nullable(|raw| rules::text(raw, 500))),
        date_of_birth: fields.given("date_of_birth", rules::date_of_birth),
        status: fields.given("status", rules::status),
    };
    fields.finish(|| Some((cpf?, precondition, patch)))
}

/// The fields of an item. `fields` collects what is wrong.
fn item_fields(kind: ItemKind, fields: &mut Fields<'_>) -> Option<NewItem> {
    let type_ = match kind {
        ItemKind::Income | ItemKind::Asset => Some(fields.required("type", |raw| rules::text(raw, 100))),
        ItemKind::Debt => None,
    };
    let value = fields.required("value", rules::value);
    let type_ = match type_ {
        Some(type_) => Some(type_?),
        None => None,
    };
    Some(NewItem { type_, value: value? })
}

/// Parses the request of `POST /person/{cpf}/<kind>`.
pub(crate) fn new_item(
    request: &Request,
    kind: ItemKind,
    body: &[u8],
) -> Result<(Cpf, Precondition, NewItem, Option<KeyHeader>), Problem> {
    let mut fields = Fields::read(request, body)?;
    fields.parameters.only_query(&[]);
    let (cpf, precondition, key) = (fields.cpf(), fields.precondition(), fields.idempotency_key());
    let item = item_fields(kind, &mut fields);
    fields.finish(|| Some((cpf?, precondition, item?, key)))
}

/// Parses the request of `PUT /person/{cpf}/<kind>/{id}`.
pub(crate) fn changed_item(
    request: &Request,
    kind: ItemKind,
    body: &[u8],
) -> Result<((Cpf, Uuid), Precondition, NewItem), Problem> {
    let mut fields = Fields::read(request, body)?;
    fields.parameters.only_query(&[]);
    let (cpf, id, precondition) = (fields.cpf(), fields.id(), fields.precondition());
    let item = item_fields(kind, &mut fields);
    fields.finish(|| Some(((cpf?, id?), precondition, item?)))
}

/// Parses the request of `GET /person/{cpf}`.
pub(crate) fn person(request: &Request) -> Result<Cpf, Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let cpf = fields.cpf();
    fields.finish(|| cpf)
}

/// Parses the request of `DELETE /person/{cpf}`.
pub(crate) fn deleted_person(request: &Request) -> Result<(Cpf, Precondition), Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let (cpf, precondition) = (fields.cpf(), fields.precondition());
    fields.finish(|| Some((cpf?, precondition)))
}

/// Parses the request of `GET /person/{cpf}/<kind>/{id}`.
pub(crate) fn item(request: &Request) -> Result<(Cpf, Uuid), Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let (cpf, id) = (fields.cpf(), fields.id());
    fields.finish(|| Some((cpf?, id?)))
}

/// Parses the request of `DELETE /person/{cpf}/<kind>/{id}`.
pub(crate) fn deleted_item(request: &Request) -> Result<((Cpf, Uuid), Precondition), Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let (cpf, id, precondition) = (fields.cpf(), fields.id(), fields.precondition());
    fields.finish(|| Some(((cpf?, id?), precondition)))
}

/// Parses the request of `GET /person/{cpf}/<kind>`.
pub(crate) fn page(request: &Request) -> Result<(Cpf, PageRequest), Problem> {
    let mut fields = Fields::none(request);
    let (cpf, limit, after) = (fields.cpf(), fields.limit(), fields.after());
    fields.parameters.only_query(&["limit", "after"]);
    fields.finish(|| Some((cpf?, PageRequest { limit: limit.unwrap_or(PAGE.min(ITEMS_MAX)), after })))
}
