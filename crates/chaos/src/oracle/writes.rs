//! Every acknowledged write is in the person database, once, and nothing else is.

use std::collections::{BTreeMap, HashSet};

use uuid::Uuid;

use super::stored::Stored;
use crate::{
    history::History,
    model::Person,
    violation::{Violation, Violations},
};

pub(crate) fn check(stored: &Stored, history: &History, violations: &Violations) {
    let mut asked: HashSet<(String, i64)> = HashSet::new();
    for write in &history.acknowledged {
        let key = ("person".to_owned(), write.person.to_string());
        let event = stored.person.events.get(&(key.clone(), write.version));
        let is_it = event.is_some_and(|event| {
            event.summary.type_ == write.type_ && event.summary.record == write.record.to_string()
        });
        let of = || format!("person {} version {}: {}", write.person, write.version, write.type_);
        if !is_it {
            violations.add(Violation::WriteLost, format!("{} was acknowledged; there is {event:?}", of()));
        }
        if !asked.insert((key.1, write.version)) {
            violations.add(Violation::WriteWrong, format!("{} was acknowledged twice", of()));
        }
    }
    for ((key, version), event) in &stored.person.events {
        if key.0 == "person" && !asked.contains(&(key.1.clone(), *version)) {
            violations.add(
                Violation::WriteDoubled,
                format!(
                    "person {} version {version}: {} that no client knows of",
                    key.1, event.summary.type_
                ),
            );
        }
    }

    let known: BTreeMap<Uuid, &Person> = history.persons.iter().map(|person| (person.id, person)).collect();
    for (id, person) in &known {
        match stored.persons.get(id) {
            None => violations.add(Violation::WriteLost, format!("person {id} is gone")),
            Some(found) if found != *person => violations.add(
                Violation::WriteWrong,
                format!(
                    "person {id} at version {} with {} items is not the one that its client knows, at version {} \
                     with {} items",
                    found.version,
                    found.items.len(),
                    person.version,
                    person.items.len()
                ),
            ),
            Some(_) => {}
        }
    }
    for id in stored.persons.keys().filter(|id| !known.contains_key(id)) {
        violations.add(Violation::WriteDoubled, format!("person {id} is there, and no client knows of it"));
    }
}
