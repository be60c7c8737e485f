//! What a client may send. Parsing is strict: a field that is missing, unknown, given twice, of the
//! wrong type or against its rule is named, all of them at once, and then nothing is stored.

mod body;
mod fields;
mod place;
mod rules;

use chrono::{DateTime, Utc};
use events::{Cpf, Kind};
use rust_decimal::Decimal;
use service::{documentation::Sent, problem::Problem};

use self::fields::Fields;
pub(crate) use self::{body::Body, place::PathCpf};

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
    /// Parses the body of `POST /person`.
    pub fn parse(body: &[u8]) -> Result<Self, Problem> {
        let mut fields = Fields::read(body)?;
        let cpf = fields.required("cpf", rules::cpf);
        let name = fields.required("name", |raw| rules::text(raw, 200));
        let address = fields.optional("address", |raw| rules::text(raw, 500));
        let date_of_birth = fields.required("date_of_birth", rules::date_of_birth);
        fields.finish(|| Some(Self { cpf: cpf?, name: name?, address, date_of_birth: date_of_birth? }))
    }
}

/// An income, an asset or a debt as a client sends it.
#[derive(Clone, Debug)]
pub struct NewItem {
    /// From the path.
    pub kind: Kind,
    /// 1 to 100 characters; a debt has none.
    pub type_: Option<String>,
    /// Not negative, at most 15 digits before the point and 4 after it.
    pub value: Decimal,
}

impl NewItem {
    /// Parses path and body of `POST /person/{cpf}/<kind>`.
    pub(crate) fn parse(kind: Kind, cpf: Sent<PathCpf>, body: &[u8]) -> Result<(PathCpf, Self), Problem> {
        let mut fields = Fields::read(body)?;
        let cpf = fields.parameter(cpf);
        let type_ = match kind {
            Kind::Income | Kind::Asset => fields.required("type", |raw| rules::text(raw, 100)),
            Kind::Debt => None,
        };
        let value = fields.required("value", rules::value);
        fields.finish(|| Some((cpf?, Self { kind, type_, value: value? })))
    }
}
