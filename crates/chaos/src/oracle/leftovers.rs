//! Nothing is parked, held, rejected or unsettled, and the programs are ready and within their memory limit.

use std::collections::BTreeMap;

use super::stored::{Outbox, Stored};
use crate::{
    fault::Instance,
    supervisor::Health,
    violation::{Violation, Violations},
};

/// The memory limit of a program, in MiB. A relay of a debug build uses up to 67 with its four connections to the broker,
/// of 8 each. It opens three more when it needs them, and freed memory is not returned at once.
const MEMORY_LIMIT: u64 = 112;

pub(crate) fn check(stored: &Stored, health: &BTreeMap<Instance, Health>, violations: &Violations) {
    for example in stored.person.parked.iter().chain(&stored.score.parked).chain(&stored.held_or_rejected) {
        violations.add(Violation::LeftOver, example.clone());
    }
    for (name, outbox) in [("person", &stored.person), ("score", &stored.score)] {
        let last = outbox.last_stored();
        if outbox.low_water < last {
            let example = format!("the relay of {name} has settled up to {} of {last}", outbox.low_water);
            violations.add(Violation::Unsettled, example);
        }
        let expected = expected(outbox);
        if outbox.dead_rows > expected {
            let example = format!("{name}: {} dead rows, of which {expected} are expected", outbox.dead_rows);
            violations.add(Violation::DeadRows, example);
        }
    }
    for (instance, health) in health {
        if let Some(reason) = &health.not_ready {
            violations.add(Violation::NotReady, format!("{}: {reason}", instance.name()));
        }
        for end in &health.unexpected_ends {
            violations.add(Violation::Ended, format!("{}: {end}", instance.name()));
        }
        if health.peak_memory > MEMORY_LIMIT * 1024 {
            let example = format!(
                "{}: {} MiB, above the limit of {MEMORY_LIMIT}",
                instance.name(),
                health.peak_memory / 1024
            );
            violations.add(Violation::Memory, example);
        }
    }
}

/// How many dead rows are expected: one for each erased event, and one for each event that was rolled back, whose position
/// is missing.
fn expected(outbox: &Outbox) -> i64 {
    let erased = outbox.events.values().filter(|event| event.summary.erased).count();
    let missing = outbox.last_position - i64::try_from(outbox.events.len()).unwrap_or(i64::MAX);
    i64::try_from(erased).unwrap_or(i64::MAX).saturating_add(missing)
}
