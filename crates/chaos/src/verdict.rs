//! What is found to be wrong, counted by charge.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

/// Examples of each charge that are kept.
const EXAMPLES: usize = 5;

/// What can be wrong. Every run looks for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Charge {
    /// A write that was acknowledged is not stored.
    WriteLost,
    /// A write was stored more often than it was asked for.
    WriteDoubled,
    /// What is stored, or was answered, is not what was written.
    WriteWrong,
    /// A score that was read with a write's token does not contain it.
    ReadWrong,
    /// An event that is stored never reached the subscriber.
    EventLost,
    /// An event reached the subscriber and is not stored.
    EventTakenBack,
    /// A version was delivered for the first time behind a later one.
    EventOutOfOrder,
    /// A delivery's body or properties are not those of the event.
    EventWrong,
    /// Versions of an aggregate have a hole, or a version is there twice.
    VersionsWrong,
    /// The inbox does not stand where the source stands.
    InboxBehind,
    /// The read model is not the fold of the person database.
    ModelWrong,
    /// The events of a score do not add up to it.
    ScoreWrong,
    /// Something is parked, held or rejected that no fault explains, or still is at the end.
    LeftOver,
    /// A relay has not settled everything.
    Unsettled,
    /// A program is not ready at the end.
    NotReady,
    /// A program ended by itself.
    Ended,
    /// The outbox has dead rows that neither erasure nor a rollback explains.
    DeadRows,
    /// A program took more memory than it may.
    Memory,
    /// A client could not finish.
    Unfinished,
}

impl Charge {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 19] = [
        Self::WriteLost,
        Self::WriteDoubled,
        Self::WriteWrong,
        Self::ReadWrong,
        Self::EventLost,
        Self::EventTakenBack,
        Self::EventOutOfOrder,
        Self::EventWrong,
        Self::VersionsWrong,
        Self::InboxBehind,
        Self::ModelWrong,
        Self::ScoreWrong,
        Self::LeftOver,
        Self::Unsettled,
        Self::NotReady,
        Self::Ended,
        Self::DeadRows,
        Self::Memory,
        Self::Unfinished,
    ];

    /// In words, as a row of the table.
    pub fn words(self) -> &'static str {
        match self {
            Self::WriteLost => "acknowledged writes lost",
            Self::WriteDoubled => "writes doubled",
            Self::WriteWrong => "writes wrong",
            Self::ReadWrong => "reads that miss the reader's own write",
            Self::EventLost => "events lost",
            Self::EventTakenBack => "events published and not committed",
            Self::EventOutOfOrder => "events out of order on first delivery",
            Self::EventWrong => "deliveries with another body or other properties",
            Self::VersionsWrong => "holes and doubles in versions",
            Self::InboxBehind => "aggregates whose inbox is not at the source's version",
            Self::ModelWrong => "rows of the read model that differ from the person database",
            Self::ScoreWrong => "scores that differ from their events",
            Self::LeftOver => "parked, held or rejected without a cause, or still",
            Self::Unsettled => "relays that have not settled everything",
            Self::NotReady => "programs not ready at the end",
            Self::Ended => "programs that ended by themselves",
            Self::DeadRows => "dead rows of the outbox beyond erasures and rollbacks",
            Self::Memory => "programs above their bound of memory",
            Self::Unfinished => "clients that could not finish",
        }
    }

    /// Where to look first.
    pub fn look_at(self) -> &'static str {
        match self {
            Self::WriteLost | Self::WriteDoubled | Self::WriteWrong | Self::Unfinished => {
                "log/person-api.log; the person's rows and events: SELECT … FROM outbox.event WHERE aggregate_id = …"
            }
            Self::ReadWrong => "log/score-api.log, and score.person against inbox.aggregate",
            Self::EventLost | Self::EventTakenBack | Self::EventOutOfOrder | Self::Unsettled => {
                "log/person-relay-*.log and log/score-relay.log: who led when, and the fault just before"
            }
            Self::EventWrong => "the event's row in outbox.event, and log/rabbitmq.log",
            Self::VersionsWrong => "who appended: log/person-api.log, log/score-projector-*.log",
            Self::InboxBehind | Self::ModelWrong | Self::ScoreWrong => {
                "log/score-projector-*.log: the transaction of the last version applied"
            }
            Self::LeftOver => "outbox.parked, inbox.held and inbox.rejected: reason and error",
            Self::NotReady | Self::Ended | Self::Memory => "the program's own log",
            Self::DeadRows => "who updates or deletes in outbox.event",
        }
    }
}

/// What was found, from wherever it was seen.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    found: Mutex<BTreeMap<Charge, Found>>,
}

/// How often, and the first examples.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Found {
    /// How often it was found.
    pub count: usize,
    /// The first few, in words. They name no one but by UUID.
    pub examples: Vec<String>,
}

impl Findings {
    /// Something is wrong.
    pub(crate) fn add(&self, charge: Charge, example: String) {
        let mut found = self.lock();
        let found = found.entry(charge).or_default();
        found.count += 1;
        if found.examples.len() < EXAMPLES {
            found.examples.push(example);
        }
    }

    /// Everything that was found.
    pub(crate) fn all(&self) -> BTreeMap<Charge, Found> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Charge, Found>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
