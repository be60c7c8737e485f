//! The inbox is at the versions of the source, the read model follows from the person database, and the events of the scores
//! add up to it.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use super::stored::{Event, ScoreRow, Stored};
use crate::{
    event::AggregateKey,
    lost_time::LostTime,
    model::Person,
    violation::{Violation, Violations},
};

pub(crate) fn check(stored: &Stored, losses: &[LostTime], violations: &Violations) {
    inbox(stored, losses, violations);
    read_model(stored, violations);
    scores(stored, violations);
    erased(stored, violations);
}

fn inbox(stored: &Stored, losses: &[LostTime], violations: &Violations) {
    let newest = stored.person.incarnation;
    let began = losses.last().map_or(0, |lost| lost.person.from_position);
    let mut applied: HashMap<&AggregateKey, (i64, Option<Uuid>)> = HashMap::new();
    for row in &stored.applied {
        // What an earlier incarnation had of it has ended.
        if row.source == "person" && row.incarnation < newest && row.ended {
            continue;
        }
        let is_newest = row.source == "person" && row.incarnation == newest;
        if !is_newest || applied.insert(&row.key, (row.version, row.last_event)).is_some() {
            let example = format!("a chain of the source {}~{}: {:?}", row.source, row.incarnation, row.key);
            violations.add(Violation::InboxBehind, example);
        }
    }
    for (key, (last, _)) in stored.person.chains.iter().filter(|(key, _)| key.0 == "person") {
        let event = stored.person.events.get(&(key.clone(), *last));
        // It had ended before the incarnation began, so nothing of it is published anew.
        if event.is_some_and(|event| event.position <= began && event.summary.type_ == "person.deleted") {
            continue;
        }
        let event = event.map(|event| event.summary.id);
        let at = applied.remove(key);
        if at != Some((*last, event)) {
            let at = at.map(|(version, _)| version);
            violations.add(Violation::InboxBehind, format!("person/{}: {at:?} instead of {last}", key.1));
        }
    }
    for key in applied.keys() {
        violations
            .add(Violation::InboxBehind, format!("{}/{}, which the source does not have", key.0, key.1));
    }
}

fn read_model(stored: &Stored, violations: &Violations) {
    let mut found = stored.scores.clone();
    for (id, person) in &stored.persons {
        let expected = fold(person);
        let row = found.remove(id);
        if row.as_ref() != Some(&expected) {
            let shown = |row: &ScoreRow| {
                format!("version {}, total {}, {} entries", row.version, row.total, row.entries.len())
            };
            let row = row.as_ref().map_or_else(|| "nothing".to_owned(), shown);
            violations
                .add(Violation::ModelWrong, format!("person {id}: {row} instead of {}", shown(&expected)));
        }
    }
    for id in found.keys() {
        violations.add(Violation::ModelWrong, format!("person {id} is gone, and still in the read model"));
    }
}

fn fold(person: &Person) -> ScoreRow {
    let entries = person.items.iter().map(|(id, item)| (*id, (item.kind, item.value, item.points())));
    ScoreRow {
        cpf: person.cpf,
        version: person.version,
        total: person.score().to_string(),
        entries: entries.collect(),
    }
}

/// The last events of each score say what the read model says, entry by entry. The chain of a deleted person has ended.
fn scores(stored: &Stored, violations: &Violations) {
    let mut chains: BTreeMap<&str, Vec<&Event>> = BTreeMap::new();
    for ((key, _), event) in &stored.score.events {
        chains.entry(&key.1).or_default().push(event);
    }
    let wrong = |id: &dyn std::fmt::Display, why: String| {
        violations.add(Violation::ScoreWrong, format!("score {id}: {why}"));
    };
    for (person, version) in &stored.chains {
        let count = chains.get(person.to_string().as_str()).map_or(0, Vec::len);
        if i64::try_from(count) != Ok(*version) {
            wrong(person, format!("its chain is at {version} and has {count} events"));
        }
    }
    for (id, scored) in &stored.scores {
        let events = chains.remove(id.to_string().as_str()).unwrap_or_default();
        let mut published: BTreeMap<&str, &str> = BTreeMap::new();
        let mut total = "0";
        // What came before an end has lost its content.
        let ends = events.iter().filter(|event| event.summary.type_ == "score.deleted");
        let ended = ends.map(|event| event.position).max().unwrap_or(0);
        for event in events {
            if let Some(whole) = &event.summary.score {
                published = whole.entries.iter().map(|(id, score)| (id.as_str(), score.as_str())).collect();
                total = &whole.total;
                continue;
            }
            // A deletion of the lost time has come back, and the chain goes on.
            if event.summary.type_ == "score.deleted" {
                (published, total) = (BTreeMap::new(), "0");
                continue;
            }
            if event.position < ended {
                continue;
            }
            let Some(entry) = &event.summary.entry else {
                wrong(id, format!("{} without a score", event.summary.type_));
                continue;
            };
            published.insert(&event.summary.record, &entry.score);
            total = &entry.total;
        }
        if total != scored.total {
            wrong(id, format!("the last event says {total}, the read model {}", scored.total));
        }
        for (entry, (_, _, score)) in &scored.entries {
            let said = published.remove(entry.to_string().as_str());
            if said != Some(score.to_string().as_str()) {
                wrong(id, format!("entry {entry}: {said:?} instead of {score}"));
            }
        }
        for (entry, said) in published.into_iter().filter(|(_, said)| *said != "0") {
            wrong(id, format!("entry {entry} is gone, and its last event says {said}"));
        }
    }
    for (id, events) in chains {
        if events.last().is_none_or(|event| event.summary.type_ != "score.deleted") {
            wrong(&id, "its person is gone, and its chain does not end".to_owned());
        }
    }
}

/// Nothing of an ended aggregate is left.
fn erased(stored: &Stored, violations: &Violations) {
    for (outbox, end) in [(&stored.person, "person.deleted"), (&stored.score, "score.deleted")] {
        for ((key, version), event) in &outbox.events {
            let last = outbox.chains.get(key).map_or(0, |(last, _)| *last);
            let ends =
                outbox.events.get(&(key.clone(), last)).is_some_and(|event| event.summary.type_ == end);
            // The end says the id alone. A procedure may have ended it once more.
            let content = !event.summary.erased && event.summary.type_ != end;
            if ends && *version < last && content {
                violations.add(
                    Violation::LeftOver,
                    format!("{}/{} has ended, and version {version} still has its content", key.0, key.1),
                );
            }
        }
    }
}
