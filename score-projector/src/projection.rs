//! What each event of a person means for the score, and what the score service publishes of it.

use std::collections::BTreeMap;

use events::{BaselineItem, Deleted, Item, Kind, PersonEvent, Score};
use inbox::{Event, Failure, Handler};
use outbox::{AppendError, NewEvent, Waker};
use rust_decimal::Decimal;
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::{Postgres, Transaction};
use uuid::Uuid;

use crate::{
    score,
    store::{self, Entry, Person},
};

type Tx<'a, 'tx> = &'a mut Transaction<'tx, Postgres>;

/// Applies a person's events to the read model.
///
/// Every event sets the person's version, so that a reader's token is answered, whether or not the
/// event touches the score. What changes in the score is published as events of the aggregate
/// `score/<person id>`, by one rule:
///
/// - `score.new`: an entry came. Its body is the entry.
/// - `score.changed`: what an entry adds has changed. An entry whose item is gone is published a last
///   time, with value and score 0: it adds nothing any more.
/// - `score.deleted`: the whole aggregate has ended, because its person is gone. Its body is the
///   person's id alone, as `person.deleted`'s is, and it is published once, for all of the entries.
///
/// The last is not used for single entries because `<aggregate type>.deleted` lets a subscriber jump
/// over what it misses: only an end may do that.
#[derive(Debug)]
pub struct Projection {
    relay: Waker,
    readers: Waker,
}

impl Projection {
    /// `relay` is told of the score service's own events, `readers` that the read model has changed.
    pub fn new(relay: Waker, readers: Waker) -> Self {
        Self { relay, readers }
    }
}

impl Handler for Projection {
    async fn handle(&self, event: &Event, tx: &mut Transaction<'_, Postgres>) -> Result<(), Failure> {
        let id = Uuid::try_parse(&event.aggregate_id)
            .map_err(|_| Failure::poison("the aggregate's id is not a person's UUID"))?;
        let body = if event.is_erased() {
            PersonEvent::Erased
        } else {
            PersonEvent::parse(&event.type_, &event.payload).map_err(|e| Failure::poison(e.to_string()))?
        };
        if subject(&body).is_some_and(|subject| subject != id) {
            return Err(Failure::poison("the body is about another person than the aggregate's id"));
        }
        match body {
            PersonEvent::New(person) => {
                if !store::insert_person(tx, &person, event.version).await? {
                    return Err(Failure::poison("the read model knows this person already"));
                }
                Ok(())
            }
            PersonEvent::Changed(person) => {
                let known = known(tx, id).await?;
                // Each entry's body carries the cpf.
                let entries =
                    if known.cpf == person.cpf { Vec::new() } else { store::entries(tx, id).await? };
                let changes = entries.into_iter().map(|e| Change { before: Some(e.clone()), after: Some(e) });
                change(tx, event, Person { cpf: person.cpf, ..known }, changes.collect()).await
            }
            PersonEvent::Deleted(_) => delete(tx, event, id).await,
            PersonEvent::Baseline(baseline) => {
                store::insert_person(tx, &baseline.person, event.version).await?;
                let known = known(tx, id).await?;
                let cpf_changed = known.cpf != baseline.person.cpf;
                let mut before = by_id(store::entries(tx, id).await?);
                let after = [
                    (Kind::Income, &baseline.incomes),
                    (Kind::Asset, &baseline.assets),
                    (Kind::Debt, &baseline.debts),
                ];
                let mut changes = Vec::new();
                for (kind, items) in after {
                    for item in items {
                        let after = entry_of_baseline(kind, item)?;
                        let before = before.remove(&after.id);
                        if cpf_changed || before.as_ref() != Some(&after) {
                            changes.push(Change { before, after: Some(after) });
                        }
                    }
                }
                changes.extend(before.into_values().map(|e| Change { before: Some(e), after: None }));
                changes.sort_by_key(Change::id);
                change(tx, event, Person { cpf: baseline.person.cpf, ..known }, changes).await
            }
            PersonEvent::ItemNew(kind, item) => {
                let person = known(tx, id).await?;
                if store::entry(tx, id, item.id).await?.is_some() {
                    return Err(Failure::poison("the read model knows this item already"));
                }
                let after = Some(entry_of(kind, &item)?);
                change(tx, event, person, vec![Change { before: None, after }]).await
            }
            PersonEvent::ItemChanged(kind, item) => {
                let person = known(tx, id).await?;
                let before = known_entry(tx, id, kind, &item).await?;
                let after = entry_of(kind, &item)?;
                // The item's own type is no part of the score.
                let differs = before != after;
                let changes = differs.then_some(Change { before: Some(before), after: Some(after) });
                change(tx, event, person, changes.into_iter().collect()).await
            }
            PersonEvent::ItemDeleted(kind, item) => {
                let person = known(tx, id).await?;
                let before = Some(known_entry(tx, id, kind, &item).await?);
                change(tx, event, person, vec![Change { before, after: None }]).await
            }
            PersonEvent::Erased | PersonEvent::Unknown => {
                Ok(store::update_version(tx, id, event.version).await?)
            }
        }
    }

    fn committed(&self) {
        self.relay.wake();
        self.readers.wake();
    }
}

/// Whom a body is about.
fn subject(body: &PersonEvent) -> Option<Uuid> {
    match body {
        PersonEvent::New(person) | PersonEvent::Changed(person) => Some(person.id),
        PersonEvent::Deleted(deleted) => Some(deleted.id),
        PersonEvent::Baseline(baseline) => Some(baseline.person.id),
        PersonEvent::ItemNew(_, item)
        | PersonEvent::ItemChanged(_, item)
        | PersonEvent::ItemDeleted(_, item) => Some(item.person_id),
        PersonEvent::Erased | PersonEvent::Unknown => None,
    }
}

/// Versions without holes begin with the person, so this cannot happen in order.
async fn known(tx: Tx<'_, '_>, id: Uuid) -> Result<Person, Failure> {
    store::lock_person(tx, id)
        .await?
        .ok_or_else(|| Failure::poison("the read model does not know this person"))
}

async fn known_entry(tx: Tx<'_, '_>, person: Uuid, kind: Kind, item: &Item) -> Result<Entry, Failure> {
    store::entry(tx, person, item.id)
        .await?
        .filter(|entry| entry.kind == kind)
        .ok_or_else(|| Failure::poison("the read model does not know this item"))
}

fn entry_of(kind: Kind, item: &Item) -> Result<Entry, Failure> {
    let score = worth(kind, item.value)?;
    Ok(Entry { id: item.id, kind, value: item.value, score, created_at: item.created_at })
}

fn entry_of_baseline(kind: Kind, item: &BaselineItem) -> Result<Entry, Failure> {
    let score = worth(kind, item.value)?;
    Ok(Entry { id: item.id, kind, value: item.value, score, created_at: item.created_at })
}

fn worth(kind: Kind, value: Decimal) -> Result<i64, Failure> {
    score::of(kind, value)
        .ok_or_else(|| Failure::poison("a value is negative or does not fit 15 digits and 4 decimals"))
}

fn by_id(entries: Vec<Entry>) -> BTreeMap<Uuid, Entry> {
    entries.into_iter().map(|entry| (entry.id, entry)).collect()
}

/// What happens to one entry. At least one of the two is there.
struct Change {
    before: Option<Entry>,
    after: Option<Entry>,
}

impl Change {
    fn id(&self) -> Option<Uuid> {
        self.after.as_ref().or(self.before.as_ref()).map(|entry| entry.id)
    }
}

/// Writes the changes of a person's entries, publishes each with the total after it, and brings the
/// person to the event's version.
async fn change(
    tx: Tx<'_, '_>,
    event: &Event,
    mut person: Person,
    changes: Vec<Change>,
) -> Result<(), Failure> {
    let gone: Vec<Uuid> = changes
        .iter()
        .filter(|change| change.after.is_none())
        .filter_map(|change| change.before.as_ref().map(|before| before.id))
        .collect();
    store::delete_entries(tx, person.id, &gone).await?;
    let written: Vec<&Entry> = changes.iter().filter_map(|change| change.after.as_ref()).collect();
    if !store::put_entries(tx, person.id, &written).await? {
        return Err(Failure::poison("the read model knows this item as another person's"));
    }

    let mut publish = Vec::with_capacity(changes.len());
    for Change { before, after } in changes {
        let score = |entry: &Option<Entry>| Decimal::from(entry.as_ref().map_or(0, |entry| entry.score));
        person.total += score(&after) - score(&before);
        person.score_version += 1;
        let type_ = if before.is_some() { events::SCORE_CHANGED } else { events::SCORE_NEW };
        let gone = |before: Entry| Entry { value: Decimal::ZERO, score: 0, ..before };
        let Some(entry) = after.or(before.map(gone)) else { continue };
        let body = Score {
            id: entry.id,
            person_id: person.id,
            cpf: person.cpf,
            kind: entry.kind,
            value: entry.value,
            score: entry.score,
            total: person.total,
            created_at: entry.created_at,
        };
        publish.push(new_event(event, person.id, person.score_version, type_, &body)?);
    }
    store::update_person(tx, &person, event.version).await?;
    append(tx, &publish).await
}

/// Removes a person with all entries. A person of whom no score was published ends in silence.
async fn delete(tx: Tx<'_, '_>, event: &Event, id: Uuid) -> Result<(), Failure> {
    // A deletion may follow any version, so also the very first thing that is heard of a person.
    let Some(person) = store::lock_person(tx, id).await? else { return Ok(()) };
    store::delete_person(tx, id).await?;
    if person.score_version == 0 {
        return Ok(());
    }
    let version = person.score_version + 1;
    append(tx, &[new_event(event, id, version, events::SCORE_DELETED, &Deleted { id })?]).await
}

/// An event of `score/<person>`, in the trace of the one that caused it.
fn new_event(
    cause: &Event,
    person: Uuid,
    version: i64,
    type_: &'static str,
    body: &impl Serialize,
) -> Result<NewEvent, Failure> {
    let payload = serde_json::to_string(body)
        .and_then(RawValue::from_string)
        .map_err(|_| Failure::poison("the score cannot be written as JSON"))?;
    let headers = cause
        .traceparent()
        .map(|trace| serde_json::Map::from_iter([("traceparent".to_owned(), trace.into())]));
    Ok(NewEvent {
        id: Uuid::now_v7(),
        aggregate_type: events::AGGREGATE_SCORE,
        aggregate_id: person.to_string(),
        version,
        type_,
        payload,
        headers,
    })
}

async fn append(tx: Tx<'_, '_>, events: &[NewEvent]) -> Result<(), Failure> {
    outbox::append(tx, events).await.map_err(|error| match error {
        AppendError::VersionTaken => Failure::poison("the score's next version is in the outbox already"),
        AppendError::Unfit { .. } => Failure::poison(error.to_string()),
        AppendError::Database(error) => error.into(),
    })
}
