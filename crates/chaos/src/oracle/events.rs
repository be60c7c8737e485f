//! The versions of each aggregate have no holes, and each event was delivered to the subscriber, in order and as it was
//! committed. In each incarnation of its source on its own; what was lost with a database is the exception.

use std::collections::{BTreeMap, HashSet};

use super::stored::{Event, Outbox, Stored};
use crate::{
    event::{AggregateKey, EventSummary, Incarnation, MEMO, NOTE, PositionRange, UNPUBLISHABLE, source_of},
    lost_time::{Loss, LostEvent, LostTime},
    subscriber::{Chain, Deliveries, Subscriber},
    violation::{Violation, Violations},
};

pub(crate) fn check(
    stored: &Stored,
    subscriber: &Subscriber,
    (parked_notes, losses): (&[PositionRange], &[LostTime]),
    violations: &Violations,
) {
    let deliveries = subscriber.deliveries();
    for (source, outbox) in [("person", &stored.person), ("score", &stored.score)] {
        let source = Source { name: source, outbox, losses };
        source.versions(violations);
        source.delivered(&deliveries, violations);
        source.committed(&deliveries, violations);
        source.ordered(&deliveries, parked_notes, violations);
        source.begun_anew(&deliveries, violations);
        source.without_holes(&deliveries, violations);
    }
    for (note, version) in &stored.notes {
        let last = stored.person.chains.get(note).map(|(last, _)| *last);
        if last != Some(*version) {
            let example = format!("{}/{} is at {version}, its events at {last:?}", note.0, note.1);
            violations.add(Violation::VersionsWrong, example);
        }
    }
}

/// A source with its outbox, and what was lost of it.
#[derive(Clone, Copy)]
struct Source<'a> {
    name: &'static str,
    outbox: &'a Outbox,
    losses: &'a [LostTime],
}

impl<'a> Source<'a> {
    fn losses(self) -> impl DoubleEndedIterator<Item = (&'a LostTime, &'a Loss)> {
        self.losses.iter().filter_map(move |lost| Some((lost, lost.of(self.name)?)))
    }

    /// The earliest incarnation under which an event at this position must have been delivered.
    fn incarnation(self, position: i64) -> Incarnation {
        let began = self.losses().rev().find(|(_, loss)| position > loss.from_position);
        began.map_or(1, |(_, loss)| loss.incarnation)
    }

    /// All incarnations from this one on.
    fn incarnations(self, from: Incarnation) -> impl Iterator<Item = Incarnation> {
        let began = self.losses().map(|(_, loss)| loss.incarnation);
        std::iter::once(1).chain(began).filter(move |incarnation| *incarnation >= from)
    }

    /// An event that was lost with a database, and when.
    fn lost(self, event: &EventSummary) -> Option<(&'a LostTime, &'a LostEvent)> {
        self.losses().find_map(|(lost, loss)| Some((lost, loss.events.get(&event.id)?)))
    }

    fn chains(self, deliveries: &Deliveries) -> impl Iterator<Item = (&Chain, &BTreeMap<i64, EventSummary>)> {
        deliveries.chains.iter().filter(move |((_, key), _)| source_of(&key.0) == self.name)
    }

    fn versions(self, violations: &Violations) {
        for (key, version) in &self.outbox.duplicates {
            violations.add(Violation::VersionsWrong, format!("{} is stored twice", named(key, *version)));
        }
        for (key, (last, count)) in &self.outbox.chains {
            let end = self.outbox.events.get(&(key.clone(), *last));
            // All that the database knows of an aggregate of the lost time is that the procedure has ended it.
            let ended =
                *count == 1 && key.0 == "person" && end.is_some_and(|event| self.is_an_end(key, event));
            let from_one = usize::try_from(*last).ok() == Some(*count)
                && self.outbox.events.contains_key(&(key.clone(), 1));
            if !from_one && !ended {
                violations.add(
                    Violation::VersionsWrong,
                    format!("{}/{} has {count} events up to version {last}", key.0, key.1),
                );
            }
        }
    }

    fn is_an_end(self, key: &AggregateKey, event: &Event) -> bool {
        event.summary.type_ == "person.deleted"
            && self.losses.iter().any(|lost| lost.has_ended(&key.1, event.position))
    }

    fn delivered(self, deliveries: &Deliveries, violations: &Violations) {
        for ((key, version), Event { position, summary: stored }) in &self.outbox.events {
            // An operator has dropped the events that cannot be published.
            if key.0 == UNPUBLISHABLE && stored.type_ != format!("{UNPUBLISHABLE}.deleted") {
                continue;
            }
            let from = self.incarnation(*position);
            let chains = || self.incarnations(from).map(|incarnation| (incarnation, key.clone()));
            match chains().find_map(|chain| deliveries.find(&chain, *version, stored.id)) {
                Some(seen) if is_same(seen, stored) => {}
                Some(seen) => violations
                    .add(Violation::EventWrong, format!("{}: event {}", named(key, *version), seen.id)),
                None => {
                    let other = chains().find_map(|chain| deliveries.chains.get(&chain)?.get(version));
                    let (violation, what) = match other {
                        Some(seen) => (
                            Violation::EventTakenBack,
                            format!("event {} was delivered, event {} is stored", seen.id, stored.id),
                        ),
                        None => (
                            Violation::EventLost,
                            format!("{} at position {position}, of incarnation {from}", stored.type_),
                        ),
                    };
                    violations.add(violation, format!("{}: {what}", named(key, *version)));
                }
            }
        }
    }

    /// Everything that was delivered is stored, or was lost with a database.
    fn committed(self, deliveries: &Deliveries, violations: &Violations) {
        let newest = self.outbox.incarnation;
        let first = self
            .chains(deliveries)
            .flat_map(|(chain, events)| events.iter().map(move |(version, event)| (chain, *version, event)));
        let others = deliveries.contradictions.iter().filter(|((_, key), ..)| source_of(&key.0) == self.name);
        for (chain, version, seen) in
            first.chain(others.map(|(chain, version, event)| (chain, *version, event)))
        {
            let stored = self.outbox.events.get(&(chain.1.clone(), version));
            let is_stored = stored.is_some_and(|stored| stored.summary.id == seen.id);
            // What was lost before an incarnation began cannot be published under it.
            let is_it = |lost: &LostEvent| lost.key == chain.1 && lost.version == version;
            let is_lost = chain.0 < newest && self.lost(seen).is_some_and(|(_, lost)| is_it(lost));
            if !is_stored && !is_lost {
                let example = format!(
                    "{}: event {} is not stored (incarnation {})",
                    named(&chain.1, version),
                    seen.id,
                    chain.0
                );
                violations.add(Violation::EventTakenBack, example);
            }
        }
    }

    fn ordered(self, deliveries: &Deliveries, parked_notes: &[PositionRange], violations: &Violations) {
        let of_source = |((_, key), _): &&(Chain, i64)| source_of(&key.0) == self.name;
        for (chain, version) in deliveries.inversions.iter().filter(of_source) {
            // A parked event comes after later ones, as the contract says.
            let parked =
                |position: i64, ranges: &[PositionRange]| ranges.iter().any(|range| range.contains(position));
            let seen = deliveries.chains.get(chain).and_then(|events| events.get(version));
            let stored = self.outbox.events.get(&(chain.1.clone(), *version));
            let is_parked = stored.is_some_and(|event| parked(event.position, parked_notes))
                || seen
                    .and_then(|seen| self.lost(seen))
                    .is_some_and(|(lost, event)| parked(event.position, &lost.parked_notes));
            if !is_note(&chain.1) || !is_parked {
                violations.add(Violation::EventOutOfOrder, named(&chain.1, *version));
            }
        }
    }

    /// In the newest incarnation every aggregate that an earlier one had begins with its whole state, or with its end.
    fn begun_anew(self, deliveries: &Deliveries, violations: &Violations) {
        let newest = self.outbox.incarnation;
        let last = self.losses().next_back().map_or(1, |(_, loss)| loss.incarnation);
        if newest != last {
            let example =
                format!("{} is at incarnation {newest}, and {last} was the last one to begin", self.name);
            violations.add(Violation::NotRecovered, example);
        }
        let earlier: HashSet<&AggregateKey> =
            self.chains(deliveries).filter(|((of, _), _)| *of < newest).map(|((_, key), _)| key).collect();
        for (chain, _) in self.chains(deliveries).filter(|((of, _), _)| *of == newest) {
            if earlier.contains(&chain.1) && !deliveries.begun.contains(chain) {
                let example = format!("{}/{} never begins in incarnation {newest}", chain.1.0, chain.1.1);
                violations.add(Violation::NotRecovered, example);
            }
        }
    }

    /// What a database lost was delivered in order until then, so it has no holes either.
    fn without_holes(self, deliveries: &Deliveries, violations: &Violations) {
        for ((incarnation, key), events) in self.chains(deliveries) {
            // A note may have been parked when the database went back.
            if is_note(key) || *incarnation == self.outbox.incarnation {
                continue;
            }
            for (before, after) in events.keys().zip(events.keys().skip(1)) {
                if *after != before + 1 {
                    let example =
                        format!("{} comes after {before} (incarnation {incarnation})", named(key, *after));
                    violations.add(Violation::EventLost, example);
                }
            }
        }
    }
}

fn is_note(key: &AggregateKey) -> bool {
    [NOTE, MEMO].contains(&key.0.as_str())
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
