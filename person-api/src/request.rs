//! What a client may send. Parsing is strict: a field that is missing, unknown, given twice, of the
//! wrong type or against its rule is named, all of them at once, and then nothing is stored.

mod body;
mod characters;
mod cpf;
mod fields;
mod parameters;
mod rules;

use chrono::{DateTime, Utc};
use events::{Cpf, Kind};
use poem::Request;
use rust_decimal::Decimal;
use uuid::Uuid;
use web::problem::Problem;

pub use self::cpf::CpfCheck;
use self::fields::Fields;
pub(crate) use self::{
    body::{JSON, MERGE_PATCH, body},
    parameters::IdempotencyKey,
};
use crate::store::{ITEMS_MAX, PersonPatch, States};

/// How many items a page has when nobody asks.
const PAGE: i32 = 100;

/// A person as a client sends it.
#[derive(Clone, Debug)]
pub struct NewPerson {
    /// Not stored yet.
    pub cpf: Cpf,
    /// 1 to 200 characters.
    pub name: String,
    /// 1 to 500 characters, or unknown.
    pub address: Option<String>,
    /// Within the years 1 to 9999 UTC, which is what RFC 3339 can write.
    pub date_of_birth: DateTime<Utc>,
}

impl NewPerson {
    /// Parses the request of `POST /person`.
    pub(crate) fn parse(
        request: &Request,
        check: CpfCheck,
        body: &[u8],
    ) -> Result<(Self, Option<IdempotencyKey>), Problem> {
        let mut fields = Fields::read(request, body)?;
        fields.parameters.only_query(&[]);
        let key = fields.idempotency_key();
        let cpf = fields.required("cpf", |raw| check.check(rules::cpf(raw)?));
        let name = fields.required("name", |raw| rules::text(raw, 200));
        let address = fields.optional("address", |raw| rules::text(raw, 500));
        let date_of_birth = fields.required("date_of_birth", rules::date_of_birth);
        fields.finish(|| Some((Self { cpf: cpf?, name: name?, address, date_of_birth: date_of_birth? }, key)))
    }
}

/// Parses the request of `PATCH /person/{cpf}`: a merge patch (RFC 7396), in which null clears.
pub(crate) fn patch(request: &Request, body: &[u8]) -> Result<(Cpf, States, PersonPatch), Problem> {
    let mut fields = Fields::read(request, body)?;
    fields.parameters.only_query(&[]);
    let (cpf, states) = (fields.cpf(), fields.states());
    let patch = PersonPatch {
        name: fields.given("name", |raw| rules::text(raw, 200)),
        address: fields.given("address", rules::nullable(|raw| rules::text(raw, 500))),
        date_of_birth: fields.given("date_of_birth", rules::date_of_birth),
        status: fields.given("status", rules::status),
    };
    fields.finish(|| Some((cpf?, states, patch)))
}

/// Whom a change is about, and in which states.
pub(crate) type Whose = (Cpf, States);

/// An income, an asset or a debt as a client sends it.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// 1 to 100 characters; a debt has none.
    pub(crate) type_: Option<String>,
    /// Not negative, at most 15 digits before the point and 4 after it.
    pub(crate) value: Decimal,
}

impl Item {
    /// The fields of an item. What is wrong is kept in `fields`.
    fn read(kind: Kind, fields: &mut Fields<'_>) -> Option<Self> {
        let type_ = match kind {
            Kind::Income | Kind::Asset => Some(fields.required("type", |raw| rules::text(raw, 100))),
            Kind::Debt => None,
        };
        let value = fields.required("value", rules::value);
        let type_ = match type_ {
            Some(type_) => Some(type_?),
            None => None,
        };
        Some(Self { type_, value: value? })
    }

    /// Parses the request of `POST /person/{cpf}/<kind>`.
    pub(crate) fn parse_new(
        request: &Request,
        kind: Kind,
        body: &[u8],
    ) -> Result<(Whose, Self, Option<IdempotencyKey>), Problem> {
        let mut fields = Fields::read(request, body)?;
        fields.parameters.only_query(&[]);
        let (cpf, states, key) = (fields.cpf(), fields.states(), fields.idempotency_key());
        let item = Self::read(kind, &mut fields);
        fields.finish(|| Some(((cpf?, states), item?, key)))
    }

    /// Parses the request of `PUT /person/{cpf}/<kind>/{id}`.
    pub(crate) fn parse(
        request: &Request,
        kind: Kind,
        body: &[u8],
    ) -> Result<((Cpf, Uuid), States, Self), Problem> {
        let mut fields = Fields::read(request, body)?;
        fields.parameters.only_query(&[]);
        let (cpf, id, states) = (fields.cpf(), fields.id(), fields.states());
        let item = Self::read(kind, &mut fields);
        fields.finish(|| Some(((cpf?, id?), states, item?)))
    }
}

/// Parses the request of `GET /person/{cpf}`.
pub(crate) fn person(request: &Request) -> Result<Cpf, Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let cpf = fields.cpf();
    fields.finish(|| cpf)
}

/// Parses the request of `DELETE /person/{cpf}`.
pub(crate) fn person_in_state(request: &Request) -> Result<Whose, Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let (cpf, states) = (fields.cpf(), fields.states());
    fields.finish(|| Some((cpf?, states)))
}

/// Parses the request of `GET /person/{cpf}/<kind>/{id}`.
pub(crate) fn item(request: &Request) -> Result<(Cpf, Uuid), Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let (cpf, id) = (fields.cpf(), fields.id());
    fields.finish(|| Some((cpf?, id?)))
}

/// Parses the request of `DELETE /person/{cpf}/<kind>/{id}`.
pub(crate) fn item_in_state(request: &Request) -> Result<((Cpf, Uuid), States), Problem> {
    let mut fields = Fields::none(request);
    fields.parameters.only_query(&[]);
    let (cpf, id, states) = (fields.cpf(), fields.id(), fields.states());
    fields.finish(|| Some(((cpf?, id?), states)))
}

/// Which part of a list.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    /// 1 to [`ITEMS_MAX`].
    pub(crate) limit: i32,
    /// What comes after this id; from the beginning when there is none.
    pub(crate) after: Option<Uuid>,
}

impl Page {
    /// Parses the request of `GET /person/{cpf}/<kind>`.
    pub(crate) fn parse(request: &Request) -> Result<(Cpf, Self), Problem> {
        let mut fields = Fields::none(request);
        let (cpf, limit, after) = (fields.cpf(), fields.limit(), fields.after());
        fields.parameters.only_query(&["limit", "after"]);
        fields.finish(|| Some((cpf?, Self { limit: limit.unwrap_or(PAGE.min(ITEMS_MAX)), after })))
    }
}
