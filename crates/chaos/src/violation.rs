//! Broken promises, counted by kind.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

/// How many examples of each violation are recorded.
const EXAMPLES: usize = 5;

/// A promise that is broken. Every run checks all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Violation {
    /// A write that was acknowledged is not stored.
    WriteLost,
    /// A write was stored more often than it was asked for.
    WriteDoubled,
    /// What is stored, or what a response said, is not what was written.
    WriteWrong,
    /// A score that was read with a write's token does not contain it.
    ReadWrong,
    /// An event that is stored never reached the subscriber.
    EventLost,
    /// An event reached the subscriber and is not stored.
    EventTakenBack,
    /// A version was delivered for the first time after a later one.
    EventOutOfOrder,
    /// A delivery's body or properties are not those of the event.
    EventWrong,
    /// Versions of an aggregate have a hole, or a version is stored twice.
    VersionsWrong,
    /// The inbox is not at the version of the source.
    InboxBehind,
    /// The read model differs from the person database.
    ModelWrong,
    /// The events of a score do not add up to it.
    ScoreWrong,
    /// An event is parked, held or rejected at the end, or the content of an ended aggregate is not erased.
    LeftOver,
    /// A relay has not settled everything.
    Unsettled,
    /// A program is not ready at the end.
    NotReady,
    /// A program ended by itself.
    Ended,
    /// The outbox has dead rows that neither erasure nor a rollback explains.
    DeadRows,
    /// A program used more memory than its limit.
    Memory,
    /// A client could not learn the outcome of a write.
    Unfinished,
    /// The documented procedure after a database went back in time did not end with its checks green, or something had no
    /// new beginning after it.
    NotRecovered,
}

impl Violation {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 20] = [
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
        Self::NotRecovered,
    ];

    /// Its row of the table.
    pub fn description(self) -> &'static str {
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
            Self::LeftOver => "events parked, held or rejected at the end, or content not erased",
            Self::Unsettled => "relays that have not settled everything",
            Self::NotReady => "programs not ready at the end",
            Self::Ended => "programs that ended by themselves",
            Self::DeadRows => "dead rows of the outbox beyond erasures and rollbacks",
            Self::Memory => "programs above their memory limit",
            Self::Unfinished => "clients that could not finish",
            Self::NotRecovered => "procedures after a lost time that did not end green",
        }
    }

    /// Where to look first.
    pub fn where_to_look(self) -> &'static str {
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
            Self::NotRecovered => "log/procedure.log: each command of the operator, and what it said",
            Self::DeadRows => "who updates or deletes in outbox.event",
        }
    }
}

/// The violations that were found so far.
#[derive(Debug, Default)]
pub(crate) struct Violations {
    found: Mutex<BTreeMap<Violation, Occurrences>>,
}

/// How often a violation was found, and the first examples.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Occurrences {
    /// How often.
    pub count: usize,
    /// The first few, in words. They name persons by UUID only.
    pub examples: Vec<String>,
}

impl Violations {
    /// Adds an example.
    pub(crate) fn add(&self, violation: Violation, example: String) {
        let mut found = self.lock();
        let found = found.entry(violation).or_default();
        found.count += 1;
        if found.examples.len() < EXAMPLES {
            found.examples.push(example);
        }
    }

    /// All that were found.
    pub(crate) fn all(&self) -> BTreeMap<Violation, Occurrences> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Violation, Occurrences>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
