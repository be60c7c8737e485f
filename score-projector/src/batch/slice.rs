//! Applies each event of a person to the score, in memory.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use events::{Baseline, Cpf, Item, ItemKind, PersonEvent};
use rust_decimal::Decimal;
use uuid::Uuid;

use super::{
    cause::Cause,
    entry::{Change, Entry, ScoreEvent, changes},
    refusal::Refusal,
};

/// A person as the read model has them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Person {
    pub(crate) id: Uuid,
    pub(crate) cpf: Cpf,
    pub(crate) created_at: DateTime<Utc>,
    /// The person's own version.
    pub(crate) version: i64,
    /// The score.
    pub(crate) total: Decimal,
}

/// The part of the read model that a batch of events touches, in memory: the persons, and of their
/// entries those that the events need ([`Needs`](super::needs::Needs)). Events are applied to it one
/// after the other; what it has become is written at once.
#[derive(Debug, Default)]
pub(crate) struct Slice {
    persons: BTreeMap<Uuid, Person>,
    entries: HashMap<Uuid, BTreeMap<Uuid, Entry>>,
    /// The person of each entry, also when the person is not in the slice.
    owners: HashMap<Uuid, Uuid>,
    /// Persons of whose score an event was ever published.
    published: BTreeSet<Uuid>,
    /// The events to publish, in order.
    events: Vec<ScoreEvent>,
    written: Written,
}

/// The differences to the database. Deletions are written first, so that an id may be used again in the same batch.
#[derive(Debug, Default)]
struct Written {
    /// Deleted with their entries. A person that the same batch created is not in the database.
    persons_gone: BTreeSet<Uuid>,
    /// New or changed.
    persons: BTreeSet<Uuid>,
    entries_gone: BTreeSet<Uuid>,
    /// New or changed.
    entries: BTreeSet<Uuid>,
}

impl Slice {
    pub(crate) fn load_person(&mut self, person: Person) {
        self.persons.insert(person.id, person);
    }

    pub(crate) fn load_entry(&mut self, person: Uuid, entry: Entry) {
        self.owners.insert(entry.id, person);
        self.entries.entry(person).or_default().insert(entry.id, entry);
    }

    pub(crate) fn load_published(&mut self, persons: BTreeSet<Uuid>) {
        self.published.extend(persons);
    }

    pub(crate) fn person(&self, id: Uuid) -> Option<&Person> {
        self.persons.get(&id)
    }

    /// An entry and its person.
    fn entry(&self, id: Uuid) -> Option<(Uuid, &Entry)> {
        let owner = *self.owners.get(&id)?;
        Some((owner, self.entries.get(&owner)?.get(&id)?))
    }

    /// The events to publish, in order.
    pub(crate) fn take_events(&mut self) -> Vec<ScoreEvent> {
        std::mem::take(&mut self.events)
    }

    pub(crate) fn persons_gone(&self) -> Vec<Uuid> {
        self.written.persons_gone.iter().copied().collect()
    }

    /// New and changed persons.
    pub(crate) fn persons_written(&self) -> Vec<&Person> {
        self.written.persons.iter().filter_map(|id| self.persons.get(id)).collect()
    }

    pub(crate) fn entries_gone(&self) -> Vec<Uuid> {
        self.written.entries_gone.iter().copied().collect()
    }

    /// New and changed entries with their persons.
    pub(crate) fn entries_written(&self) -> Vec<(Uuid, &Entry)> {
        self.written.entries.iter().filter_map(|id| self.entry(*id)).collect()
    }

    /// Applies one event. After a refusal the slice must not be used.
    pub(crate) fn apply(&mut self, cause: &Cause) -> Result<(), Refusal> {
        let id = cause.person;
        if cause.begins_anew {
            match &cause.body {
                PersonEvent::New(person) => return self.begin_anew(cause, person),
                // Each of these replaces the state in any case.
                PersonEvent::Baseline(_) | PersonEvent::Deleted(_) => {}
                _ => self.delete(cause)?,
            }
        }
        match &cause.body {
            PersonEvent::New(person) => {
                if self.persons.contains_key(&id) {
                    return Err(Refusal::PersonKnown);
                }
                self.insert(person, cause.version);
                Ok(())
            }
            PersonEvent::Changed(person) => {
                let known = self.known(id)?;
                // Each entry's body carries the cpf.
                let again = known.cpf != person.cpf;
                let entries = self.entries.get(&id).filter(|_| again).cloned().unwrap_or_default();
                self.known(id)?.cpf = person.cpf;
                self.change(cause, changes(&entries, &entries, true))
            }
            PersonEvent::Deleted(_) => self.delete(cause),
            PersonEvent::Baseline(baseline) => self.replace(cause, baseline),
            PersonEvent::ItemNew(kind, item) => {
                self.known(id)?;
                if self.entry_of(id, item.id)?.is_some() {
                    return Err(Refusal::ItemKnown);
                }
                self.change(cause, vec![Change::New(Entry::of(*kind, item)?)])
            }
            PersonEvent::ItemChanged(kind, item) => {
                let before = self.known_entry(id, *kind, item)?;
                let after = Entry::of(*kind, item)?;
                // The item's own type is no part of the score.
                let differs = before != after;
                let change = differs.then_some(Change::Changed { before, after });
                self.change(cause, change.into_iter().collect())
            }
            PersonEvent::ItemDeleted(kind, item) => {
                let before = self.known_entry(id, *kind, item)?;
                self.change(cause, vec![Change::Gone(before)])
            }
            // The person may be unknown.
            PersonEvent::Erased | PersonEvent::Unknown => {
                self.raise(id, cause.version);
                Ok(())
            }
        }
    }

    fn insert(&mut self, person: &events::Person, version: i64) {
        let (id, cpf, created_at) = (person.id, person.cpf, person.created_at);
        self.persons.insert(id, Person { id, cpf, created_at, version, total: Decimal::ZERO });
        self.written.persons.insert(id);
    }

    /// Deletes a person with all entries. `score.deleted` is published only when an event of the score was.
    fn delete(&mut self, cause: &Cause) -> Result<(), Refusal> {
        let id = cause.person;
        // A deletion may follow any version, so it may be the first event of a person.
        if self.persons.remove(&id).is_none() {
            return Ok(());
        }
        for entry in self.entries.remove(&id).unwrap_or_default().into_keys() {
            self.owners.remove(&entry);
            self.written.entries.remove(&entry);
        }
        self.written.persons.remove(&id);
        self.written.persons_gone.insert(id);
        if self.published.contains(&id) {
            self.events.push(ScoreEvent::deleted(id, cause.trace.as_deref())?);
        }
        Ok(())
    }

    /// Replaces a person of a history that was lost by a new one without items. The score goes on.
    fn begin_anew(&mut self, cause: &Cause, person: &events::Person) -> Result<(), Refusal> {
        let before = self.entries.get(&cause.person).cloned().unwrap_or_default();
        if self.persons.contains_key(&cause.person) {
            self.change(cause, changes(&before, &BTreeMap::new(), false))?;
            // The row is written anew, with the time of creation.
            self.written.persons_gone.insert(cause.person);
        }
        self.insert(person, cause.version);
        Ok(())
    }

    /// Replaces the complete state, perhaps as the person's first event.
    fn replace(&mut self, cause: &Cause, baseline: &Baseline) -> Result<(), Refusal> {
        let id = cause.person;
        if !self.persons.contains_key(&id) {
            self.insert(&baseline.person, cause.version);
        }
        let known = self.known(id)?;
        let cpf_changed = known.cpf != baseline.person.cpf;
        known.cpf = baseline.person.cpf;
        let items = [
            (ItemKind::Income, &baseline.incomes),
            (ItemKind::Asset, &baseline.assets),
            (ItemKind::Debt, &baseline.debts),
        ];
        let mut after = BTreeMap::new();
        for (kind, items) in items {
            for item in items {
                self.entry_of(id, item.id)?;
                after.insert(item.id, Entry::of_baseline(kind, item)?);
            }
        }
        let before = self.entries.get(&id).cloned().unwrap_or_default();
        self.change(cause, changes(&before, &after, cpf_changed))
    }

    /// Applies changes of a person's entries, publishes each with the total after it, and sets the person to the event's
    /// version.
    fn change(&mut self, cause: &Cause, changes: Vec<Change>) -> Result<(), Refusal> {
        let id = cause.person;
        let Person { cpf, mut total, .. } = *self.known(id)?;
        for change in changes {
            match &change {
                Change::New(after) | Change::Changed { after, .. } => {
                    self.written.entries.insert(after.id);
                    self.load_entry(id, after.clone());
                }
                Change::Gone(before) => {
                    self.written.entries.remove(&before.id);
                    self.written.entries_gone.insert(before.id);
                    self.owners.remove(&before.id);
                    self.entries.entry(id).or_default().remove(&before.id);
                }
            }
            total += change.difference();
            let (type_, entry) = change.published();
            self.events.push(ScoreEvent::entry(type_, id, cpf, &entry, total, cause.trace.as_deref())?);
            self.published.insert(id);
        }
        self.known(id)?.total = total;
        self.raise(id, cause.version);
        Ok(())
    }

    fn raise(&mut self, id: Uuid, version: i64) {
        let Some(person) = self.persons.get_mut(&id) else { return };
        person.version = version;
        self.written.persons.insert(id);
    }

    /// A chain without holes begins with the person, so a person is unknown only after the deletion.
    fn known(&mut self, id: Uuid) -> Result<&mut Person, Refusal> {
        self.persons.get_mut(&id).ok_or(Refusal::PersonUnknown)
    }

    /// An entry of this person, if there is one. An item never moves to another person.
    fn entry_of(&self, person: Uuid, id: Uuid) -> Result<Option<&Entry>, Refusal> {
        match self.entry(id) {
            Some((owner, _)) if owner != person => Err(Refusal::ItemOfAnother),
            found => Ok(found.map(|(_, entry)| entry)),
        }
    }

    fn known_entry(&mut self, person: Uuid, kind: ItemKind, item: &Item) -> Result<Entry, Refusal> {
        self.known(person)?;
        // An entry of another person counts as unknown.
        let entry = self.entry_of(person, item.id).ok().flatten().filter(|entry| entry.kind == kind);
        entry.cloned().ok_or(Refusal::ItemUnknown)
    }
}

#[cfg(test)]
mod tests;
