//! Holds what is stored, what was answered and what was delivered against each other, once all is quiet.
//!
//! It shares no code with the programs. What it compares comes from four places: the clients' memory, the
//! person database, the score database, and the subscriber's memory.

mod events;
mod left;
mod model;
mod stored;
mod writes;

use std::collections::BTreeMap;

use super::{
    addresses::Addresses, crew::Log, event::Stretch, fault::Member, history::History, subscriber::Subscriber,
    verdict::Findings,
};
pub(crate) use stored::Stored;

/// What the oracle is told.
#[derive(Debug)]
pub(crate) struct Evidence<'a> {
    /// What the clients know.
    pub(crate) history: &'a History,
    /// What was seen of the programs.
    pub(crate) crew: &'a BTreeMap<Member, Log>,
    /// What was delivered.
    pub(crate) subscriber: &'a Subscriber,
    /// Where notes may have been set aside.
    pub(crate) notes_aside: &'a [Stretch],
}

/// What there is, for the report.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Totals {
    pub(crate) person_events: usize,
    pub(crate) score_events: usize,
    pub(crate) persons: usize,
    pub(crate) erased: usize,
    pub(crate) dead_rows: i64,
}

/// Judges.
pub(crate) async fn judge(
    addresses: &Addresses,
    evidence: Evidence<'_>,
    findings: &Findings,
) -> anyhow::Result<Totals> {
    let stored = Stored::load(addresses).await?;
    writes::judge(&stored, evidence.history, findings);
    events::judge(&stored, evidence.subscriber, evidence.notes_aside, findings);
    model::judge(&stored, findings);
    left::judge(&stored, evidence.crew, findings);
    let events = || stored.person.events.values().chain(stored.score.events.values());
    Ok(Totals {
        person_events: stored.person.events.len(),
        score_events: stored.score.events.len(),
        persons: stored.persons.len(),
        erased: events().filter(|event| event.seen.erased).count(),
        dead_rows: stored.person.dead_rows + stored.score.dead_rows,
    })
}
