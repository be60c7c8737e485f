//! Nothing is set aside, nothing is unsettled, and the programs are well.

use std::collections::BTreeMap;

use super::stored::{Outbox, Stored};
use crate::{
    crew::Log,
    fault::Member,
    verdict::{Charge, Findings},
};

/// What a program may have at most, in MiB. A relay of a debug build has up to 67 with its four connections to the
/// broker, of 8 each. It opens three more when it needs them, and what it frees is not given back at once.
const MEMORY: u64 = 112;

pub(crate) fn judge(stored: &Stored, crew: &BTreeMap<Member, Log>, findings: &Findings) {
    for example in stored.person.parked.iter().chain(&stored.score.parked).chain(&stored.aside) {
        findings.add(Charge::LeftOver, example.clone());
    }
    for (name, outbox) in [("person", &stored.person), ("score", &stored.score)] {
        let last = outbox.last_stored();
        if outbox.low_water < last {
            let example = format!("the relay of {name} has settled up to {} of {last}", outbox.low_water);
            findings.add(Charge::Unsettled, example);
        }
        let explained = explained(outbox);
        if outbox.dead_rows > explained {
            let example =
                format!("{name}: {} dead rows, of which {explained} are explained", outbox.dead_rows);
            findings.add(Charge::DeadRows, example);
        }
    }
    for (member, log) in crew {
        if let Some(reason) = &log.waits_for {
            findings.add(Charge::NotReady, format!("{}: {reason}", member.name()));
        }
        for words in &log.ends {
            findings.add(Charge::Ended, format!("{}: {words}", member.name()));
        }
        if log.memory > MEMORY * 1024 {
            let example = format!("{}: {} MiB, and may have {MEMORY}", member.name(), log.memory / 1024);
            findings.add(Charge::Memory, example);
        }
    }
}

/// An erasure leaves a dead row of each event that it erases. Whoever rolls back leaves one of each that it
/// appended, and a position that is missing.
fn explained(outbox: &Outbox) -> i64 {
    let erased = outbox.events.values().filter(|event| event.seen.erased).count();
    let missing = outbox.last_position - i64::try_from(outbox.events.len()).unwrap_or(i64::MAX);
    i64::try_from(erased).unwrap_or(i64::MAX).saturating_add(missing)
}
