//! The rows of the read model that a batch of events needs.

use std::collections::BTreeSet;

use events::PersonEvent;
use uuid::Uuid;

use super::{cause::Cause, slice::Slice};

/// Persons and entries to load, each in the order in which their rows are locked.
#[derive(Debug, Default)]
pub(crate) struct Needs {
    pub(crate) persons: BTreeSet<Uuid>,
    /// Deleted persons: whether an event of their score was ever published matters.
    pub(crate) ended: BTreeSet<Uuid>,
    /// Entries by their own id, of any person.
    pub(crate) entries: BTreeSet<Uuid>,
    /// Persons of whom all entries are needed.
    pub(crate) whole: BTreeSet<Uuid>,
}

impl Needs {
    pub(crate) fn of(causes: &[Cause]) -> Self {
        let mut needs = Self::default();
        for cause in causes {
            needs.persons.insert(cause.person);
            if cause.begins_anew {
                needs.whole.insert(cause.person);
                if !matches!(cause.body, PersonEvent::New(_) | PersonEvent::Baseline(_)) {
                    needs.ended.insert(cause.person);
                }
            }
            match &cause.body {
                PersonEvent::Deleted(_) => {
                    needs.ended.insert(cause.person);
                }
                PersonEvent::Baseline(baseline) => {
                    needs.whole.insert(cause.person);
                    let items = [&baseline.incomes, &baseline.assets, &baseline.debts];
                    needs.entries.extend(items.into_iter().flatten().map(|item| item.id));
                }
                PersonEvent::ItemNew(_, item)
                | PersonEvent::ItemChanged(_, item)
                | PersonEvent::ItemDeleted(_, item) => {
                    needs.entries.insert(item.id);
                }
                PersonEvent::New(_)
                | PersonEvent::Changed(_)
                | PersonEvent::Erased
                | PersonEvent::Unknown => {}
            }
        }
        needs
    }

    /// Once the persons are loaded: a cpf that changes concerns every entry, as each one's body carries it.
    pub(crate) fn after_persons(&mut self, causes: &[Cause], loaded: &Slice) {
        for cause in causes {
            if let PersonEvent::Changed(person) = &cause.body
                && loaded.person(cause.person).is_some_and(|known| known.cpf != person.cpf)
            {
                self.whole.insert(cause.person);
            }
        }
    }
}
