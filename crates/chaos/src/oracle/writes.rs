//! Every acknowledged write is in the person database, once, and nothing else is.

use std::collections::{BTreeMap, HashSet};

use uuid::Uuid;

use super::stored::{Event, Outbox};
use crate::{
    event::AggregateKey,
    history::History,
    lost_time::LostTime,
    model::Person,
    violation::{Violation, Violations},
};

/// Compares an outbox and the persons beside it with what the clients did. What they did before the last of `losses` is
/// forgotten: the database is as it was found then.
pub(crate) fn check(
    (outbox, persons): (&Outbox, &BTreeMap<Uuid, Person>),
    history: &History,
    losses: &[LostTime],
    violations: &Violations,
) {
    let event =
        |person: &Uuid, version| outbox.events.get(&(("person".to_owned(), person.to_string()), version));
    let mut asked: HashSet<(String, i64)> = HashSet::new();
    for write in &history.acknowledged {
        let is_it = |version: &i64| {
            event(&write.person, *version).is_some_and(|event| {
                event.summary.type_ == write.type_ && event.summary.record == write.record.to_string()
            })
        };
        let of = || format!("person {} version {}: {}", write.person, write.version, write.type_);
        let Some(version) = (write.version..=write.at_most).find(is_it) else {
            let found = event(&write.person, write.version);
            violations.add(Violation::WriteLost, format!("{} was acknowledged; there is {found:?}", of()));
            continue;
        };
        if !asked.insert((write.person.to_string(), version)) {
            violations.add(Violation::WriteWrong, format!("{} was acknowledged twice", of()));
        }
    }
    for ((key, version), event) in &outbox.events {
        let known = (key.1.clone(), *version);
        let is_known =
            asked.contains(&known) || losses.last().is_some_and(|lost| lost.known.contains(&known));
        if key.0 == "person" && !is_known && !is_of_an_operator(key, event, losses) {
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
        // A baseline raises the version, and its client may not have written since.
        let mut person = (*person).clone();
        while event(id, person.version + 1).is_some_and(|event| event.summary.type_ == BASELINE) {
            person.version += 1;
        }
        match persons.get(id) {
            None => violations.add(Violation::WriteLost, format!("person {id} is gone")),
            Some(found) if *found != person => violations.add(
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
    for id in persons.keys().filter(|id| !known.contains_key(id)) {
        violations.add(Violation::WriteDoubled, format!("person {id} is there, and no client knows of it"));
    }
}

/// The event that republishes a person.
const BASELINE: &str = "person.baseline";

/// Whether the procedure after a lost time has written the event: a baseline of each person, and the end of those whom the
/// database does not have.
fn is_of_an_operator(key: &AggregateKey, event: &Event, losses: &[LostTime]) -> bool {
    losses.iter().any(|lost| match event.summary.type_.as_str() {
        BASELINE => lost.person.may_have_written(event.position),
        "person.deleted" => lost.has_ended(&key.1, event.position),
        _ => false,
    })
}
