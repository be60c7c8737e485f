//! What a client may send. Parsing is strict: a field that is missing, unknown, given twice, of the
//! wrong type or against its rule is named, all of them at once, and then nothing is stored.

mod body;
mod condition;
mod cpf;
mod fields;
mod key;
mod place;
mod rules;

use chrono::{DateTime, Utc};
use events::{Cpf, Kind};
use poem::Request;
use rust_decimal::Decimal;
use service::{documentation::Sent, problem::Problem};
use uuid::Uuid;

pub use self::cpf::CpfCheck;
use self::fields::Fields;
pub(crate) use self::{
    body::{Body, Sendable},
    condition::IfMatch,
    key::IdempotencyKey,
    place::{After, ItemId, Limit, PathCpf},
    rules::{INVISIBLE, LINE_ENDS},
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
        key: Sent<IdempotencyKey>,
        body: &[u8],
    ) -> Result<(Self, Option<IdempotencyKey>), Problem> {
        let mut fields = Fields::read(body)?;
        fields.query(request, &[]);
        let key = fields.parameter(key);
        let cpf = fields.required("cpf", |raw| check.check(rules::cpf(raw)?));
        let name = fields.required("name", |raw| rules::text(raw, 200));
        let address = fields.optional("address", |raw| rules::text(raw, 500));
        let date_of_birth = fields.required("date_of_birth", rules::date_of_birth);
        fields.finish(|| Some((Self { cpf: cpf?, name: name?, address, date_of_birth: date_of_birth? }, key)))
    }
}

/// Parses the request of `PATCH /person/{cpf}`: a merge patch (RFC 7396), in which null clears.
pub(crate) fn patch(
    request: &Request,
    cpf: Sent<PathCpf>,
    if_match: Sent<IfMatch>,
    body: &[u8],
) -> Result<(Cpf, States, PersonPatch), Problem> {
    let mut fields = Fields::read(body)?;
    fields.query(request, &[]);
    let cpf = fields.parameter(cpf);
    let states = fields.parameter(if_match);
    let patch = PersonPatch {
        name: fields.given("name", |raw| rules::text(raw, 200)),
        address: fields.given("address", rules::nullable(|raw| rules::text(raw, 500))),
        date_of_birth: fields.given("date_of_birth", rules::date_of_birth),
        status: fields.given("status", rules::status),
    };
    fields.finish(|| Some((cpf?.0, IfMatch::states(states), patch)))
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
        cpf: Sent<PathCpf>,
        (if_match, key): (Sent<IfMatch>, Sent<IdempotencyKey>),
        body: &[u8],
    ) -> Result<(Whose, Self, Option<IdempotencyKey>), Problem> {
        let mut fields = Fields::read(body)?;
        fields.query(request, &[]);
        let cpf = fields.parameter(cpf);
        let states = fields.parameter(if_match);
        let key = fields.parameter(key);
        let item = Self::read(kind, &mut fields);
        fields.finish(|| Some(((cpf?.0, IfMatch::states(states)), item?, key)))
    }

    /// Parses the request of `PUT /person/{cpf}/<kind>/{id}`.
    pub(crate) fn parse(
        request: &Request,
        kind: Kind,
        place: (Sent<PathCpf>, Sent<ItemId>),
        if_match: Sent<IfMatch>,
        body: &[u8],
    ) -> Result<((Cpf, Uuid), States, Self), Problem> {
        let mut fields = Fields::read(body)?;
        fields.query(request, &[]);
        let (cpf, id) = (fields.parameter(place.0), fields.parameter(place.1));
        let states = fields.parameter(if_match);
        let item = Self::read(kind, &mut fields);
        fields.finish(|| Some(((cpf?.0, id?.0), IfMatch::states(states), item?)))
    }
}

/// Whose, without a body.
pub(crate) fn person(
    request: &Request,
    cpf: Sent<PathCpf>,
    if_match: Option<Sent<IfMatch>>,
) -> Result<(Cpf, States), Problem> {
    let mut fields = Fields::none();
    fields.query(request, &[]);
    let cpf = fields.parameter(cpf);
    let states = if_match.and_then(|if_match| fields.parameter(if_match));
    fields.finish(|| Some((cpf?.0, IfMatch::states(states))))
}

/// Whose and which, without a body.
pub(crate) fn item(
    request: &Request,
    cpf: Sent<PathCpf>,
    id: Sent<ItemId>,
    if_match: Option<Sent<IfMatch>>,
) -> Result<((Cpf, Uuid), States), Problem> {
    let mut fields = Fields::none();
    fields.query(request, &[]);
    let (cpf, id) = (fields.parameter(cpf), fields.parameter(id));
    let states = if_match.and_then(|if_match| fields.parameter(if_match));
    fields.finish(|| Some(((cpf?.0, id?.0), IfMatch::states(states))))
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
    pub(crate) fn parse(
        request: &Request,
        cpf: Sent<PathCpf>,
        limit: Sent<Limit>,
        after: Sent<After>,
    ) -> Result<(Cpf, Self), Problem> {
        let mut fields = Fields::none();
        let cpf = fields.parameter(cpf);
        let limit = fields.parameter(limit).map_or(PAGE.min(ITEMS_MAX), |limit| limit.0);
        let after = fields.parameter(after).map(|after| after.0);
        fields.query(request, &["limit", "after"]);
        fields.finish(|| Some((cpf?.0, Self { limit, after })))
    }
}
