//! The versions of each aggregate have no holes, and the subscriber saw each of them, in order, as it was
//! committed.

use std::collections::HashSet;

use super::stored::{Event, Outbox, Stored};
use crate::{
    event::{Key, MEMO, MISFIT, NOTE, Seen, Stretch},
    subscriber::{Memory, Subscriber},
    verdict::{Charge, Findings},
};

pub(crate) fn judge(stored: &Stored, subscriber: &Subscriber, notes_aside: &[Stretch], findings: &Findings) {
    let memory = subscriber.memory();
    for outbox in [&stored.person, &stored.score] {
        versions(outbox, findings);
        delivered(outbox, &memory, findings);
    }
    let known: HashSet<(&Key, i64)> =
        [&stored.person, &stored.score].iter().flat_map(|o| o.events.keys()).map(|(k, v)| (k, *v)).collect();
    for (key, chain) in &memory.chains {
        for (version, seen) in chain {
            if !known.contains(&(key, *version)) {
                let example = format!("{}: event {} is not stored", named(key, *version), seen.id);
                findings.add(Charge::EventTakenBack, example);
            }
        }
    }
    for (key, version) in &memory.inversions {
        let event = stored.person.events.get(&(key.clone(), *version));
        // What was set aside comes after what came meanwhile, as the contract says.
        let aside = |event: &Event| notes_aside.iter().any(|stretch| stretch.contains(event.position));
        let note = [NOTE, MEMO].contains(&key.0.as_str());
        if !note || !event.is_some_and(aside) {
            findings.add(Charge::EventOutOfOrder, named(key, *version));
        }
    }
    for (note, version) in &stored.notes {
        let last = stored.person.chains.get(note).map(|(last, _)| *last);
        if last != Some(*version) {
            let example = format!("{}/{} is at {version}, its events at {last:?}", note.0, note.1);
            findings.add(Charge::VersionsWrong, example);
        }
    }
}

fn versions(outbox: &Outbox, findings: &Findings) {
    for (key, version) in &outbox.twice {
        findings.add(Charge::VersionsWrong, format!("{} is there twice", named(key, *version)));
    }
    for (key, (last, count)) in &outbox.chains {
        if usize::try_from(*last).ok() != Some(*count) || !outbox.events.contains_key(&(key.clone(), 1)) {
            findings.add(
                Charge::VersionsWrong,
                format!("{}/{} has {count} events up to version {last}", key.0, key.1),
            );
        }
    }
}

fn delivered(outbox: &Outbox, memory: &Memory, findings: &Findings) {
    for ((key, version), Event { position, seen: stored }) in &outbox.events {
        let Some(seen) = memory.chains.get(key).and_then(|chain| chain.get(version)) else {
            // What nobody can carry was dropped by hand.
            if key.0 != MISFIT {
                let example = format!("{} ({}) at position {position}", named(key, *version), stored.type_);
                findings.add(Charge::EventLost, example);
            }
            continue;
        };
        if seen.id != stored.id {
            findings.add(
                Charge::EventTakenBack,
                format!(
                    "{}: event {} was delivered, event {} is stored",
                    named(key, *version),
                    seen.id,
                    stored.id
                ),
            );
        } else if !is_like(seen, stored) {
            findings.add(Charge::EventWrong, format!("{}: event {}", named(key, *version), seen.id));
        }
    }
}

/// Byte by byte; or of an event that was erased before or after it was delivered, what erasure leaves.
fn is_like(seen: &Seen, stored: &Seen) -> bool {
    let erased = stored.erased && seen.record == stored.record;
    seen.type_ == stored.type_ && (seen.hash == stored.hash || erased)
}

fn named(key: &Key, version: i64) -> String {
    format!("{}/{} version {version}", key.0, key.1)
}
