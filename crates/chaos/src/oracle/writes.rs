//! Every acknowledged write is in the person database, once, and nothing else is.

use std::collections::{BTreeMap, HashSet};

use uuid::Uuid;

use super::stored::Stored;
use crate::{
    history::History,
    model::Person,
    verdict::{Charge, Findings},
};

pub(crate) fn judge(stored: &Stored, history: &History, findings: &Findings) {
    let mut asked: HashSet<(String, i64)> = HashSet::new();
    for write in &history.told.acknowledged {
        let key = ("person".to_owned(), write.person.to_string());
        let event = stored.person.events.get(&(key.clone(), write.version));
        let is_it = event.is_some_and(|event| {
            event.seen.type_ == write.type_ && event.seen.record == write.record.to_string()
        });
        let of = || format!("person {} version {}: {}", write.person, write.version, write.type_);
        if !is_it {
            findings.add(Charge::WriteLost, format!("{} was acknowledged; there is {event:?}", of()));
        }
        if !asked.insert((key.1, write.version)) {
            findings.add(Charge::WriteWrong, format!("{} was acknowledged twice", of()));
        }
    }
    for ((key, version), event) in &stored.person.events {
        if key.0 == "person" && !asked.contains(&(key.1.clone(), *version)) {
            findings.add(
                Charge::WriteDoubled,
                format!("person {} version {version}: {} that no client knows of", key.1, event.seen.type_),
            );
        }
    }

    let known: BTreeMap<Uuid, &Person> = history.persons.iter().map(|person| (person.id, person)).collect();
    for (id, person) in &known {
        match stored.persons.get(id) {
            None => findings.add(Charge::WriteLost, format!("person {id} is gone")),
            Some(found) if found != *person => findings.add(
                Charge::WriteWrong,
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
        findings.add(Charge::WriteDoubled, format!("person {id} is there, and no client knows of it"));
    }
}
