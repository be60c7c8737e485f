//! Entries of a score, their changes, and the events that publish them.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use events::{BaselineItem, Cpf, Deleted, Item, ItemKind, Score, ScoreBaseline};
use rust_decimal::Decimal;
use serde::Serialize;
use serde_json::{Map, Value, value::RawValue};
use uuid::Uuid;

use super::refusal::Refusal;
use crate::score;

/// What one item adds to its person's score.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// The item's id.
    pub(crate) id: Uuid,
    pub(crate) kind: ItemKind,
    pub(crate) value: Decimal,
    pub(crate) score: i64,
    pub(crate) created_at: DateTime<Utc>,
}

impl Entry {
    pub(crate) fn of(kind: ItemKind, item: &Item) -> Result<Self, Refusal> {
        Self::new(kind, item.id, item.value, item.created_at)
    }

    pub(crate) fn of_baseline(kind: ItemKind, item: &BaselineItem) -> Result<Self, Refusal> {
        Self::new(kind, item.id, item.value, item.created_at)
    }

    fn new(kind: ItemKind, id: Uuid, value: Decimal, created_at: DateTime<Utc>) -> Result<Self, Refusal> {
        let score = score::of(kind, value).ok_or(Refusal::Value)?;
        Ok(Self { id, kind, value, score, created_at })
    }
}

/// The change of one entry.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    New(Entry),
    /// Its content has changed, or its person's cpf.
    Changed {
        before: Entry,
        after: Entry,
    },
    Gone(Entry),
}

impl Change {
    fn id(&self) -> Uuid {
        match self {
            Self::New(entry) | Self::Changed { after: entry, .. } | Self::Gone(entry) => entry.id,
        }
    }

    /// The difference that it makes to the total.
    pub(crate) fn difference(&self) -> Decimal {
        match self {
            Self::New(after) => after.score.into(),
            Self::Changed { before, after } => Decimal::from(after.score) - Decimal::from(before.score),
            Self::Gone(before) => -Decimal::from(before.score),
        }
    }

    /// Its event's type and entry. A deleted entry is published a last time, with value and score 0.
    pub(crate) fn published(self) -> (&'static str, Entry) {
        match self {
            Self::New(entry) => (events::SCORE_NEW, entry),
            Self::Changed { after, .. } => (events::SCORE_CHANGED, after),
            Self::Gone(entry) => (events::SCORE_CHANGED, Entry { value: Decimal::ZERO, score: 0, ..entry }),
        }
    }
}

/// The changes from the entries `before` to those `after`, in the order of their ids, which is the order of the items.
/// With `all`, unchanged entries too: each entry's body contains the cpf.
pub(crate) fn changes(
    before: &BTreeMap<Uuid, Entry>,
    after: &BTreeMap<Uuid, Entry>,
    all: bool,
) -> Vec<Change> {
    let gone = before.values().filter(|entry| !after.contains_key(&entry.id)).cloned().map(Change::Gone);
    let now = after.values().filter_map(|after| match before.get(&after.id) {
        None => Some(Change::New(after.clone())),
        Some(before) if all || before != after => {
            Some(Change::Changed { before: before.clone(), after: after.clone() })
        }
        Some(_) => None,
    });
    let mut changes: Vec<Change> = gone.chain(now).collect();
    changes.sort_by_key(Change::id);
    changes
}

/// An event of the aggregate `score/<person>` to publish, without its version.
#[derive(Clone, Debug)]
pub(crate) struct ScoreEvent {
    pub(crate) person: Uuid,
    pub(crate) type_: &'static str,
    pub(crate) payload: Box<RawValue>,
    pub(crate) headers: Option<Map<String, Value>>,
}

impl ScoreEvent {
    /// The entry's present score, and the person's `total` with it.
    pub(crate) fn entry(
        type_: &'static str,
        person: Uuid,
        cpf: Cpf,
        entry: &Entry,
        total: Decimal,
        trace: Option<&str>,
    ) -> Result<Self, Refusal> {
        let Entry { id, kind, value, score, created_at } = *entry;
        let body = Score { id, person_id: person, cpf, kind, value, score, total, created_at };
        Self::new(person, type_, &body, trace)
    }

    /// The person was deleted, and the score with it.
    pub(crate) fn deleted(person: Uuid, trace: Option<&str>) -> Result<Self, Refusal> {
        Self::new(person, events::SCORE_DELETED, &Deleted { id: person }, trace)
    }

    /// The whole score, as an operator asked for it.
    pub(crate) fn baseline(body: &ScoreBaseline) -> Result<Self, Refusal> {
        let event = Self::new(body.id, events::SCORE_BASELINE, body, None)?;
        Ok(Self { headers: Some(Map::from_iter([("baseline".to_owned(), true.into())])), ..event })
    }

    /// In the trace of the event that caused it.
    fn new(
        person: Uuid,
        type_: &'static str,
        body: &impl Serialize,
        trace: Option<&str>,
    ) -> Result<Self, Refusal> {
        let payload =
            serde_json::to_string(body).and_then(RawValue::from_string).map_err(|_| Refusal::Json)?;
        let headers = trace.map(|trace| Map::from_iter([("traceparent".to_owned(), trace.into())]));
        Ok(Self { person, type_, payload, headers })
    }
}
