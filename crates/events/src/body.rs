//! The bodies, as they stand in the JSON: field order here is field order there.

use std::fmt;

use chrono::{DateTime, Utc};
use rust_decimal::Decimal;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Cpf;

/// A person, as `person.new` and `person.changed` carry it and as every item's event repeats it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Person {
    /// Names the aggregate. Another life of the same cpf has another id.
    pub id: Uuid,
    /// The natural key that people know; a JSON number.
    pub cpf: Cpf,
    /// Full name.
    pub name: String,
    /// Postal address, null when unknown.
    pub address: Option<String>,
    /// RFC 3339; midnight UTC when only the day was given.
    pub date_of_birth: DateTime<Utc>,
    /// When the person service stored it.
    pub created_at: DateTime<Utc>,
    /// Whether new items are taken. Absent in events from before there was a status: those persons were active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
}

/// What may be done with a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Everything.
    Active,
    /// No new items are taken; what is there may be changed and deleted.
    Inactive,
}

impl Status {
    /// As it stands in bodies and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Inactive => "inactive",
        }
    }
}

/// What kind of record an item is; the first word of its event types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ItemKind {
    /// What a person earns.
    Income,
    /// What a person owns.
    Asset,
    /// What a person owes.
    Debt,
}

impl ItemKind {
    /// The kind as it stands in event types, tables and paths.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Income => "income",
            Self::Asset => "asset",
            Self::Debt => "debt",
        }
    }
}

impl fmt::Display for ItemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An income, an asset or a debt, self-contained: with the person it belongs to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Item {
    /// The item's own id.
    pub id: Uuid,
    /// The id of `person`.
    pub person_id: Uuid,
    /// What sort of income or asset; a debt has none, and then the field is absent.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub type_: Option<String>,
    /// Exact: at most 15 digits before the point and 4 after it; a JSON number.
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    pub value: Decimal,
    /// When the person service stored it.
    pub created_at: DateTime<Utc>,
    /// The person at the time of this event.
    pub person: Person,
}

/// The body of `person.deleted` and `score.deleted`: the person's id alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deleted {
    /// The id of what is gone.
    pub id: Uuid,
}

/// The body of `person.baseline`: the person with all of their items at the event's version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// The person.
    #[serde(flatten)]
    pub person: Person,
    /// All incomes, in the order of their ids.
    pub incomes: Vec<BaselineItem>,
    /// All assets, likewise.
    pub assets: Vec<BaselineItem>,
    /// All debts, likewise.
    pub debts: Vec<BaselineItem>,
}

/// An item inside a baseline, which does not repeat the person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaselineItem {
    /// The item's own id.
    pub id: Uuid,
    /// As in [`Item::type_`].
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    pub type_: Option<String>,
    /// As in [`Item::value`].
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    pub value: Decimal,
    /// When the person service stored it.
    pub created_at: DateTime<Utc>,
}

/// The body of `score.new` and `score.changed`: one entry of a person's score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// The item's own id, so that a rebuilt read model publishes nothing different.
    pub id: Uuid,
    /// The person's id.
    pub person_id: Uuid,
    /// The person's cpf.
    pub cpf: Cpf,
    /// What kind of record the entry scores.
    #[serde(rename = "type")]
    pub kind: ItemKind,
    /// The item's value.
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    pub value: Decimal,
    /// What the item adds to the score; a debt takes from it.
    pub score: i64,
    /// The person's score after this event: an integer that may exceed 64 bits.
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    pub total: Decimal,
    /// The item's own time.
    pub created_at: DateTime<Utc>,
}

/// The body of `score.baseline`: a person's whole score at the event's version.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreBaseline {
    /// The person's id, which names the aggregate.
    pub id: Uuid,
    /// The person's cpf.
    pub cpf: Cpf,
    /// As in [`Score::total`].
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    pub total: Decimal,
    /// All entries, in the order of their ids.
    pub entries: Vec<ScoreBaselineEntry>,
}

/// An entry inside a baseline, which does not repeat the person.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoreBaselineEntry {
    /// As in [`Score::id`].
    pub id: Uuid,
    /// As in [`Score::kind`].
    #[serde(rename = "type")]
    pub kind: ItemKind,
    /// As in [`Score::value`].
    #[serde(with = "rust_decimal::serde::arbitrary_precision")]
    pub value: Decimal,
    /// As in [`Score::score`].
    pub score: i64,
    /// As in [`Score::created_at`].
    pub created_at: DateTime<Utc>,
}

/// An event of a person's aggregate, parsed by its type.
#[derive(Clone, Debug, PartialEq)]
pub enum PersonEvent {
    /// `person.new`
    New(Person),
    /// `person.changed`
    Changed(Person),
    /// `person.deleted`: the person and all of their items are gone. No event per item follows.
    Deleted(Deleted),
    /// `person.baseline`: the complete state; what the receiver had is replaced.
    Baseline(Box<Baseline>),
    /// `income.new`, `asset.new`, `debt.new`
    ItemNew(ItemKind, Item),
    /// `income.changed`, `asset.changed`, `debt.changed`
    ItemChanged(ItemKind, Item),
    /// `income.deleted`, `asset.deleted`, `debt.deleted`: the record as it was.
    ItemDeleted(ItemKind, Item),
    /// Of any type: the content was erased. It advances the version and does nothing.
    Erased,
    /// A type that this version of the contract does not know. It advances the version and does nothing.
    Unknown,
}

/// Why a body is not what its type promises. Never shows the body, which is personal data.
#[derive(Debug, thiserror::Error)]
#[error("the body does not fit the type {type_}: at line {line}, column {column}: {category}")]
pub struct ParseError {
    type_: String,
    line: usize,
    column: usize,
    category: &'static str,
}

#[derive(Deserialize)]
struct ErasedMark {
    #[serde(default)]
    erased: bool,
}

impl PersonEvent {
    /// Parses an event's body by its type (the routing key).
    pub fn parse(type_: &str, body: &[u8]) -> Result<Self, ParseError> {
        fn json<'a, T: Deserialize<'a>>(type_: &str, body: &'a [u8]) -> Result<T, ParseError> {
            // serde_json's own message quotes values, so the error has only the position and the category.
            serde_json::from_slice(body).map_err(|e| ParseError {
                type_: type_.to_owned(),
                line: e.line(),
                column: e.column(),
                category: match e.classify() {
                    serde_json::error::Category::Io => "unreadable",
                    serde_json::error::Category::Syntax => "not JSON",
                    serde_json::error::Category::Data => "a field is missing or of the wrong type",
                    serde_json::error::Category::Eof => "the JSON ends too early",
                },
            })
        }
        if json::<ErasedMark>(type_, body)?.erased {
            return Ok(Self::Erased);
        }
        let item = |kind, wrap: fn(ItemKind, Item) -> Self| Ok(wrap(kind, json(type_, body)?));
        match type_ {
            "person.new" => Ok(Self::New(json(type_, body)?)),
            "person.changed" => Ok(Self::Changed(json(type_, body)?)),
            "person.deleted" => Ok(Self::Deleted(json(type_, body)?)),
            "person.baseline" => Ok(Self::Baseline(json(type_, body)?)),
            "income.new" => item(ItemKind::Income, Self::ItemNew),
            "income.changed" => item(ItemKind::Income, Self::ItemChanged),
            "income.deleted" => item(ItemKind::Income, Self::ItemDeleted),
            "asset.new" => item(ItemKind::Asset, Self::ItemNew),
            "asset.changed" => item(ItemKind::Asset, Self::ItemChanged),
            "asset.deleted" => item(ItemKind::Asset, Self::ItemDeleted),
            "debt.new" => item(ItemKind::Debt, Self::ItemNew),
            "debt.changed" => item(ItemKind::Debt, Self::ItemChanged),
            "debt.deleted" => item(ItemKind::Debt, Self::ItemDeleted),
            _ => Ok(Self::Unknown),
        }
    }
}
