//! The versions of each aggregate have no holes, and each event was delivered to the subscriber, in order and as it was
//! committed.

use std::collections::HashSet;

use super::stored::{Event, Outbox, Stored};
use crate::{
    event::{AggregateKey, EventSummary, MEMO, NOTE, PositionRange, UNPUBLISHABLE},
    subscriber::{Deliveries, Subscriber},
    violation::{Violation, Violations},
};

pub(crate) fn check(
    stored: &Stored,
    subscriber: &Subscriber,
    parked_notes: &[PositionRange],
    violations: &Violations,
) {
    let deliveries = subscriber.deliveries();
    for outbox in [&stored.person, &stored.score] {
        versions(outbox, violations);
        delivered(outbox, &deliveries, violations);
    }
    let known: HashSet<(&AggregateKey, i64)> =
        [&stored.person, &stored.score].iter().flat_map(|o| o.events.keys()).map(|(k, v)| (k, *v)).collect();
    for (key, chain) in &deliveries.chains {
        for (version, seen) in chain {
            if !known.contains(&(key, *version)) {
                let example = format!("{}: event {} is not stored", named(key, *version), seen.id);
                violations.add(Violation::EventTakenBack, example);
            }
        }
    }
    for (key, version) in &deliveries.inversions {
        let event = stored.person.events.get(&(key.clone(), *version));
        // A parked event comes after later ones, as the contract says.
        let parked = |event: &Event| parked_notes.iter().any(|range| range.contains(event.position));
        let note = [NOTE, MEMO].contains(&key.0.as_str());
        if !note || !event.is_some_and(parked) {
            violations.add(Violation::EventOutOfOrder, named(key, *version));
        }
    }
    for (note, version) in &stored.notes {
        let last = stored.person.chains.get(note).map(|(last, _)| *last);
        if last != Some(*version) {
            let example = format!("{}/{} is at {version}, its events at {last:?}", note.0, note.1);
            violations.add(Violation::VersionsWrong, example);
        }
    }
}

fn versions(outbox: &Outbox, violations: &Violations) {
    for (key, version) in &outbox.duplicates {
        violations.add(Violation::VersionsWrong, format!("{} is stored twice", named(key, *version)));
    }
    for (key, (last, count)) in &outbox.chains {
        if usize::try_from(*last).ok() != Some(*count) || !outbox.events.contains_key(&(key.clone(), 1)) {
            violations.add(
                Violation::VersionsWrong,
                format!("{}/{} has {count} events up to version {last}", key.0, key.1),
            );
        }
    }
}

fn delivered(outbox: &Outbox, deliveries: &Deliveries, violations: &Violations) {
    for ((key, version), Event { position, summary: stored }) in &outbox.events {
        let Some(seen) = deliveries.chains.get(key).and_then(|chain| chain.get(version)) else {
            // An operator has dropped the events that cannot be published.
            if key.0 != UNPUBLISHABLE {
                let example = format!("{} ({}) at position {position}", named(key, *version), stored.type_);
                violations.add(Violation::EventLost, example);
            }
            continue;
        };
        if seen.id != stored.id {
            violations.add(
                Violation::EventTakenBack,
                format!(
                    "{}: event {} was delivered, event {} is stored",
                    named(key, *version),
                    seen.id,
                    stored.id
                ),
            );
        } else if !is_same(seen, stored) {
            violations.add(Violation::EventWrong, format!("{}: event {}", named(key, *version), seen.id));
        }
    }
}

/// Whether type and body are the same. Of an erased event only the record is compared: it may have been delivered before
/// or after the erasure.
fn is_same(seen: &EventSummary, stored: &EventSummary) -> bool {
    let erased = stored.erased && seen.record == stored.record;
    seen.type_ == stored.type_ && (seen.hash == stored.hash || erased)
}

fn named(key: &AggregateKey, version: i64) -> String {
    format!("{}/{} version {version}", key.0, key.1)
}
