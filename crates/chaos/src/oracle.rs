//! Compares the clients' history, the two databases and the deliveries, once everything has arrived. It shares no code with
//! the programs.

mod events;
mod leftovers;
mod read_model;
mod stored;
mod writes;

use std::collections::BTreeMap;

use super::{
    addresses::Addresses, event::PositionRange, fault::Instance, history::History, lost_time::LostTime,
    subscriber::Subscriber, supervisor::Health, violation::Violations,
};
pub(crate) use stored::{Outbox, Stored, persons};

/// What was observed from outside during the run.
#[derive(Debug)]
pub(crate) struct Observations<'a> {
    pub(crate) history: &'a History,
    pub(crate) health: &'a BTreeMap<Instance, Health>,
    pub(crate) subscriber: &'a Subscriber,
    /// Where notes may have been parked, and so published out of order.
    pub(crate) parked_notes: &'a [PositionRange],
    /// What was lost when databases went back in time.
    pub(crate) losses: &'a [LostTime],
}

/// How much there was, for the report.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) person_events: usize,
    pub(crate) score_events: usize,
    pub(crate) persons: usize,
    pub(crate) erased: usize,
    pub(crate) dead_rows: i64,
}

pub(crate) use writes::check as check_writes;

/// Checks every promise, and adds to the violations.
pub(crate) async fn check(
    addresses: &Addresses,
    observations: Observations<'_>,
    violations: &Violations,
) -> anyhow::Result<Totals> {
    let stored = Stored::load(addresses).await?;
    let Observations { history, subscriber, parked_notes, losses, health } = observations;
    check_writes((&stored.person, &stored.persons), history, losses, violations);
    events::check(&stored, subscriber, (parked_notes, losses), violations);
    read_model::check(&stored, losses, violations);
    leftovers::check(&stored, health, violations);
    let events = || stored.person.events.values().chain(stored.score.events.values());
    Ok(Totals {
        person_events: stored.person.events.len(),
        score_events: stored.score.events.len(),
        persons: stored.persons.len(),
        erased: events().filter(|event| event.summary.erased).count(),
        dead_rows: stored.person.dead_rows + stored.score.dead_rows,
    })
}
